"""A blueprint made in one process equals what the ranks of a layout have, by name and bit for bit; Megatron itself says what they have."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state as state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from swift_mega import api
from swift_mega.config import schema
from swift_mega.convert import blueprint as blueprints
from swift_mega.convert import blueprint_report
from swift_mega.convert.files.hf_files import Checkpoint
from swift_mega.convert.source import Source
from swift_mega.errors import UserError
from swift_mega.models.build import build
from swift_mega.models.family import family_of
from swift_mega.models.megatron_config import transformer_config
from swift_mega.models.translate import load_settings
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.layout import Layout, parse_layout, plan_layout
from swift_mega.train.build import build_part
from tests import tiny
from tests.models.test_published_configs import CONFIGS

LAYOUTS = {
    "llama_tied": ("single", "tp2-pp2", "pp2-vpp2", "dp2"),
    "qwen2_window": ("tp4", "pp4"),
    "glm4": ("tp2-pp2",),
    "qwen3_moe": ("tp2-ep2-etp1", "pp2-ep2", "ep4", "tp2-ep2-etp2"),
    "deepseek_v3_moe": ("tp2-pp2-ep2-etp1",),
    "gpt_oss": ("tp2-ep2-etp1", "pp2-ep2"),
    "granitemoeshared": ("tp2-ep2-etp2",),
    "ernie4_5_moe": ("tp2-pp2-ep2-etp1",),
    "qwen3_next": ("tp2-pp2-ep2-etp1", "tp4-etp1"),
    "qwen3_next_wide": ("tp2-ep2-etp2",),
    "llama_bias_8_2": ("tp4",),
    "phi3_4_1": ("tp2-pp2", "tp4"),
    "olmo2_4_1": ("tp4",),
}


def compare(directory: Path, layout: Layout, blueprint: blueprints.Blueprint, cpu: Any) -> int:
    """One rank: compares what its own loader read with what the blueprint says that it has."""
    groups = parallel_groups.init(layout)
    checkpoint = Checkpoint(directory)
    run = schema.Run(parallel=schema.Parallel())
    part = build_part(run, cpu, groups, dtype=torch.float32, reads_inputs=False, source=Source(directory))
    planned = {
        (share.slot.name, share.copy): share
        for share in blueprints.shards_of(blueprint, layout, layout.coordinate(dist.get_rank()))
    }
    named = {
        ("embedding.word_embeddings.weight" if one.copy else one.name, one.copy): one.parameter
        for one in part.named_parameters()
    }
    assert planned.keys() == named.keys(), planned.keys() ^ named.keys()
    for key, share in planned.items():
        assert share.shape == tuple(named[key].shape), key
        value = blueprints.value_of(checkpoint, share, blueprint.settings, torch.float32)
        assert torch.equal(value, named[key]), key
    parallel_groups.close()
    return len(named)


@pytest.mark.parametrize("family", LAYOUTS)
def test_ranks_hold_what_is_planned(ranks, cpu, tmp_path, family):
    directory = tiny.make(tmp_path, family)
    blueprint = ranks(1, blueprints.make_blueprint, Source(directory))
    for name in LAYOUTS[family]:
        parallel, world = parse_layout(name)
        layout = plan_layout(parallel, load_settings(directory).shape, world, training=False)
        assert ranks(world, compare, directory, layout, blueprint, cpu) > 5
        assert blueprints.check_tiling(blueprint, layout) == sum(
            torch.Size(entry.shape).numel() for entry in Checkpoint(directory).entries.values()
        )


def shapes_by_megatron(directory: Path, layout: Layout, rank: int) -> dict[str, tuple[int, ...]]:
    """What Megatron builds as rank `rank` of a large layout, on the meta device, with torch's fake process group in place of the other
    ranks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world)
    state.initialize_model_parallel(
        layout.tensor,
        layout.pipeline,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        # The fake store cannot make gloo groups.
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    settings = load_settings(directory)
    config = transformer_config(
        settings, layout, device=blueprints.META, dtype=torch.bfloat16, train=schema.Train(), given={}
    )
    with torch.device("meta"):
        part = build(
            family_of(directory), settings, layout, layout.coordinate(rank), device=blueprints.META, config=config
        )
    return {one.name: tuple(one.parameter.shape) for one in part.named_parameters()}


LARGE = {
    "deepseek_v3": (
        schema.Parallel(tensor=64, pipeline=16, expert=128, expert_tensor=1, pipeline_layout="4," * 13 + "3,3,3"), 2048,
        671_026_419_200, (0, 1000, 2047),
    ),
    "qwen3_next": (
        schema.Parallel(tensor=2, pipeline=8, expert=64, expert_tensor=1), 512, 79_674_391_296, (0, 511)
    ),
    "llama": (
        schema.Parallel(tensor=8, pipeline=16, first_stage_layers=7, last_stage_layers=7), 128, 405_853_388_800, (0, 9, 127)
    ),
    "llama of 8 key heads on 16 ranks": (
        schema.Parallel(tensor=16, pipeline=9), 144, 405_853_388_800, (0, 15, 22, 143)
    ),
    "llama of 8 key heads on 64 ranks": (schema.Parallel(tensor=64, pipeline=2), 128, 405_853_388_800, (0, 7, 63, 100)),
}  # fmt: skip
LLAMA_405B = dict(
    architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=128000, hidden_act="silu",
    hidden_size=16384, initializer_range=0.02, intermediate_size=53248, max_position_embeddings=131072, mlp_bias=False,
    model_type="llama", num_attention_heads=128, num_hidden_layers=126, num_key_value_heads=8, pretraining_tp=1,
    rms_norm_eps=1e-05, rope_theta=500000.0, tie_word_embeddings=False, vocab_size=128256,
    rope_scaling=dict(factor=8.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192,
                      rope_type="llama3"),
)  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_a_large_layout_of_a_published_model(ranks, tmp_path, name):
    """The counts add up, and the coordinates of ranks are Megatron's.

    DeepSeek-V3 on TP64 x PP16 x EP128, Qwen3-Next on 512 ranks, Llama-3.1-405B on TP8 x PP16, TP16 and TP64: the published counts are
    671B, 79B without embedding and head, and 405.85B.
    """
    parallel, world, parameters, looked_at = LARGE[name]
    config = LLAMA_405B if name.startswith("llama") else json.loads(CONFIGS[name])
    (tmp_path / "config.json").write_text(json.dumps(config))
    blueprint = ranks(1, blueprints.make_blueprint, Source(tmp_path))
    layout = plan_layout(parallel, blueprint.settings.shape, world, training=False)
    assert blueprints.check_tiling(blueprint, layout) == parameters
    for rank in looked_at:
        planned = {
            share.slot.name: share.shape for share in blueprints.shards_of(blueprint, layout, layout.coordinate(rank))
        }
        assert ranks(1, shapes_by_megatron, tmp_path, layout, rank) == planned


def test_the_plan_of_a_checkpoint(tmp_path):
    directory = tiny.make(tmp_path, "qwen3_moe")
    found = api.plan(source=str(directory), parallel=schema.Parallel(tensor=2, expert=2, expert_tensor=1, pipeline=2))
    sizes = {name: entry.bytes for name, entry in Checkpoint(directory).entries.items()}
    assert found.tensors == len(sizes) and found.source_bytes == sum(sizes.values()) and found.ranks == 4
    assert [stage.layers for stage in found.stages] == [(0, 1), (2, 3)]
    assert f"all {len(sizes)} tensors are found, none twice; the files have no other tensors" in found.table()
    assert json.loads(json.dumps(found.as_json()))["stages"][1]["stage"] == 1


def test_a_plan_without_weights(tmp_path):
    config = tiny.make(tmp_path / "model", "llama") / "config.json"
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "config.json").write_text(config.read_text())
    found = api.plan(source=str(tmp_path / "alone"))
    assert found.source_bytes is None and "no weights, from config.json alone" in found.table()


def test_a_plan_that_cannot_be(tmp_path):
    directory = tiny.make(tmp_path, "llama")
    with pytest.raises(UserError, match=r"parallel.tensor=3 does not divide"):
        api.plan(source=str(directory), parallel=schema.Parallel(tensor=3))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"nothing reads: .*states 3 layers, and layers up to 3 are there"):
        api.plan(source=str(directory))


def test_vocabulary_rows_have_a_likely_cause(tmp_path):
    directory = tiny.make(tmp_path, "llama")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 128}))
    with pytest.raises(
        UserError, match=r"the likely cause: .* has 3 rows more than vocab_size=128; set vocab_size=131 or use"
    ):
        api.plan(source=str(directory))


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (12_345_678, "12.35 MB"), (7.1e15, "7100.00 TB")]
)
def test_sizes(count, text):
    assert blueprint_report._size(count) == text
