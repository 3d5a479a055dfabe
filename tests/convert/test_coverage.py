"""Every tensor of a checkpoint is accounted for before any weight is read: each way in which files and config.json can disagree.

All ranks of a layout must raise the same message; otherwise a rank that goes on waits for ever.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from swift_mega.config import schema
from swift_mega.convert.files.hf_files import Checkpoint
from swift_mega.convert.megatron.mcore import widest
from swift_mega.convert.source import Source
from swift_mega.errors import UserError
from swift_mega.models.translate import load_settings
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.layout import parse_layout, plan_layout
from swift_mega.train.build import build_part
from tests import tiny

Tensors = dict[str, Tensor]


def removed(*names: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return change


def added(**values: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name.replace("__", "."): value for name, value in values.items()})


def replaced(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: make(tensors[name]).contiguous()})


def every(make: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: make(value) for name, value in tensors.items()})


def nothing(tensors: Tensors) -> None:
    pass


K = "model.layers.1.self_attn.k_proj.weight"
FAULTS: dict[str, tuple[str, Callable[[Tensors], None], dict[str, Any], str]] = {
    "missing": (
        "llama",
        removed(K),
        {},
        rf"lacks 1 tensors that config.json asks for: {K}; use the config.json that belongs",
    ),
    "missing on another stage": (
        "llama",
        removed("model.layers.3.mlp.up_proj.weight", "model.norm.weight"),
        {},
        r"lacks 2 tensors .*: model\.layers\.3\.mlp\.up_proj\.weight, model\.norm\.weight",
    ),
    "missing head": (
        "llama",
        removed("lm_head.weight"),
        {},
        "lm_head.weight is the output layer, and config.json says tie_word_embeddings=false, so the files must have it; copy",
    ),
    "missing expert": (
        "qwen3_moe",
        removed("model.layers.2.mlp.experts.3.down_proj.weight"),
        {},
        r"lacks 1 .*layers\.2\.mlp\.experts\.3\.down_proj",
    ),
    "extra": (
        "llama",
        added(model__layers__0__self_attn__q_norm__weight=torch.ones(8)),
        {},
        "holds 1 tensors that nothing reads: model.*q_norm",
    ),
    "extra bias": (
        "qwen3",
        added(model__layers__0__self_attn__q_proj__bias=torch.ones(64)),
        {},
        "nothing reads: .*q_proj.bias",
    ),
    "extra layers": (
        "llama",
        nothing,
        {"num_hidden_layers": 2},
        r"holds 18 tensors .*config.json states 2 layers, and layers up to 3 are there; use",
    ),
    "too few layers": (
        "llama",
        nothing,
        {"num_hidden_layers": 6},
        "lacks 18 .*states 6 layers, and the files end with layer 3",
    ),
    "wrong rows": (
        "llama",
        replaced(K, lambda t: t[:-8]),
        {},
        rf"shapes differ from config.json: {K} is \[24, 32\], config.json says \[32, 32\]; use",
    ),
    "wrong columns": (
        "llama",
        replaced(K, lambda t: t.t()[:, :30].t()),
        {},
        r"k_proj.weight is \[30, 32\], config.json says \[32, 32\]",
    ),
    "transposed": (
        "llama",
        replaced("model.layers.0.mlp.up_proj.weight", lambda t: t.t()),
        {},
        r"is \[32, 48\], config.json says \[48, 32\]",
    ),
    "one dimension more": (
        "llama",
        replaced("model.norm.weight", lambda t: t[None]),
        {},
        r"norm.weight is \[1, 32\], config.json says \[32\]",
    ),
    "vocabulary": (
        "llama",
        nothing,
        {"vocab_size": 132},
        r"embed_tokens.weight is \[131, 32\], config.json says \[132, 32\]",
    ),
    "vocabulary that pads to the same": (
        "llama",
        replaced("lm_head.weight", lambda t: t[:-1]),
        {},
        r"lm_head.weight is \[130, 32\], .*\[131, 32\]",
    ),
    "head dim": ("llama", nothing, {"head_dim": 16}, r"is \[\d+, (32|64)\], config.json says \[\d+, (32|128)\]"),
    "fewer key heads": (
        "llama",
        nothing,
        {"num_key_value_heads": 2},
        r"k_proj.weight is \[32, 32\], config.json says \[16, 32\]",
    ),
    "one quantised": (
        "llama",
        replaced(K, lambda t: t.to(torch.float8_e4m3fn)),
        {},
        rf"{K} \(torch.float8_e4m3fn\) are quantised; convert",
    ),
    "all integers": (
        "llama",
        every(lambda t: t.to(torch.int8)),
        {},
        r"torch\.int8\) and \d+ more are quantised; convert the checkpoint",
    ),
    "untied files": (
        "llama_tied",
        added(lm_head__weight=torch.zeros(131, 32)),
        {},
        "says tie_word_embeddings=true, but lm_head.weight differs",
    ),
    "head of another shape": (
        "llama_tied",
        added(lm_head__weight=torch.zeros(130, 32)),
        {},
        "but lm_head.weight differs",
    ),
    "tied by mistake": (
        "llama",
        nothing,
        {"tie_word_embeddings": True},
        "lm_head.weight differs from model.embed_tokens.weight; set tie",
    ),
}


def messages(directories: list[Path], layout_name: str, cpu: Any) -> list[str]:
    """In every rank: the message of loading each directory. Asserts that all ranks have the same."""
    said = []
    for directory in directories:
        parallel, world = parse_layout(layout_name)
        groups = parallel_groups.init(plan_layout(parallel, load_settings(directory).shape, world, training=False))
        heard = [""] * dist.get_world_size()
        mine = ""
        try:
            run = schema.Run(parallel=parallel)
            build_part(run, cpu, groups, dtype=torch.float32, reads_inputs=False, source=Source(directory))
        except UserError as error:
            mine = str(error)
        dist.all_gather_object(heard, mine)
        assert len(set(heard)) == 1, heard
        said.append(mine)
        parallel_groups.close()
    return said


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("faulty")
    made: dict[str, Path] = {}
    for number, (fault, (name, change, config, _)) in enumerate(FAULTS.items()):
        directory = tiny.make(folder / str(number), name)
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        made[fault] = directory
    return made


@pytest.mark.parametrize("layout", ["single", "tp2", "pp2"])
def test_each_fault_is_one_message_on_every_rank(ranks, cpu, faulty, layout):
    said = ranks(1 if layout == "single" else 2, messages, list(faulty.values()), layout, cpu, timeout=200)
    for (fault, (*_, expected)), text in zip(FAULTS.items(), said, strict=True):
        assert text, f"{fault}: accepted"
        with pytest.raises(UserError, match=expected):
            raise UserError(text)
        assert str(faulty[fault]) in text and "; " in text


@pytest.mark.parametrize("layout", ["single", "tp2", "pp2"])
def test_what_is_not_a_fault(ranks, cpu, tmp_path, layout):
    """Not an error: a tied head that is a copy of the embedding, and the buffers that old checkpoints have. Both are left out."""
    tied = tiny.make(tmp_path / "tied", "llama_tied")
    tensors = load_file(tied / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    for layer in range(4):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tied / "model.safetensors", metadata={"format": "pt"})
    assert ranks(1 if layout == "single" else 2, messages, [tied], layout, cpu) == [""]


def test_the_widest_dtype_holds_them_all(tmp_path):
    for kinds, expected in (
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.float16, torch.bfloat16), torch.float32),
        ((torch.float32, torch.bfloat16), torch.float32),
        ((torch.float64, torch.float16), torch.float64),
    ):
        save_file({str(n): torch.ones(1, dtype=kind) for n, kind in enumerate(kinds)}, tmp_path / "model.safetensors")
        assert widest(Checkpoint(tmp_path)) == expected


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn, torch.uint8])
def test_no_dtype_holds_quantised_weights(tmp_path, kind):
    """Refused before a rank starts, and not by each rank when it fails to make a parameter of integers."""
    save_file({"a": torch.ones(2, dtype=kind), "b": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"a \(torch\..*\) are quantised; convert the checkpoint to bfloat16"):
        widest(Checkpoint(tmp_path))
