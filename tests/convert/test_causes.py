"""For a checkpoint that does not fit its config.json, the error names the cause that was made here, and no other cause."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from swift_mega import api
from swift_mega.errors import UserError
from tests import tiny

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: tiny.make(tmp_path_factory.mktemp(name), name)
        for name in ("llama", "llama_tied", "deepseek_v3_dense", "mixtral", "gpt2")
    }


def said_of(source: Path, folder: Path, change: Callable[[Tensors], Tensors], **fields: Any) -> str:
    """The error of a dry run on a changed copy of `source`; "" where there is none."""
    folder.mkdir()
    config = json.loads((source / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    made = change(load_file(source / "model.safetensors"))
    save_file(
        {name: value.contiguous() for name, value in made.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    try:
        api.plan(source=str(folder))
    except UserError as error:
        return str(error)
    return ""


def renamed(pattern: str, text: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {re.sub(pattern, text, name): value for name, value in tensors.items()}


def without(pattern: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value for name, value in tensors.items() if not re.search(pattern, name)}


def beside(**more: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name.replace("__", "."): value for name, value in more.items()}


def headless(*names: str) -> Callable[[Tensors], Tensors]:
    """Replaces the output layer by a head of one row for each name."""
    return lambda tensors: without("lm_head")(tensors) | {name: torch.ones(1, 32) for name in names}


def with_layer(number: int, *ends: str) -> Callable[[Tensors], Tensors]:
    """Copies the last layer under another number, and adds further tensors to it."""

    def change(tensors: Tensors) -> Tensors:
        again = {
            re.sub(r"layers\.3\.", f"layers.{number}.", name): v.clone()
            for name, v in tensors.items()
            if "layers.3." in name
        }
        return tensors | again | {f"model.layers.{number}.{end}.weight": torch.ones(4) for end in ends}

    return change


CAUSES: list[tuple[str, str, Callable[[Tensors], Tensors], dict[str, Any], str]] = [
    (
        "saved inside PEFT", "llama", renamed(r"(lm_head|q_proj)\.weight", r"\1.base_layer.weight"), {},
        r"names have the prefix of a wrapper, PEFT's \(save what merge_and_unload returns\)",
    ),
    ("saved inside PEFT, all of it", "llama", renamed("^", "base_model.model."), {}, r"a wrapper, PEFT's"),
    ("compiled", "llama", renamed("^", "_orig_mod."), {}, r"a wrapper, torch.compile's"),
    ("under DDP", "gpt2", renamed("^", "module."), {}, r"a wrapper, DistributedDataParallel's"),
    ("under FSDP", "llama", renamed(r"layers\.(\d)\.", r"layers.\1._fsdp_wrapped_module."), {}, r"a wrapper, FSDP's"),
    (
        "out of a model of images", "llama", renamed("^", "language_model."), {},
        r"there under a name that begins with 'language_model.'; rename them without it",
    ),
    (
        "a model of images", "llama", beside(vision_tower__patch__weight=torch.ones(2)), {},
        r"vision_tower.patch.weight belong to a model of images or audio",
    ),
    (
        "a reward model that does not say so", "llama", headless("score.weight"), {},
        r"in place of the output layer lm_head.weight there is score.weight: this is a reward model or a classifier",
    ),
    (
        "a classifier of tokens", "llama", headless("score.weight"), {"architectures": ["LlamaForTokenClassification"]},
        r"architectures=\['LlamaForTokenClassification'\] is a model with the head of another task",
    ),
    (
        "a tied reward model", "llama_tied", headless("score.weight"), {"architectures": ["LlamaForSequenceClassification"]},
        r"architectures=\['LlamaForSequenceClassification'\] is a model with the head of another task",
    ),
    (
        "the bare model, untied", "llama", lambda t: renamed(r"^model\.", "")(without("lm_head")(t)), {"architectures": ["LlamaModel"]},
        r"\['LlamaModel'\] is the decoder without an output layer, .*: transformers would make lm_head.weight of random values",
    ),
    (
        "without its head", "llama", without("lm_head"), {},
        r"lm_head.weight is the output layer, .*copy the weights again, or set tie_word_embeddings=true where",
    ),
    (
        "layers of multi-token prediction, unsaid", "deepseek_v3_dense", with_layer(4, "eh_proj", "enorm"),
        {"num_nextn_predict_layers": 0},
        r"layer 4 is of multi-token prediction, beyond the 4 layers .*; set num_nextn_predict_layers=1 in config.json",
    ),
    (
        "the same of a family that has none", "llama", with_layer(4, "eh_proj", "enorm"), {},
        r"layer 4 is of multi-token prediction, .*nothing computes them for this model_type; remove them from the files",
    ),
    ("more layers", "llama", with_layer(4), {}, r"states 4 layers, and layers up to 4 are there"),
    ("fewer layers", "gpt2", without(r"h\.3\."), {}, r"states 4 layers, and the files end with layer 2; copy the rest"),
    ("more experts", "mixtral", lambda t: t, {"num_local_experts": 3}, r"states 3 experts, and expert 3 is there"),
    (
        "a quantised weight that config.json says nothing of", "llama",
        renamed(r"(q_proj)\.weight", r"\1.qweight"), {}, r"\.qweight.* are parts of quantised weights, and config.json states no",
    ),
    (
        "one tensor away", "llama", without(r"layers\.1\.self_attn\.k_proj"), {},
        r"asks for: model.layers.1.self_attn.k_proj.weight; use the config.json that belongs to these weights, or copy the weights again$",
    ),
    (
        "a layer in the middle away", "llama", without(r"layers\.1\."), {},
        r"use the config.json that belongs to these weights, or copy the weights again$",
    ),
    (
        "hidden sizes that differ are not rows of a vocabulary", "llama", lambda t: t, {"hidden_size": 40, "head_dim": 8},
        r"embed_tokens.weight is \[131, 32\], config.json says \[131, 40\].*; use the config.json of this checkpoint$",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change", "fields", "said"), [row[1:] for row in CAUSES], ids=[row[0] for row in CAUSES]
)
def test_the_cause_is_what_was_done(models, tmp_path, name, change, fields, said):
    found = said_of(models[name], tmp_path / "changed", change, **fields)
    assert re.search(said, found), found


def test_a_value_head_beside_the_output_layer_is_kept(models, tmp_path):
    """TRL saves a value head on top of a language model; this is not taken for a reward model."""
    assert said_of(models["llama"], tmp_path / "changed", beside(v_head__summary__weight=torch.ones(1, 32))) == ""
