"""What configs of the decoders before Llama mean, and which of them stop the run."""

from typing import Any

import pytest

from swift_mega.errors import UserError
from swift_mega.models.family import family_of, load_settings
from tests.models.test_families import write

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("falcon", dict(alibi=True), "alibi=True is not supported for family falcon; supported: False"),
    ("falcon_new", dict(parallel_attn=False), "parallel_attn=false with new_decoder_architecture=true is no model"),
    ("falcon", dict(num_ln_in_parallel_attn=2), "num_ln_in_parallel_attn=2 with new_decoder_architecture=false is no model"),
    ("falcon_new", dict(num_ln_in_parallel_attn=3), "num_ln_in_parallel_attn=3 .*; supported: 1, or 2 with"),
    ("falcon_new", dict(num_kv_heads=0), "num_kv_heads=0 is not a whole number of at least 1"),
    ("falcon", dict(activation="selu"), "activation='selu' is not supported for family falcon; supported: 'gelu', "),
    ("falcon", dict(hidden_dropout=0.2), "hidden_dropout=0.2 is not supported"),
    ("gpt_neox", dict(hidden_act="selu"), "hidden_act='selu' is not supported for family gpt_neox; supported: 'gelu', "),
    ("gpt_neox", dict(hidden_dropout=0.2), "hidden_dropout=0.2 is not supported"),
    ("gpt_neox", dict(head_dim=16), "does not know: head_dim=16"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_what_is_refused(tmp_path, name, changes, message):
    with pytest.raises(UserError, match=message):
        load_settings(write(tmp_path, name, **changes))


@pytest.mark.parametrize(
    ("name", "norm"),
    [("falcon", "input_layernorm"), ("falcon_bias", "input_layernorm"), ("falcon_one_norm", "input_layernorm"), ("falcon_new", "ln_attn")],
)  # fmt: skip
def test_falcons_norm_has_the_name_of_its_kind(tmp_path, name, norm):
    rule, _ = family_of(write(tmp_path, name)).match("decoder.layers.3.input_layernorm.weight")
    assert rule.parts == ("transformer.h.{i}." + norm + ".weight",)


def test_key_heads_of_falcon(tmp_path):
    """One for all queries, one for each, or groups."""
    found = {name: load_settings(write(tmp_path / name, name)) for name in ("falcon", "falcon_bias", "falcon_new")}
    assert {name: settings.shape.kv_heads for name, settings in found.items()} == {
        "falcon": 1, "falcon_bias": 8, "falcon_new": 4,
    }  # fmt: skip
    assert found["falcon_new"].heads.queries_per_group == 2
