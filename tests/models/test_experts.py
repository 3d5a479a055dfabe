"""What families with experts refuse, each in one error with the value, before anything is built."""

import json
from pathlib import Path
from typing import Any

import pytest

from swift_mega.convert.check import carried_of
from swift_mega.errors import UserError
from swift_mega.models.modules.experts import check_biases
from swift_mega.models.translate import load_settings
from tests import tiny
from tests.models.test_published_configs import CONFIGS, write


def test_experts_with_biases_are_not_cut(tmp_path: Path) -> None:
    settings = load_settings(tiny.make(tmp_path, "gpt_oss"))
    check_biases(settings, 1)
    with pytest.raises(UserError, match=r"parallel\.expert_tensor=2: .* set parallel\.expert_tensor=1"):
        check_biases(settings, 2)


@pytest.mark.parametrize("name", ["mixtral", "llama_bias"])
def test_others_are(tmp_path: Path, name: str) -> None:
    check_biases(load_settings(tiny.make(tmp_path, name)), 2)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "deepseek_v2",
        {"topk_method": "noaux_tc"},
        "topk_method='noaux_tc' .* supported: 'greedy', 'group_limited_greedy'",
    ),
    ("deepseek_v2", {"n_group": None}, "with n_group=None, topk_group=3; set both"),
    ("deepseek_v2", {"n_group": 7}, "160 experts are split into 7 groups"),
    ("deepseek_v2", {"topk_group": 9}, "of 9 groups"),
    ("deepseek_v2", {"n_group": 0}, "n_group=0 is not a whole number"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=True"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
    ("deepseek_v2", {"n_shared_experts": None}, "n_shared_experts=None is not a whole number"),
    ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
    ("kimi_k2", {"topk_method": "greedy"}, "topk_method='greedy'"),
    ("glm45air", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
    ("glm45air", {"num_experts_per_tok": 129}, "129 experts of 1 groups"),
    ("dots1", {"use_sliding_window": True}, "use_sliding_window=True"),
    ("dots1", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
    ("minimax_m2", {"attn_type_list": [1, 0]}, r"attn_type_list has \[0, 1\]; supported: 1"),
    ("minimax_m2", {"use_qk_norm": False}, "use_qk_norm=False"),
    ("minimax_m2", {"qk_norm_type": "per_head"}, "qk_norm_type='per_head'"),
    ("minimax_m2", {"shared_intermediate_size": 8}, "shared_intermediate_size=8"),
    ("minimax_m2", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
    ("ernie45_21b", {"use_bias": True}, "use_bias=True"),
    ("ernie45_21b", {"moe_gate": "hash"}, "moe_gate='hash'"),
    ("ernie45_21b", {"moe_layer_interval": 0}, "moe_layer_interval=0 is not a whole number"),
    ("ernie45_21b", {"moe_k": 65}, "num_experts_per_tok=65 is more than the 64 experts"),
    ("qwen3coder", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size=8"),
    ("granite3_1b", {"mlp_bias": True}, "mlp_bias=True"),
    (
        "hunyuan_a13b",
        {"moe_topk": [8] * 31 + [4]},
        r"moe_topk=\[8, .* 4\] is not the same number for each of 32 layers",
    ),
    ("hunyuan_a13b", {"moe_topk": [8] * 31}, "moe_topk=.* is not the same number for each of 32 layers"),
    ("hunyuan_a13b", {"moe_topk": 65}, "moe_topk=65 of the 64 experts"),
    ("hunyuan_a13b", {"moe_topk": 0}, "moe_topk=0 of the 64 experts"),
    (
        "hunyuan_a13b",
        {"moe_intermediate_size": [1536] * 32},
        "moe_intermediate_size=1536, but transformers supports only 3072",
    ),
    ("hunyuan_a13b", {"num_shared_expert": 2}, "num_shared_expert=2, but transformers supports only 1"),
    ("hunyuan_a13b", {"num_experts": [64] * 32}, r"num_experts=\[64, .* is not a whole number"),
    ("hunyuan_a13b", {"use_mixed_mlp_moe": False}, "use_mixed_mlp_moe=False"),
    ("hunyuan_a13b", {"moe_layer_num_skipped": 1}, "moe_layer_num_skipped=1"),
    ("hunyuan_a13b", {"norm_topk_prob": False}, "norm_topk_prob=False"),
    ("qwen3_next", {"layer_types": ["sliding_attention"] * 48}, r"layer_types has \['sliding_attention'\]; supported"),
    ("qwen3_next", {"linear_num_value_heads": 24}, "linear_num_key_heads=16 does not divide linear_num_value_heads=24"),
    ("qwen3_next", {"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim=0 is not a whole number"),
    ("qwen3_next", {"full_attention_interval": 0}, "full_attention_interval=0 is not a whole number"),
    ("qwen3_next", {"num_experts": 0}, "num_experts=0 is not a whole number"),
    ("qwen3_next", {"use_sliding_window": True}, "use_sliding_window=True"),
    ("qwen3_next", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("gpt_oss", {"swiglu_alpha": 1.5}, "swiglu_alpha=1.5"),
    ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
]


@pytest.mark.parametrize(
    "name, changes, said", REFUSED, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
def test_what_changes_the_computation_is_refused(tmp_path: Path, name: str, changes: dict[str, Any], said: str) -> None:
    assert name in CONFIGS
    load_settings(write(tmp_path, name))
    with pytest.raises(UserError, match=said):
        load_settings(write(tmp_path, name, **changes))


def test_kimi_k2_is_deepseek_v3_by_another_name(tmp_path: Path) -> None:
    """The same fields give the same settings. The file is only read, never written."""
    before = write(tmp_path, "kimi_k2").joinpath("config.json").read_bytes()
    ours = load_settings(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before
    assert json.loads(before)["model_type"] == "kimi_k2"
    assert load_settings(write(tmp_path, "kimi_k2", model_type="deepseek_v3")) == ours


@pytest.mark.parametrize("name, layer", [("deepseek_v3", 61), ("glm45air", 46), ("kimi_k2", None), ("dots1", None)])
def test_a_layer_of_multi_token_prediction_is_kept(tmp_path: Path, name: str, layer: int | None) -> None:
    """As many layers after the last one as the config says are carried, and no other tensor."""
    settings = load_settings(write(tmp_path, name))
    names = [f"model.layers.{number}.eh_proj.weight" for number in range(settings.shape.layers + 3)]
    assert list(carried_of(settings, names)) == ([] if layer is None else [f"model.layers.{layer}.eh_proj.weight"])
