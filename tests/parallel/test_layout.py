"""Layouts against Megatron's own arithmetic, and every refused layout with its remedy."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import parallel_state
from megatron.core.parallel_state import RankGenerator
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from swift_mega.config.schema import Parallel
from swift_mega.errors import UserError
from swift_mega.parallel.layout import (
    Layout,
    ModelShape,
    check_microbatches,
    parse_layout,
    plan_layout,
    ranks_needed,
)
from swift_mega.parallel.mesh import Mesh
from swift_mega.parallel.pipeline import balanced, parse_pipeline_layout

SMOLLM = ModelShape(layers=30, heads=9, kv_heads=3, hidden=576, ffn=1536, vocab=49152)
DENSE = ModelShape(layers=8, heads=8, kv_heads=4, hidden=64, ffn=96, vocab=100)
MOE = ModelShape(layers=4, heads=8, kv_heads=4, hidden=64, ffn=None, vocab=100, experts=4, expert_ffn=96)

sizes = st.sampled_from([1, 2, 3, 4])


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any layout that Megatron allows, up to a few hundred ranks."""
    tensor, context, pipeline, expert_tensor, expert = (draw(sizes) for _ in range(5))
    virtual = draw(st.sampled_from([1, 2, 3])) if pipeline > 1 else 1
    world = pipeline * tensor * context * expert_tensor * expert * draw(st.sampled_from([1, 2]))
    layers = draw(st.lists(st.integers(1, 5), min_size=pipeline * virtual, max_size=pipeline * virtual))
    return Layout(
        world=world,
        layers=tuple(layers),
        tensor=tensor,
        pipeline=pipeline,
        virtual=virtual,
        context=context,
        mesh=Mesh(1, context),
        expert=expert,
        expert_tensor=expert_tensor,
    )


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_coordinates_are_megatrons(layout):
    """Each coordinate is the rank's index in the group that Megatron's rank generators make for that axis."""
    order = "tp-cp-ep-dp-pp"
    dense = RankGenerator(tp=layout.tensor, ep=1, dp=layout.data, pp=layout.pipeline, cp=layout.context, order=order)
    expert = RankGenerator(
        tp=layout.expert_tensor, ep=layout.expert, dp=layout.expert_data, pp=layout.pipeline, cp=1, order=order
    )
    axes = {
        "tensor": dense.get_ranks("tp"),
        "context": dense.get_ranks("cp"),
        "data": dense.get_ranks("dp"),
        "pipeline": dense.get_ranks("pp"),
        "expert_tensor": expert.get_ranks("tp"),
        "expert": expert.get_ranks("ep"),
        "expert_data": expert.get_ranks("dp"),
    }
    coordinates = [layout.coordinate(rank) for rank in range(layout.world)]
    for axis, groups in axes.items():
        places = {rank: place for group in groups for place, rank in enumerate(group)}
        assert [getattr(each, axis) for each in coordinates] == [places[rank] for rank in range(layout.world)], axis
    assert expert.get_ranks("pp") == axes["pipeline"]


@pytest.mark.filterwarnings("ignore:full scope is deprecated", "ignore:When using expert parallelism and tensor")
@settings(max_examples=60, deadline=None)
@given(layouts())
def test_layers_are_what_megatron_builds(layout):
    """With `settings`, Megatron's own functions give each chunk the same layers as ours, even or not, interleaved or not."""
    heads = 12  # a multiple of every tensor size drawn
    moe: dict[str, Any] = {"num_moe_experts": 12, "moe_ffn_hidden_size": 96} if layout.expert > 1 else {}
    config = TransformerConfig(
        hidden_size=96,
        num_attention_heads=heads,
        add_bias_linear=False,
        pipeline_dtype=torch.float32,
        **layout.settings(),
        **moe,
    )
    try:
        parallel_state.set_virtual_pipeline_model_parallel_world_size(layout.virtual if layout.virtual > 1 else None)
        for stage in range(layout.pipeline):
            parallel_state.set_pipeline_model_parallel_rank(stage)
            for virtual in range(layout.virtual):
                chunk = virtual if layout.virtual > 1 else None
                first = get_transformer_layer_offset(config, vp_stage=chunk, pp_rank=stage)
                count = get_num_layers_to_build(config, vp_stage=chunk, pp_rank=stage)
                assert layout.layers_of(stage, virtual) == range(first, first + count)
    finally:
        parallel_state.set_virtual_pipeline_model_parallel_world_size(None)
        parallel_state.set_pipeline_model_parallel_rank(None)


@given(layouts())
def test_chunks_cover_the_model_once(layout):
    held = [layer for v in range(layout.virtual) for s in range(layout.pipeline) for layer in layout.layers_of(s, v)]
    assert held == list(range(sum(layout.layers)))


def test_even_layers_need_no_settings_of_their_own():
    assert plan_layout(Parallel(pipeline=2, virtual_pipeline=2), DENSE, 2).pipeline_settings() == {}


def test_uneven_layers_become_megatrons_list():
    settings = Layout(world=2, layers=(1, 2), pipeline=2).pipeline_settings()
    assert settings == {"pipeline_model_parallel_layout": [["embedding", "decoder"], ["decoder", "decoder", "loss"]]}


@pytest.mark.parametrize(
    ("parallel", "layers"),
    [
        (Parallel(pipeline=2), (15, 15)),
        (Parallel(pipeline=5, virtual_pipeline=2), (3,) * 10),
        (Parallel(pipeline=4, first_stage_layers=7, last_stage_layers=7), (7, 8, 8, 7)),
        (Parallel(pipeline=3, first_stage_layers=8), (8, 11, 11)),
        (Parallel(pipeline=4, last_stage_layers=6), (8, 8, 8, 6)),
        (Parallel(pipeline=2, first_stage_layers=14, last_stage_layers=16), (14, 16)),
        (Parallel(pipeline=2, virtual_pipeline=2, first_stage_layers=14), (7, 8, 7, 8)),
        (Parallel(pipeline=4, pipeline_layout="7, 8,8,7"), (7, 8, 8, 7)),
        (Parallel(pipeline=2, virtual_pipeline=2, pipeline_layout="7,8,8,7"), (7, 8, 8, 7)),
        (Parallel(pipeline=4, pipeline_layout="Et*7|t*8|t*8|t*7L"), (7, 8, 8, 7)),
        (Parallel(pipeline=4, pipeline_layout="Et*7,|(t*8|)*2,t*7L"), (7, 8, 8, 7)),
    ],
)
def test_layers_of_chunks(parallel, layers):
    """Layers of every chunk in model order, computed by hand for 30 layers."""
    assert plan_layout(parallel, SMOLLM, parallel.pipeline).layers == layers


@pytest.mark.parametrize("text", ["Ett|(tt|)*3tL", "Ettt|tt|t|tttL", "E(t|t)*2tL", "Et*12|t*3|tL"])
def test_pipeline_layout_is_read_as_megatron_reads_it(text):
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    chunks = PipelineParallelLayerLayout.parse_str_to_list(text)
    assert parse_pipeline_layout(text) == tuple(chunk.count(LayerType.decoder) for chunk in chunks)


@given(st.integers(1, 200), st.integers(1, 64))
def test_balanced(layers, chunks):
    counts = balanced(layers, chunks)
    assert sum(counts) == layers and len(counts) == chunks and max(counts) - min(counts) <= 1


REFUSED: list[tuple[Parallel, ModelShape, int, str, str]] = [
    (Parallel(tensor=0), DENSE, 2, "parallel.tensor=0 is not a number of ranks", "parallel.tensor=1"),
    (Parallel(), DENSE, 0, "0 ranks cannot run a model", ""),
    (Parallel(tensor=2, pipeline=2), DENSE, 6, "start 4 or 8 ranks", "parallel.pipeline=1"),
    (Parallel(tensor=2), DENSE, 1, "1 rank cannot be split .* = 2 ranks: start 2 ranks", "parallel.tensor=1"),
    (Parallel(tensor=2), SMOLLM, 2, "tensor=2 does not divide the model's 9 attention heads", "parallel.pipeline=2"),
    (Parallel(tensor=6), replace(DENSE, heads=12), 6, "6 is neither a divisor nor .* 4 key-value", "parallel.tensor=2"),
    (
        Parallel(tensor=8),
        replace(DENSE, heads=12),
        8,
        "8 does not divide the model's 12 attention",
        "parallel.tensor=4",
    ),
    (
        Parallel(tensor=8),
        replace(DENSE, head_dim=5),
        8,
        "does not divide the 20 rows of the .* 4 key",
        "parallel.tensor=4",
    ),
    (
        Parallel(tensor=8),
        replace(DENSE, no_key_head_sharing="has its own norm, which cannot be split over tensor ranks"),
        8,
        "8 is more than the model's 4 key-value heads, each of which has its own norm",
        "parallel.tensor=4",
    ),
    (Parallel(tensor=4), replace(DENSE, ffn=98), 4, "does not divide the model's 98 MLP columns", "parallel.tensor=2"),
    (
        Parallel(tensor=4),
        replace(DENSE, shared_counts=(("key heads of linear attention", 6),)),
        4,
        "does not divide the model's 6 key heads of linear attention",
        "parallel.tensor=2",
    ),
    (Parallel(sequence=True), DENSE, 1, "parallel.tensor=1 has none", "parallel.sequence=false"),
    (Parallel(expert=2), DENSE, 2, "parallel.expert=2 splits experts, and this model has none", "parallel.expert=1"),
    (Parallel(expert_tensor=2), DENSE, 2, "parallel.expert_tensor=2 splits experts", "parallel.expert_tensor=null"),
    (Parallel(tensor=2, expert_tensor=1), DENSE, 2, "expert_tensor=1 splits experts", "parallel.expert_tensor=null"),
    (Parallel(expert=3), MOE, 3, "expert=3 does not divide the model's 4 experts", "parallel.expert=1"),
    (Parallel(expert_tensor=5), MOE, 5, "does not divide the 96 columns of an expert's MLP", "parallel.expert_tensor="),
    (Parallel(tensor=2, expert=4, sequence=True), MOE, 4, "expert=4 .* start 8 ranks", "parallel.expert_tensor=1"),
    (Parallel(expert=4), MOE, 6, "= 4 ranks .*: start 4 or 8 ranks", "parallel.expert="),
    (Parallel(tensor=2), MOE, 2, "4 experts needs parallel.sequence=true", "parallel.sequence=true"),
    (Parallel(virtual_pipeline=2), DENSE, 1, "parallel.pipeline=1", "parallel.virtual_pipeline=1"),
    (Parallel(pipeline=16), DENSE, 16, "16 chunks are more than the model's 8 layers", "parallel.pipeline=8"),
    (Parallel(pipeline=3), DENSE, 3, "stage 0 would have 2.66667 layers in 1 chunk;", "pipeline_layout=3,3,2"),
    (Parallel(pipeline=2, virtual_pipeline=3), DENSE, 2, "4 layers in 3 chunks", "pipeline_layout=1,1,2,2,1,1"),
    (Parallel(first_stage_layers=3), DENSE, 1, "need several stages", "first_stage_layers=null"),
    (
        Parallel(pipeline=2, first_stage_layers=9),
        DENSE,
        2,
        "leave -1 of the model's 8 layers",
        "first_stage_layers=null",
    ),
    (Parallel(pipeline=2, first_stage_layers=8), DENSE, 2, "leave 0 of .* for the 1 other", "first_stage_layers=null"),
    (Parallel(pipeline=2, last_stage_layers=0), DENSE, 2, r"last_stage_layers=0 leave 8", "last_stage_layers=null"),
    (Parallel(pipeline=2, first_stage_layers=3, last_stage_layers=3), DENSE, 2, "leave 2 of", "stage_layers=null"),
    (Parallel(pipeline=4, first_stage_layers=3), DENSE, 4, "leave 5 layers, which 3 other stages", "stage_layers=null"),
    (
        Parallel(pipeline=2, virtual_pipeline=2, first_stage_layers=3),
        DENSE,
        2,
        "stage 0 would have 3 layers in 2 chunks",
        "parallel.virtual_pipeline=1",
    ),
    (
        Parallel(pipeline=2, pipeline_layout="4,4", first_stage_layers=4),
        DENSE,
        2,
        "already gives what first_stage_layers",
        "first_stage_layers=null",
    ),
    (Parallel(pipeline=2, pipeline_layout="4,2,2"), DENSE, 2, "has 3 chunks, but", "pipeline_layout=null"),
    (
        Parallel(pipeline=2, pipeline_layout="4,5"),
        DENSE,
        2,
        "places 9 layers, but the model has 8",
        "pipeline_layout=null",
    ),
    (
        Parallel(pipeline=3, pipeline_layout="4,0,4"),
        DENSE,
        3,
        "leaves chunk 1 without a layer",
        "pipeline_layout=3,3,2",
    ),
    (Parallel(pipeline=2, pipeline_layout="Ett|ttmL"), DENSE, 2, "multi-token prediction", "pipeline_layout=null"),
    (Parallel(pipeline=2, pipeline_layout="Etx|tL"), DENSE, 2, "has 'x', which is neither", "pipeline_layout=null"),
    (Parallel(pipeline=2, pipeline_layout="t*4|t*4L"), DENSE, 2, "must start with its one E", "pipeline_layout=null"),
    (Parallel(pipeline=2, pipeline_layout=""), DENSE, 2, "must start with its one E", "pipeline_layout=null"),
    (Parallel(overlap_grad_reduce=True), DENSE, 1, "there is only one data rank", "overlap_grad_reduce=false"),
    (
        Parallel(overlap_param_gather=True),
        DENSE,
        2,
        "overlap_param_gather=true needs parallel.distributed_optimizer=true",
        "overlap_param_gather=false",
    ),
]


@pytest.mark.parametrize(("parallel", "shape", "world", "reason", "remedy"), REFUSED)
def test_a_layout_that_cannot_work_is_refused_with_a_remedy(parallel, shape, world, reason, remedy):
    """One error: what is wrong, and up to four changes, of which this one works."""
    with pytest.raises(UserError, match=reason) as error:
        plan_layout(parallel, shape, world)
    message = str(error.value)
    assert remedy in message
    assert message.count(" | ") <= 3 and "\n" not in message


@given(
    st.builds(
        Parallel,
        tensor=st.integers(0, 9),
        pipeline=st.integers(0, 9),
        virtual_pipeline=st.integers(1, 4),
        expert=st.integers(1, 8),
        expert_tensor=st.none() | st.integers(1, 4),
        sequence=st.booleans(),
        overlap_grad_reduce=st.booleans(),
        overlap_param_gather=st.booleans(),
        first_stage_layers=st.none() | st.integers(-1, 9),
        pipeline_layout=st.none() | st.sampled_from(["4,4", "x", "Et|tL"]),
    ),
    st.sampled_from([SMOLLM, DENSE, MOE]),
    st.integers(0, 24),
)
@settings(max_examples=300, deadline=None)
def test_any_settings_give_a_layout_or_suggestions_that_work(parallel, shape, world):
    """The result is a Layout or a UserError, and each suggested change gives a Layout."""
    try:
        layout = plan_layout(parallel, shape, world)
        assert sum(layout.layers) == shape.layers and layout.world == world
    except UserError as error:
        _, _, near = str(error).partition("these would work: ")
        for change in near.split(" | ") if near else []:
            plan_layout(_changed(parallel, change), shape, world)


def _changed(parallel: Parallel, change: str) -> Parallel:
    words = {"null": None, "true": True, "false": False}
    values: dict[str, Any] = {}
    for assignment in change.split():
        name, _, value = assignment.removeprefix("parallel.").partition("=")
        number = int(value) if value.isdecimal() and name != "pipeline_layout" else value
        values[name] = words.get(value, number)
    return replace(parallel, **values)


def test_experts_under_tensor_parallelism_may_be_run_without_training():
    assert plan_layout(Parallel(tensor=2), MOE, 2, training=False).tensor == 2


def test_interleaving_takes_whole_groups_of_microbatches():
    layout = plan_layout(Parallel(pipeline=2, virtual_pipeline=2), DENSE, 4)
    check_microbatches(layout, 4)
    check_microbatches(plan_layout(Parallel(pipeline=2), DENSE, 2), 3)
    with pytest.raises(UserError, match=r"5 microbatches .* groups of 2; .* 2 data-parallel\) is 4 or 6"):
        check_microbatches(layout, 5)
    with pytest.raises(UserError, match=r"data-parallel\) is 2, or set"):
        check_microbatches(layout, 1)


@pytest.mark.parametrize(
    ("name", "parallel", "world"),
    [
        ("single", Parallel(), 1),
        ("tp2-pp2-sp", Parallel(tensor=2, pipeline=2, sequence=True), 4),
        ("pp2-vpp2", Parallel(pipeline=2, virtual_pipeline=2), 2),
        ("ep4", Parallel(expert=4), 4),
        ("ep2-dp4", Parallel(expert=2), 4),
        ("tp2-ep2-sp", Parallel(tensor=2, expert=2, sequence=True), 4),
        ("tp2-ep2-etp1-sp", Parallel(tensor=2, expert=2, expert_tensor=1, sequence=True), 2),
        ("tp2-dp2", Parallel(tensor=2), 4),
        ("dp2", Parallel(), 2),
    ],
)
def test_names_of_layouts(name, parallel, world):
    """A name is parsed to settings and ranks, and their layout has this name."""
    assert parse_layout(name) == (parallel, world)
    shape = MOE if "ep" in name else DENSE
    assert plan_layout(parallel, shape, world, training=False).name == name


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("tp2-xx3", "'xx3' in the layout 'tp2-xx3' is not a size"),
        ("tp2-tp4", "'tp4' .* is repeated"),
        ("tp0", "'tp0'"),
        ("sp2", "'sp2'"),
        ("", "''"),
        ("tp", "'tp'"),
    ],
)
def test_names_that_are_no_layouts(text, reason):
    with pytest.raises(UserError, match=reason):
        parse_layout(text)


def test_ranks_needed():
    assert ranks_needed(Parallel(tensor=2, pipeline=3)) == 6
    assert ranks_needed(Parallel(tensor=2, pipeline=3), data=2) == 12
    assert ranks_needed(Parallel(tensor=2, expert=3, expert_tensor=1)) == 6
