"""Process groups: the one place where a Layout becomes communicators, and where Megatron's parallel state is made.

Megatron numbers ranks in its own code. `init` compares its numbers with the Layout's. So everything that is computed from coordinates
(byte ranges, layers, seeds) fits the groups that communicate.
"""

from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state as state
from megatron.core import tensor_parallel
from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
from torch.distributed import ProcessGroup

from swift_mega.config.schema import TIMEOUT_MINUTES
from swift_mega.parallel.context import Context, make_context
from swift_mega.parallel.layout import Coordinate, Layout
from swift_mega.parallel.mesh import Mesh


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The groups that this rank is in. `embedding` is None on stages that hold neither the embedding nor the head."""

    layout: Layout
    coordinate: Coordinate
    rank: int
    world: ProcessGroup
    model: ProcessGroup
    tensor: ProcessGroup
    pipeline: ProcessGroup
    context: ProcessGroup
    data: ProcessGroup
    data_context: ProcessGroup
    expert: ProcessGroup
    expert_tensor: ProcessGroup
    expert_data: ProcessGroup
    embedding: ProcessGroup | None
    row: Context | None
    """The mesh and groups over which this rank attends to tokens of other context ranks; None where it has whole rows."""

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.coordinate.pipeline == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the head, and so the loss."""
        return self.coordinate.pipeline == self.layout.pipeline - 1


def init(layout: Layout, *, seed: int = 42, timeout_minutes: int = TIMEOUT_MINUTES) -> Groups:
    """Make Megatron's groups for this layout and seed this rank's random states.

    torch.distributed must be initialised with layout.world ranks; every rank calls this. `close` undoes it.
    timeout_minutes: how long a collective of these groups may take.
    """
    world = dist.get_world_size()
    assert world == layout.world, f"{world} ranks run, the layout is for {layout.world}"
    state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        context_parallel_size=layout.context,
        hierarchical_context_parallel_sizes=_te_sizes(layout.mesh),
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        distributed_timeout_minutes=timeout_minutes,
        create_gloo_process_groups=False,  # only needed to save optimizer state in a format that is not used here
    )
    coordinate = layout.coordinate(dist.get_rank())
    _compare(coordinate)
    seed_dropout(layout, coordinate, seed)
    return Groups(
        layout=layout,
        coordinate=coordinate,
        rank=dist.get_rank(),
        world=_whole_world(),
        model=state.get_model_parallel_group(),
        tensor=state.get_tensor_model_parallel_group(),
        pipeline=state.get_pipeline_model_parallel_group(),
        context=state.get_context_parallel_group(),
        data=state.get_data_parallel_group(),
        data_context=state.get_data_parallel_group(with_context_parallel=True),
        expert=state.get_expert_model_parallel_group(),
        expert_tensor=state.get_expert_tensor_parallel_group(),
        expert_data=state.get_expert_data_parallel_group(),
        embedding=state.get_embedding_group(check_initialized=False),
        row=_row(layout, timedelta(minutes=timeout_minutes)) if layout.context > 1 else None,
    )


EXPERT_INPUT = "expert-input-rng"
"""Name of the random state, beside Megatron's, for dropout of tensors that all expert-tensor ranks of an expert have whole."""
SEEDS_OF_A_RANK = 1 << 20
"""Seeds reserved for one rank. Megatron adds at most 2718 + tensor rank, or 1024 + 100 * expert rank + expert-tensor rank."""


def seed_dropout(layout: Layout, coordinate: Coordinate, seed: int) -> None:
    """Seeds torch's and Megatron's generators of this rank, so that dropout differs wherever activations do.

    Ranks of one tensor group share the default generator, because they have the same tokens. Megatron's tracker has states that differ
    on them, for sharded activations. Ranks with other tokens or layers (data, context and pipeline rank) differ in all states.
    Megatron-LM itself separates stages (100 * stage), but neither data nor context ranks: these would drop the same features of their
    tokens.
    """
    where = (coordinate.pipeline * layout.data + coordinate.data) * layout.context + coordinate.context
    mine = seed + SEEDS_OF_A_RANK * where
    torch.manual_seed(mine)
    tensor_parallel.model_parallel_cuda_manual_seed(mine, force_reset_rng=True)
    experts = (coordinate.pipeline * layout.expert + coordinate.expert) * layout.expert_data + coordinate.expert_data
    tensor_parallel.get_cuda_rng_tracker().add(EXPERT_INPUT, seed + SEEDS_OF_A_RANK * experts + SEEDS_OF_A_RANK // 2)


def _te_sizes(mesh: Mesh) -> list[int] | None:
    """Sizes of the groups that Megatron makes for Transformer Engine: ranks that exchange heads, and rings of these. None: no such
    groups.
    """
    return [mesh.ulysses, mesh.ring] if mesh.te and mesh.communication == "a2a+p2p" else None


def _row(layout: Layout, timeout: timedelta) -> Context:
    together: dict[Coordinate, list[int]] = {}
    for rank in range(layout.world):
        where = layout.coordinate(rank)
        together.setdefault(replace(where, context=0, expert=0, expert_tensor=0, expert_data=0), []).append(rank)
    return make_context(list(together.values()), layout.mesh, timeout=timeout)


def _whole_world() -> ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world


def close() -> None:
    """Forget the groups, so that another layout can be initialised in this process."""
    state.destroy_model_parallel()
    unset_num_microbatches_calculator()


def _compare(coordinate: Coordinate) -> None:
    """Megatron and the layout must agree on the coordinates of this rank. Otherwise weights would be sharded for another rank."""
    megatron = Coordinate(
        tensor=state.get_tensor_model_parallel_rank(),
        pipeline=state.get_pipeline_model_parallel_rank(),
        context=state.get_context_parallel_rank(),
        data=state.get_data_parallel_rank(),
        expert=state.get_expert_model_parallel_rank(),
        expert_tensor=state.get_expert_tensor_parallel_rank(),
        expert_data=state.get_expert_data_parallel_rank(),
    )
    assert megatron == coordinate, f"Megatron puts this rank at {megatron}, the layout at {coordinate}"
