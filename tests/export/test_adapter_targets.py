"""Adapters whose adapter_config.json gives their targets by a pattern, by layers or not at all: the tensors decide. PEFT made them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from swift_mega import api
from swift_mega.api import Candidate
from swift_mega.api.training import _continued
from swift_mega.config import schema
from swift_mega.errors import UserError
from swift_mega.export.adapters import tuner_of
from swift_mega.models.family import family_of
from swift_mega.models.translate import load_settings
from tests import tiny

KINDS: dict[str, dict[str, Any]] = {
    "pattern": dict(target_modules=r".*self_attn\.(q|v)_proj"),
    "one_layer": dict(target_modules=["q_proj", "v_proj"], layers_to_transform=[1], layers_pattern="layers"),
    "excluded": dict(target_modules="all-linear", exclude_modules=r".*mlp.*"),
    "no_field": dict(target_modules=["k_proj", "up_proj"]),
}
TARGETS = {
    "pattern": ("q_proj", "v_proj"),
    "one_layer": ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"),
    "excluded": ("k_proj", "o_proj", "q_proj", "v_proj"),
    "no_field": ("k_proj", "up_proj"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("targets") / "model", "llama", num_hidden_layers=2)


def made(model: Path, folder: Path, **fields: Any) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    network = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **fields)
    )
    with torch.no_grad():
        for name, value in network.named_parameters():
            if "lora_" in name:
                value.normal_(0, 0.2)
    network.save_pretrained(folder, save_embedding_layers=False)
    return folder


def without_targets(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "target_modules"}))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_merged_is_what_is_computed(model, tmp_path, kind):
    """Megatron-core with the adapter beside the weights equals merged files; further training of the adapter trains all of it."""
    adapter = made(model, tmp_path / "adapter", **KINDS[kind])
    if kind == "no_field":
        without_targets(adapter)
    if kind in ("one_layer", "no_field"):
        api.export(model=str(model), adapters=str(adapter), output=str(tmp_path / "merged"))
        assert api.compare(str(tmp_path / "merged"), Candidate(checkpoint=str(model), adapter=str(adapter))).passed
    run = schema.Run(model=schema.Model(path=str(model), adapters=(str(adapter),)))
    theirs = _continued(run, {"tuner.dropout": "--lora_dropout"}).tuner
    assert theirs == schema.Lora(rank=4, alpha=8.0, target_modules=TARGETS[kind])
    given = _continued(run, {"tuner.rank": "--lora_rank", "tuner.target_modules": "--target_modules"}).tuner
    assert (given.rank, given.alpha, given.target_modules) == (8, 8.0, ("all-linear",))
    assert _continued(run, None) == run


def test_gradients_where_peft_would_guess_the_targets(model, tmp_path):
    """PEFT's default targets for llama are q_proj and v_proj, which would leave these factors out."""
    adapter = made(model, tmp_path / "adapter", **KINDS["no_field"])
    without_targets(adapter)
    report = api.verify(str(model), ["single"], tuner="lora", adapters=str(adapter))
    assert report.passed, report.table()


def test_factors_of_no_linear_here(model, tmp_path):
    adapter = made(model, tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    with pytest.raises(
        UserError, match=r"has factors for lm_head, which is no linear of attention or MLP of this model; .*merge"
    ):
        tuner_of(adapter, family_of(model), load_settings(model))
