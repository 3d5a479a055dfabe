"""The FLOPs of a token, against the matrices of transformers' own model, and against published numbers of real models."""

import json
from pathlib import Path

import pytest
import torch

from swift_mega.models.translate import hf_config, load_settings
from swift_mega.train.flops import flops_per_token, weights_per_token
from tests import tiny
from tests.models.test_published_configs import CONFIGS

CHOSEN = ("num_experts_per_tok", "moe_k")


def counted(directory: Path) -> int:
    """The numbers in transformers' matrices that a token is multiplied by: for stacked experts [experts, ...] their share, for
    embeddings none."""
    from transformers import AutoModelForCausalLM

    config = hf_config(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = 0
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or "bias" in name or "norm" in name or id(parameter) in looked_up:
            continue
        share = parameter.numel()
        if ".experts." in name:
            assert parameter.dim() == 3, name
            share = share // parameter.shape[0] * next(getattr(config, key) for key in CHOSEN if hasattr(config, key))
        total += share
    if config.tie_word_embeddings:  # the head is the embedding's parameter, and was left out with it
        total += config.vocab_size * config.hidden_size
    return total


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_every_family_counts_what_transformers_holds(tmp_path: Path, name: str) -> None:
    directory = tiny.make(tmp_path, name)
    assert weights_per_token(load_settings(directory)) == counted(directory)


@pytest.mark.parametrize(
    "name, billions",
    # The makers' numbers of active parameters per token, with embeddings or without: hence the tolerance.
    [("qwen3moe", 3.3), ("deepseek_v3", 37.0), ("deepseek_v2lite", 2.4), ("deepseek_v2", 21.0), ("kimi_k2", 32.0), ("mixtral", 12.9),
     ("hunyuan_a13b", 13.0)],
)  # fmt: skip
def test_published_active_parameters(tmp_path: Path, name: str, billions: float) -> None:
    (tmp_path / "config.json").write_text(json.dumps(json.loads(CONFIGS[name])))
    settings = load_settings(tmp_path)
    assert weights_per_token(settings) / 1e9 == pytest.approx(billions, rel=0.12)
    assert flops_per_token(settings, trained=True) == 6.0 * weights_per_token(settings)
    assert flops_per_token(settings, trained=False) == 4.0 * weights_per_token(settings)


def test_by_hand(tmp_path: Path) -> None:
    """Qwen2-MoE of tests/tiny.py: hidden 32, 8 heads and 4 key heads of 8, vocabulary 131, experts 4 x 24 of which 2, shared 40."""
    settings = load_settings(tiny.make(tmp_path, "qwen2_moe_mixed"))
    attention = 32 * 64 + 2 * 32 * 32 + 64 * 32  # query, key and value, output
    experts = 32 * 4 + 2 * 3 * 32 * 24 + 3 * 32 * 40 + 32  # router, two experts, the shared one, its gate
    dense = 3 * 32 * 48
    assert weights_per_token(settings) == 4 * attention + 3 * experts + dense + 32 * 131
