"""A config.json in Megatron's terms: what each family reads from its fields, and that an unknown field is an error."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from swift_mega.errors import UserError
from swift_mega.models.family import families, family_of
from swift_mega.models.translate import load_settings
from tests import tiny


def write(directory: Path, name: str = "llama", **changes: Any) -> Path:
    """The config.json that transformers writes for tiny.FAMILIES[name], then `changes`; a field changed to `...` is removed."""
    from transformers import AutoConfig

    fields = tiny.fields_of(name)
    AutoConfig.for_model(fields.pop("model_type"), **fields).save_pretrained(directory)
    return change(directory, **changes)


def change(directory: Path, **changes: Any) -> Path:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            config.pop(key, None)
        else:
            config[key] = value
    path.write_text(json.dumps(config))
    return directory


COMMON = dict(
    num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=8, num_query_groups=4, kv_channels=8,
    normalization="RMSNorm", gated_linear_unit=True, add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip

# tiny family -> fields of TransformerConfig that must be there beside (or in place of) the common ones
EXPECTED: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_tied": dict(num_query_groups=8),
    "llama_bias": dict(add_bias_linear=True),
    "mistral": {},
    "qwen2": dict(add_qkv_bias=True),
    "qwen3": dict(qk_layernorm=True),
    "qwen3_moe": dict(
        qk_layernorm=True, num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=24, moe_router_pre_softmax=False,
        moe_layer_freq=[1, 1, 1, 1],
    ),
    "qwen3_moe_mixed": dict(moe_router_pre_softmax=True, moe_layer_freq=[1, 0, 1, 1]),
    "mixtral": dict(num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=48, moe_router_pre_softmax=False),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_config_in_megatrons_terms(tmp_path, name):
    found = load_settings(write(tmp_path, name)).megatron
    expected = {**COMMON, **EXPECTED[name]}
    assert {key: found.get(key) for key in expected} == expected
    assert math.isclose(found["layernorm_epsilon"], 1e-5 if name == "mixtral" else 1e-6)
    assert found["activation_func"] is torch.nn.functional.silu


PLAIN = [
    name
    for name in tiny.FAMILIES
    if name.startswith(("llama", "mistral", "qwen2", "qwen3", "mixtral"))
    and "qwen2_moe" not in name
    and "qwen3_next" not in name
]


@pytest.mark.parametrize("name", PLAIN)
def test_shape_and_heads(tmp_path, name):
    settings = load_settings(write(tmp_path, name))
    shape, moe = settings.shape, "moe" in name or name == "mixtral"
    assert (shape.layers, shape.heads, shape.hidden, shape.vocab) == (4, 8, 32, 131)
    assert shape.kv_heads == (8 if name == "llama_tied" else 4)
    assert settings.heads.queries_per_group == 8 // shape.kv_heads and settings.heads.head_dim == 8
    assert settings.tied == (name in ("llama_tied", "qwen2_window", "qwen3_tied"))
    assert shape.experts == (4 if moe else None) and any(settings.moe_layers) == moe


def test_sliding_windows_by_layer(tmp_path):
    """Mistral: all layers. Qwen2: the layers from max_window_layers on. None where use_sliding_window is false."""
    assert load_settings(write(tmp_path / "a", "mistral")).windows == (6, 6, 6, 6)
    assert load_settings(write(tmp_path / "b", "mistral", sliding_window=None)).windows == (None,) * 4
    assert load_settings(write(tmp_path / "c", "qwen2_window")).windows == (None, None, 5, 5)
    assert load_settings(write(tmp_path / "d", "qwen2", sliding_window=5)).windows == (None,) * 4
    assert load_settings(write(tmp_path / "e", "llama")).windows == (None,) * 4
    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    changed = write(tmp_path / "f", "qwen3", use_sliding_window=True, sliding_window=7, layer_types=types)
    assert load_settings(changed).windows == (7, None, None, 7)


def test_head_dim_defaults_to_hidden_over_heads(tmp_path):
    assert load_settings(write(tmp_path / "a", head_dim=...)).heads.head_dim == 4
    assert load_settings(write(tmp_path / "b", head_dim=16)).heads.head_dim == 16


# --- rotary frequencies


def plain(theta: float = 10000.0, dim: int = 8) -> list[float]:
    return [theta ** (-2 * i / dim) for i in range(dim // 2)]


def close(found: tuple[float, ...], expected: list[float]) -> None:
    assert found == pytest.approx(expected, rel=1e-6)


def test_rope_default_and_old_style_fields(tmp_path):
    """theta is beside rope_scaling in files of transformers 4, and inside rope_parameters in those of 5."""
    new = load_settings(write(tmp_path / "a", rope_parameters={"rope_type": "default", "rope_theta": 5e5}))
    close(new.rope.inverse_frequencies, plain(5e5))
    old = load_settings(write(tmp_path / "b", rope_parameters=..., rope_theta=5e5, rope_scaling=None))
    close(old.rope.inverse_frequencies, plain(5e5))
    assert new.rope.scale == old.rope.scale == 1.0 and new.longest is None


def test_rope_linear(tmp_path):
    close(load_settings(write(tmp_path, "llama_linear")).rope.inverse_frequencies, [f / 2 for f in plain()])


def test_rope_linear_with_the_old_word_for_type(tmp_path):
    changed = write(tmp_path, rope_parameters=..., rope_theta=1e4, rope_scaling={"type": "linear", "factor": 4.0})
    close(load_settings(changed).rope.inverse_frequencies, [f / 4 for f in plain()])


def test_rope_dynamic_bounds_the_length(tmp_path):
    """Within the trained length dynamic scaling changes nothing. Beyond it, there is no single right frequency."""
    settings = load_settings(write(tmp_path, "llama_dynamic"))
    close(settings.rope.inverse_frequencies, plain())
    assert settings.longest == 256


def test_rope_llama3(tmp_path):
    """The piecewise rule of Llama 3.1: long wavelengths are divided by the factor, short ones kept, and those between interpolated."""
    expected = []
    for f in plain():
        wave = 2 * math.pi / f
        if wave < 64 / 4.0:
            expected.append(f)
        elif wave > 64 / 1.0:
            expected.append(f / 4.0)
        else:
            smooth = (64 / wave - 1.0) / (4.0 - 1.0)
            expected.append((1 - smooth) * f / 4.0 + smooth * f)
    close(load_settings(write(tmp_path, "llama_rope3")).rope.inverse_frequencies, expected)


def test_rope_yarn(tmp_path):
    """Peng et al. 2023 (arXiv:2309.00071): ramp between 32 and 1 rotations over the trained length; scale 0.1 ln(s) + 1."""
    rope = load_settings(write(tmp_path, "llama_yarn")).rope

    def corrected(rotations: float) -> float:
        return 8 * math.log(64 / (rotations * 2 * math.pi)) / (2 * math.log(10000.0))

    low, high = max(math.floor(corrected(32.0)), 0), min(math.ceil(corrected(1.0)), 7)
    ramp = [min(max((i - low) / (high - low), 0), 1) for i in range(4)]
    close(rope.inverse_frequencies, [f * (1 - r) + f / 4 * r for f, r in zip(plain(), ramp, strict=True)])
    assert rope.scale == pytest.approx(0.1 * math.log(4.0) + 1)


@pytest.mark.parametrize("kind", ["proportional", "mrope", "unheard_of"])
def test_rope_of_another_kind_is_refused(tmp_path, kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    with pytest.raises(UserError, match=rf"(?s){kind}.*(supported: default|correct the field)"):
        load_settings(write(tmp_path, rope_parameters=rope))


# --- nothing silent


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", dict(embed_dim=4, num_heads=2), "family llama does not know: embed_dim=4, num_heads=2; transformers reads them"),
        ("llama", dict(attention_dropout=1.5), "attention_dropout=1.5 is not a dropout rate"),
        ("llama", dict(attention_dropout="0.1"), "attention_dropout='0.1' is not a dropout rate"),
        ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
        ("llama", dict(quantization_config={"quant_method": "fp8"}), "quantization_config="),
        ("qwen3_moe", dict(shared_expert_intermediate_size=8), "shared_expert_intermediate_size=8"),
        ("llama", dict(hidden_act="gelu"), "hidden_act='gelu' is not supported for family llama; supported: 'silu', 'swish'"),
        ("mistral", dict(hidden_act="relu2"), "hidden_act='relu2' is not supported"),
        ("llama", dict(rope_interleaved=True), "rope_interleaved=True is not supported"),
        ("qwen2", dict(use_mrope=True), "use_mrope=True is not supported"),
        ("qwen3", dict(attention_bias=True), "attention_bias=True is not supported for family qwen3; supported: False"),
        ("mixtral", dict(router_jitter_noise=0.1), "router_jitter_noise=0.1 is not supported"),
        ("qwen3", dict(layer_types=["chunked_attention"] * 4), "chunked_attention"),
        ("llama", dict(hidden_size="thirty"), "hidden_size"),
        ("llama", dict(hidden_size=None), "hidden_size"),
        ("llama", dict(num_key_value_heads=3), "3"),
        ("llama", dict(num_attention_heads=0), "num_attention_heads"),
        ("llama", dict(num_hidden_layers=0), "num_hidden_layers"),
        ("llama", dict(vocab_size=-1), "vocab_size"),
        ("llama", dict(head_dim=7), "head_dim"),
        ("qwen3_moe", dict(num_experts_per_tok=5), "num_experts_per_tok"),
        ("llama", dict(model_type="t5"), "model_type 't5' of .* is not supported; supported: .*llama"),
        ("llama", dict(model_type="unheard_of"), "model_type 'unheard_of' of .* is not supported; supported: "),
        ("llama", dict(model_type=...), "has no model_type; copy it"),
        ("llama", dict(model_type=3), "has no model_type; copy it"),
    ],
)  # fmt: skip
def test_what_is_not_understood_stops_the_run(tmp_path, name, changes, message):
    """One line that names the field with its value, and never a traceback of transformers."""
    with pytest.raises(UserError, match=message):
        load_settings(write(tmp_path, name, **changes))


def test_fields_that_change_nothing_are_accepted(tmp_path):
    changed = write(
        tmp_path,
        use_cache=False,
        torch_dtype="float16",
        _name_or_path="x",
        pad_token_id=3,
        auto_map={},
        pretraining_tp=1,
    )
    assert load_settings(changed).shape.layers == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON .* copy it from the original"),
        (b"", "is not valid JSON"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (b"[1]", "contains a list, not an object; copy it"),
        (b"null", "contains a NoneType, not an object; copy it"),
        (b"[" * 100_000, "is not valid JSON"),
    ],
)
def test_a_damaged_config(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_settings(tmp_path)


def test_no_config_and_no_directory(tmp_path):
    with pytest.raises(UserError, match=r"has no config.json, so it is not a Hugging Face model; give the directory"):
        load_settings(tmp_path)
    with pytest.raises(UserError, match="absent does not exist; give the path of a Hugging Face checkpoint"):
        load_settings(tmp_path / "absent")
    (tmp_path / "file").write_text("{}")
    with pytest.raises(UserError, match="file does not exist"):
        load_settings(tmp_path / "file")


# --- rules


def test_the_folder_is_the_registry():
    tried = {fields.get("written_as", fields["model_type"]) for fields in tiny.FAMILIES.values()}
    assert tried == set(families())  # every family is tested


def test_a_rule_names_its_tensors(tmp_path):
    family = family_of(write(tmp_path, "qwen3_moe"))
    rule, numbers = family.match("decoder.layers.12.mlp.experts.local_experts.7.linear_fc1.weight")
    assert numbers == {"i": 12, "e": 7}
    assert [part.format(**numbers) for part in rule.parts] == [
        "model.layers.12.mlp.experts.7.gate_proj.weight",
        "model.layers.12.mlp.experts.7.up_proj.weight",
    ]
    rule, numbers = family.match("decoder.layers.0.mlp.linear_fc2.weight")
    assert [part.format(**numbers) for part in rule.parts] == ["model.layers.0.mlp.down_proj.weight"]


def test_a_parameter_without_a_rule_is_named(tmp_path):
    with pytest.raises(
        UserError, match=r"no rule of family llama covers Megatron's parameter decoder\.layers\.0\.mlp\.router"
    ):
        family_of(write(tmp_path)).match("decoder.layers.0.mlp.router.weight")


@pytest.mark.parametrize("hf_type", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral"])
def test_rules_do_not_overlap(hf_type):
    """One rule per Megatron name, and no Hugging Face tensor in two rules, because only the first match is used."""
    rules = families()[hf_type].rules
    names = [rule.megatron for rule in rules]
    parts = [part for rule in rules for part in rule.parts]
    assert len(set(names)) == len(names) and len(set(parts)) == len(parts)
