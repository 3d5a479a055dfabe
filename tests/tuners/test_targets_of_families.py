"""Linears that get an adapter in every family, against the tensors on disk; and stacked experts, against PEFT."""

import re
from pathlib import Path

import pytest

from swift_mega.convert.files.hf_files import Checkpoint
from swift_mega.errors import UserError
from swift_mega.models.family import family_of
from swift_mega.models.translate import load_settings
from swift_mega.tuners.targets import check_targets, modules_of
from tests import tiny

NO_LINEAR = re.compile(
    r".*(embed\w*|wte|wpe|lm_head|\.gate|\.gate\.wg|\.router|\.router\.layer|shared_expert_gate|\.[qk]_norm)"
)
"""Modules with a matrix that PEFT's all-linear does not include: embeddings, heads, routers, norms with a weight for each head."""
STACKED = ("gpt_oss", "gpt_oss_tied", "granitemoe", "granitemoeshared")


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_all_linear_is_every_matrix_on_disk(tmp_path: Path, name: str) -> None:
    """No linear that the model does not have (only another size of the family, say), and none left out."""
    directory = tiny.make(tmp_path, name)
    matrices = {
        key.removesuffix(".weight")
        for key, entry in Checkpoint(directory).entries.items()
        if len(entry.shape) == 2 and key.endswith(".weight")
    }
    expected = {module for module in matrices if not NO_LINEAR.fullmatch(module)}
    assert modules_of(family_of(directory), load_settings(directory)) == expected


@pytest.mark.parametrize("name", STACKED)
def test_all_linear_is_what_peft_chooses(tmp_path: Path, name: str) -> None:
    """For PEFT, stacked experts are one tensor and not a linear."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    directory = tiny.make(tmp_path, name)
    model = AutoModelForCausalLM.from_pretrained(directory)
    peft = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM"))
    chosen = {
        key.removeprefix("base_model.model.").split(".lora_A")[0]
        for key, _ in peft.named_parameters()
        if "lora_A" in key
    }
    assert chosen == modules_of(family_of(directory), load_settings(directory))


@pytest.mark.parametrize(
    "name, target",
    [
        ("gpt_oss", "gate_up_proj"),
        ("gpt_oss", "down_proj[0]"),
        ("granitemoe", "input_linear"),
        ("deepseek_v2", "q_proj"),
        ("deepseek_v2", "k_proj"),
        ("deepseek_v2_lite", "q_a_proj"),
        ("qwen3_next", "conv1d"),
        ("qwen3_next", "A_log"),
        ("qwen3_next_dense", "shared_expert.up_proj"),
        ("hunyuan_moe", "wg"),
        ("ernie4_5_moe_interval", "shared_experts.up_proj"),
    ],
)
def test_what_the_model_does_not_have_is_no_target(tmp_path: Path, name: str, target: str) -> None:
    directory = tiny.make(tmp_path, name)
    with pytest.raises(UserError, match="names no linear of this model; choose all-linear, or from"):
        check_targets(family_of(directory), load_settings(directory), (target,))
