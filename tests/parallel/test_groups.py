"""Groups: Megatron's parallel state agrees with the Layout, on real ranks, several times in one process."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state as state

from swift_mega.parallel import groups
from swift_mega.parallel.layout import Layout
from swift_mega.parallel.mesh import Mesh


def _layouts_in_turn(layouts: list[Layout]) -> list[str]:
    for layout in layouts:
        here = groups.init(layout, seed=7, timeout_minutes=11)
        sizes = {name: getattr(here, name).size() for name in ("tensor", "pipeline", "data", "expert", "expert_data")}
        assert sizes == {
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "data": layout.data,
            "expert": layout.expert,
            "expert_data": layout.expert_data,
        }
        mates = [rank for rank in range(layout.world) if _same(layout, rank, here.rank, "tensor")]
        assert dist.get_process_group_ranks(here.tensor) == mates
        total = torch.tensor([float(here.rank)])
        dist.all_reduce(total, group=here.tensor)
        assert total.item() == sum(mates)
        assert (here.embedding is not None) == (here.is_first_stage or here.is_last_stage)
        _timeouts(here)
        groups.close()
    return [layout.name for layout in layouts]


def _timeouts(here: groups.Groups) -> None:
    """The timeouts of every group that communicates during a step; there is no second set of groups over gloo."""
    names = "model tensor pipeline context data data_context expert expert_tensor expert_data embedding"
    made = [getattr(here, name) for name in names.split()]
    if here.row is not None:
        made += [here.row.ulysses, here.row.ring]
    for group in made:
        if group is not None:
            assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(minutes=11)
    gloo = {name: group for name, group in vars(state).items() if name.endswith("_GLOO")}
    assert len(gloo) >= 4 and not any(gloo.values())


def _same(layout: Layout, one: int, other: int, free: str) -> bool:
    """Whether two ranks differ in at most one dense axis."""
    axes = {"tensor", "pipeline", "context", "data"} - {free}
    left, right = layout.coordinate(one), layout.coordinate(other)
    return all(getattr(left, axis) == getattr(right, axis) for axis in axes)


def test_four_ranks_take_one_layout_after_another(ranks):
    """init after close makes the groups of the new layout, and Megatron's coordinates equal ours in each."""
    layouts = [
        Layout(world=4, layers=(4,), tensor=2, expert_tensor=2, sequence=True),
        Layout(world=4, layers=(1, 1, 1, 1), tensor=1, pipeline=2, virtual=2),
        Layout(world=4, layers=(4,), tensor=2, expert=2, expert_tensor=1),
        Layout(world=4, layers=(4,), tensor=2, context=2, mesh=Mesh(1, 2), expert_tensor=2),
        Layout(world=4, layers=(4,), expert=2, expert_tensor=2),
        Layout(world=4, layers=(2, 1, 1, 2), pipeline=4),
    ]
    names = ranks(4, _layouts_in_turn, layouts)
    assert names == ["tp2-dp2-sp", "pp2-vpp2-dp2", "tp2-ep2-etp1-dp2", "tp2-cp2-ring", "ep2-etp2", "pp4"]


def _wrong_world() -> None:
    groups.init(Layout(world=4, layers=(4,)))


def test_world_must_be_the_layouts(ranks):
    with pytest.raises(Exception, match="1 ranks run, the layout is for 4"):
        ranks(1, _wrong_world)
