"""What configs of the decoders before Llama mean, and which configs stop the run."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from swift_mega.config import schema
from swift_mega.convert.source import Source
from swift_mega.errors import UserError
from swift_mega.models.family import family_of
from swift_mega.models.translate import load_settings
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.layout import parse_layout, plan_layout
from swift_mega.train.build import build_part
from swift_mega.train.preflight import check_run
from tests import tiny
from tests.models.test_families import write

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("falcon", dict(alibi=True), "alibi=True is not supported for family falcon; supported: False"),
    ("falcon_new", dict(parallel_attn=False), "parallel_attn=false with new_decoder_architecture=true is not supported"),
    ("falcon", dict(num_ln_in_parallel_attn=2), "num_ln_in_parallel_attn=2 with new_decoder_architecture=false is not supported"),
    ("falcon_new", dict(num_ln_in_parallel_attn=3), "num_ln_in_parallel_attn=3 .*; supported: 1, or 2 with"),
    ("falcon_new", dict(num_kv_heads=0), "num_kv_heads=0 is not a whole number of at least 1"),
    ("falcon", dict(activation="selu"), "activation='selu' is not supported for family falcon; supported: 'gelu', "),
    ("gpt_neox", dict(hidden_act="selu"), "hidden_act='selu' is not supported for family gpt_neox; supported: 'gelu', "),
    ("gpt2", dict(add_cross_attention=True), "add_cross_attention=True is not supported for family gpt2; supported: False"),
    ("gpt2", dict(activation_function="selu"), "activation_function='selu' is not supported"),
    ("gpt2", dict(n_positions=0), "n_positions=0 is not a whole number"),
    ("gpt2", dict(n_inner=-1), "n_inner=-1 is not a whole number"),
    ("bloom", dict(apply_residual_connection_post_layernorm=True), "apply_residual_connection_post_layernorm=True is not supp"),
    ("bloom", dict(n_inner=300), "n_inner=300 is not supported for family bloom; supported: None"),
    ("mpt", dict(expansion_ratio=2), "expansion_ratio=2 is not supported for family mpt; supported: 4"),
    ("mpt", dict(logit_scale="inv_sqrt_d_model"), "logit_scale='inv_sqrt_d_model' is not supported"),
    ("mpt", dict(attn_config={"alibi": False}), "attn_config.alibi=False is not supported; supported: True"),
    ("mpt", dict(attn_config={"qk_ln": True}), "attn_config.qk_ln=True is not supported; supported: False"),
    ("mpt", dict(attn_config={"alibi_bias_max": 16}), "attn_config.alibi_bias_max=16 is not supported"),
    ("mpt", dict(attn_config={"rope": True}), "does not know: attn_config.rope=True; they may change"),
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
    """One key head for all queries, one for each, or one per group."""
    found = {name: load_settings(write(tmp_path / name, name)) for name in ("falcon", "falcon_bias", "falcon_new")}
    assert {name: settings.shape.kv_heads for name, settings in found.items()} == {
        "falcon": 1,
        "falcon_bias": 8,
        "falcon_new": 4,
    }
    assert found["falcon_new"].heads.queries_per_group == 2


def test_an_example_has_no_more_tokens_than_there_are_positions(tmp_path):
    family, settings = family_of(write(tmp_path, "gpt2")), load_settings(tmp_path)
    assert (settings.positions, settings.longest, settings.rope) == (256, 256, None)
    run = schema.Run(data=schema.Data(max_length=257), tuner=schema.Full())
    with pytest.raises(
        UserError, match=r"data\.max_length=257: this model's positions are defined up to 256 tokens; set"
    ):
        check_run(run, family, settings, torch.float32)
    check_run(dataclasses.replace(run, data=schema.Data(max_length=256)), family, settings, torch.float32)


def marks(directory: Path, cpu: Any) -> dict[str, tuple[bool, int]]:
    """The attributes with which Megatron knows how the first layer's parameters and the embeddings are sharded."""
    parallel, world = parse_layout("tp2-sp")
    groups = parallel_groups.init(plan_layout(parallel, load_settings(directory).shape, world))
    part = build_part(schema.Run(), cpu, groups, dtype=torch.bfloat16, reads_inputs=False, source=Source(directory))
    found = {
        named.name.removeprefix("decoder.layers.0."): (
            named.parameter.tensor_model_parallel,
            named.parameter.partition_dim,
        )
        for named in part.named_parameters()
    }
    assert {named.parameter.dtype for named in part.named_parameters()} == {torch.bfloat16}
    parallel_groups.close()
    return found


def test_megatron_shards_transposed_weights_along_its_own_dim(ranks, cpu, tmp_path):
    """Stored [in, out], in Megatron [out, in]. The table of positions is whole on every rank, and has the model's dtype."""
    found = ranks(2, marks, tiny.make(tmp_path, "gpt2"), cpu)
    assert found["self_attention.linear_qkv.weight"] == found["mlp.linear_fc1.weight"] == (True, 0)
    assert found["self_attention.linear_proj.weight"] == found["mlp.linear_fc2.weight"] == (True, 1)
    assert found["embedding.position_embeddings.weight"] == (False, 0)
