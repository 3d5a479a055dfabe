"""Layout: how many ranks share what, and which rank has which layers; pure arithmetic, no torch.

A rank is one number whose digits are its coordinates. Megatron counts the same ranks twice: for attention and dense weights the digits
are (tensor, context, data, pipeline), for experts (expert tensor, expert, expert data, pipeline). The first digit changes fastest.
Everything else here answers one question before a process is started: does this model fit this layout, and if not, which is the nearest
layout that it fits?
"""

import math
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

from swift_mega.config.schema import Parallel
from swift_mega.errors import UserError
from swift_mega.parallel.mesh import TE_KINDS, WHOLE, WITH_INNER, Mesh, check_te, choose_mesh
from swift_mega.parallel.nearest import nearest_layouts
from swift_mega.parallel.pipeline import chunk_layers


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a model that decide how it can be sharded. `ffn` is None where no layer has a dense MLP."""

    layers: int
    heads: int
    kv_heads: int
    hidden: int
    ffn: int | None
    vocab: int
    experts: int | None = None
    expert_ffn: int | None = None
    shared_ffn: int | None = None
    """MLP size of the expert that every token passes, which tensor ranks shard like a dense MLP; None where there is none."""
    shared_counts: tuple[tuple[str, int], ...] = ()
    """What else tensor ranks share evenly: (name in the plural, number), such as ("key heads of linear attention", 16)."""
    head_dim: int | None = None
    """Features of a head; None where it does not matter."""
    no_context_parallel: str | None = None
    """Why context ranks cannot share a row ("has …"); None: they can."""
    no_key_head_sharing: str | None = None
    """Why tensor ranks cannot share a key head ("each of which …"); None: they can."""
    no_te_context: str | None = None
    """Why Transformer Engine cannot compute its attention over context ranks ("has …"); None: it can."""
    windows: bool = False
    """Whether any layer has a sliding window."""


@dataclass(frozen=True, kw_only=True)
class Coordinate:
    """The number of one rank on every axis."""

    tensor: int
    pipeline: int
    context: int
    data: int
    expert: int
    expert_tensor: int
    expert_data: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the axes, in ranks, and the layers of every chunk in model order.

    Chunk k lives on stage k % pipeline as its model chunk k // pipeline, so len(layers) = pipeline * virtual.
    """

    world: int
    layers: tuple[int, ...]
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    mesh: Mesh = WHOLE
    """How the context ranks are used."""
    mesh_reason: str = ""
    """Why this mesh, in words."""
    expert: int = 1
    expert_tensor: int = 1
    sequence: bool = False

    def __post_init__(self) -> None:
        assert len(self.layers) == self.pipeline * self.virtual, self
        assert self.world % (self.tensor * self.pipeline * self.context) == 0, self
        assert self.mesh.size == self.context, self
        assert self.world % (self.expert_tensor * self.expert * self.pipeline) == 0, self

    @property
    def data(self) -> int:
        """Ranks that hold the same dense weights and see different examples."""
        return self.world // (self.tensor * self.pipeline * self.context)

    @property
    def expert_data(self) -> int:
        """Ranks that hold the same expert weights."""
        return self.world // (self.expert_tensor * self.expert * self.pipeline)

    @property
    def row_multiple(self) -> int:
        """The tokens of every row are a multiple of this. Context ranks, and tensor ranks with sequence parallelism, then get equal
        shares.
        """
        return self.mesh.multiple * (self.tensor if self.sequence else 1)

    @property
    def name(self) -> str:
        """A short name like tp2-pp2-sp, or single; `parse_layout` reads it back."""
        sizes = {"tp": self.tensor, "pp": self.pipeline, "vpp": self.virtual, "cp": self.context, "ep": self.expert}
        words = [f"{word}{size}" for word, size in sizes.items() if size > 1]
        if self.context > 1:
            words.append(self.mesh.name)
        if self.expert_tensor != self.tensor:
            words.append(f"etp{self.expert_tensor}")
        if self.world != self.pipeline * math.lcm(self.tensor * self.context, self.expert * self.expert_tensor):
            words.append(f"dp{self.data}")
        return "-".join(words + ["sp"] * self.sequence) or "single"

    def coordinate(self, rank: int) -> Coordinate:
        """The coordinates of a rank, in Megatron's default order tp-cp-ep-dp-pp (parallel_state.RankGenerator)."""
        assert 0 <= rank < self.world, (rank, self)
        tensor, context, data, pipeline = _digits(rank, (self.tensor, self.context, self.data, self.pipeline))
        expert_tensor, expert, expert_data, _ = _digits(
            rank, (self.expert_tensor, self.expert, self.expert_data, self.pipeline)
        )
        return Coordinate(
            tensor=tensor,
            pipeline=pipeline,
            context=context,
            data=data,
            expert=expert,
            expert_tensor=expert_tensor,
            expert_data=expert_data,
        )

    def layers_of(self, pipeline_rank: int, virtual: int = 0) -> range:
        """Global indices of the layers that a stage has in one of its model chunks."""
        chunk = virtual * self.pipeline + pipeline_rank
        first = sum(self.layers[:chunk])
        return range(first, first + self.layers[chunk])

    def pipeline_settings(self) -> dict[str, Any]:
        """Fields of TransformerConfig, beyond the sizes, that make Megatron build exactly `layers`; none if the layers are spread
        evenly.
        """
        if len(set(self.layers)) == 1:
            return {}
        chunks = [["decoder"] * layers for layers in self.layers]
        chunks[0].insert(0, "embedding")
        chunks[-1].append("loss")
        return {"pipeline_model_parallel_layout": chunks}

    def settings(self) -> dict[str, Any]:
        """All fields of TransformerConfig that a layout decides, `pipeline_settings` included."""
        return {
            "num_layers": sum(self.layers),
            "tensor_model_parallel_size": self.tensor,
            "pipeline_model_parallel_size": self.pipeline,
            "virtual_pipeline_model_parallel_size": self.virtual if self.virtual > 1 else None,
            "context_parallel_size": self.context,
            "expert_model_parallel_size": self.expert,
            "expert_tensor_parallel_size": self.expert_tensor,
            "sequence_parallel": self.sequence,
            **self.pipeline_settings(),
        }


def _digits(number: int, sizes: tuple[int, ...]) -> list[int]:
    """The digits of a number in mixed radix, the one that changes fastest first."""
    digits = []
    for size in sizes:
        number, digit = divmod(number, size)
        digits.append(digit)
    return digits


def plan_layout(parallel: Parallel, shape: ModelShape, world: int, *, training: bool = True) -> Layout:
    """The layout that the settings ask for, or a UserError that says why it does not work and which near ones would.

    `training` adds what only training needs: Megatron refuses to train experts under tensor parallelism without sequence parallelism
    (moe_layer.py, MoELayer.forward).
    """
    try:
        return _plan(parallel, shape, world, training)
    except UserError as problem:
        works = partial(_works, shape=shape, world=world, training=training)
        near = nearest_layouts(parallel, world, layers=shape.layers, experts=shape.experts, works=works)
        remedy = f"; on {world} rank{'s' * (world != 1)} these would work: {' | '.join(near)}" if near else ""
        raise UserError(f"{problem}{remedy}") from None


def _works(parallel: Parallel, shape: ModelShape, world: int, training: bool) -> bool:
    try:
        _plan(parallel, shape, world, training)
    except UserError:
        return False
    return True


def check_microbatches(layout: Layout, microbatches: int) -> None:
    """Raise UserError where the interleaved schedule cannot run this number of microbatches per step.

    Megatron takes microbatches in groups of `pipeline` and refuses an incomplete group, which would leave dependency
    bubbles (schedules.py, forward_backward_pipelining_with_interleaving).
    """
    if layout.virtual == 1 or (microbatches > 0 and microbatches % layout.pipeline == 0):
        return
    group = layout.pipeline
    lower, upper = microbatches // group * group, (microbatches // group + 1) * group
    counts = f"{lower} or {upper}" if lower else str(upper)
    raise UserError(
        f"{microbatches} microbatches per step do not fill the interleaved schedule of {group} stages, which takes them "
        f"in groups of {group}; choose train.global_batch_size so that global_batch_size / (micro_batch_size * "
        f"{layout.data} data-parallel) is {counts}, or set parallel.virtual_pipeline=1"
    )


def _plan(parallel: Parallel, shape: ModelShape, world: int, training: bool) -> Layout:
    for check in (_check_sizes, _check_dense, _check_experts, _check_overlap):
        check(parallel, shape, world)
    if training and shape.experts and parallel.tensor > 1 and not parallel.sequence:
        raise UserError(
            f"parallel.tensor={parallel.tensor} with {shape.experts} experts needs parallel.sequence=true: Megatron "
            "does not train experts under tensor parallelism without it"
        )
    mesh, reason = _mesh(parallel, shape)
    return Layout(
        world=world,
        layers=chunk_layers(parallel, shape.layers),
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual=parallel.virtual_pipeline,
        context=parallel.context,
        mesh=mesh,
        mesh_reason=reason,
        expert=parallel.expert,
        expert_tensor=_expert_tensor(parallel),
        sequence=parallel.sequence,
    )


def _mesh(parallel: Parallel, shape: ModelShape) -> tuple[Mesh, str]:
    if parallel.context == 1:
        for name, default in (("cp", "auto"), ("ulysses", None)):
            if (value := getattr(parallel, name)) != default:
                raise UserError(f"parallel.{name}={value} has no effect with parallel.context=1")
        return WHOLE, ""
    if shape.no_context_parallel is not None:
        raise UserError(
            f"parallel.context={parallel.context} splits rows of tokens, and this model {shape.no_context_parallel}; set it to 1"
        )
    if parallel.ulysses is not None and parallel.cp not in WITH_INNER:
        raise UserError(
            f"parallel.ulysses={parallel.ulysses} is the inner size of parallel.cp=hybrid, and cp={parallel.cp}; remove it"
        )
    check_te(parallel.cp, no_te_context=shape.no_te_context, windows=shape.windows)
    heads, keys = shape.heads // parallel.tensor, max(1, shape.kv_heads // parallel.tensor)
    return choose_mesh(parallel.cp, parallel.context, heads=heads, kv_heads=keys, ulysses=parallel.ulysses)


def _expert_tensor(parallel: Parallel) -> int:
    return parallel.tensor if parallel.expert_tensor is None else parallel.expert_tensor


def _check_sizes(parallel: Parallel, shape: ModelShape, world: int) -> None:
    for name in ("tensor", "pipeline", "virtual_pipeline", "context", "ulysses", "expert", "expert_tensor"):
        size = getattr(parallel, name)
        if size is not None and size < 1:
            raise UserError(f"parallel.{name}={size} is not a number of ranks: it must be at least 1")
    if world < 1:
        raise UserError(f"{world} ranks cannot run a model: at least 1 is needed")
    ranks = parallel.tensor * parallel.pipeline * parallel.context
    if world % ranks:
        context = f" x parallel.context={parallel.context}" if parallel.context > 1 else ""
        raise UserError(
            f"{world} rank{'s' * (world != 1)} cannot be split into replicas of parallel.tensor={parallel.tensor} x "
            f"parallel.pipeline={parallel.pipeline}{context} = {ranks} ranks: start {_multiples_near(world, ranks)} ranks"
        )


def _check_dense(parallel: Parallel, shape: ModelShape, world: int) -> None:
    tensor = parallel.tensor
    split = {"attention heads": shape.heads, "MLP columns": shape.ffn}
    split["columns of the shared expert"] = shape.shared_ffn
    split.update(shape.shared_counts)
    for what, count in split.items():
        if count is not None and count % tensor:
            raise UserError(f"parallel.tensor={tensor} does not divide the model's {count} {what}")
    _check_key_heads(tensor, shape)
    if parallel.sequence and tensor == 1:
        raise UserError(
            "parallel.sequence=true splits activations over the tensor ranks, and parallel.tensor=1 has none: set "
            "parallel.sequence=false"
        )


def _check_key_heads(tensor: int, shape: ModelShape) -> None:
    """UserError where tensor ranks cannot share the key-value heads evenly.

    More ranks than heads split the weight rows of each group evenly (Megatron's attention.py).
    """
    heads = shape.kv_heads
    if heads % tensor == 0:
        return
    if tensor % heads:
        raise UserError(
            f"parallel.tensor={tensor} is neither a divisor nor a multiple of the model's {heads} key-value heads"
        )
    if shape.no_key_head_sharing is not None:
        raise UserError(
            f"parallel.tensor={tensor} is more than the model's {heads} key-value heads, each of which {shape.no_key_head_sharing}"
        )
    if shape.head_dim is not None and heads * shape.head_dim % tensor:
        raise UserError(
            f"parallel.tensor={tensor} does not divide the {heads * shape.head_dim} rows of the model's {heads} key-value heads"
        )


def _check_experts(parallel: Parallel, shape: ModelShape, world: int) -> None:
    expert, expert_tensor = parallel.expert, _expert_tensor(parallel)
    if not shape.experts:
        for name in ("expert", "expert_tensor"):
            if (getattr(parallel, name) or 1) > 1:
                raise UserError(f"parallel.{name}={getattr(parallel, name)} splits experts, and this model has none")
        if parallel.expert_tensor is not None and parallel.expert_tensor != parallel.tensor:
            raise UserError(f"parallel.expert_tensor={expert_tensor} splits experts, and this model has none")
        return
    if shape.experts % expert:
        raise UserError(f"parallel.expert={expert} does not divide the model's {shape.experts} experts")
    if shape.expert_ffn is not None and shape.expert_ffn % expert_tensor:
        raise UserError(
            f"parallel.expert_tensor={expert_tensor} does not divide the {shape.expert_ffn} columns of an expert's MLP"
        )
    ranks = expert_tensor * expert * parallel.pipeline
    if world % ranks:
        default = " (expert_tensor is the tensor size where it is not set)" if parallel.expert_tensor is None else ""
        raise UserError(
            f"{world} rank{'s' * (world != 1)} cannot be split into replicas of expert_tensor={expert_tensor} x "
            f"expert={expert} x pipeline={parallel.pipeline} = {ranks} ranks{default}: start "
            f"{_multiples_near(world, math.lcm(ranks, parallel.tensor * parallel.pipeline * parallel.context))} ranks"
        )


def _check_overlap(parallel: Parallel, shape: ModelShape, world: int) -> None:
    data = world // (parallel.tensor * parallel.pipeline)  # context ranks reduce gradients like data ranks
    for name in ("overlap_grad_reduce", "overlap_param_gather"):
        if getattr(parallel, name) and data == 1:
            raise UserError(
                f"parallel.{name}=true overlaps data-parallel communication, and there is only one data rank"
            )
    if parallel.overlap_param_gather and not (parallel.distributed_optimizer and parallel.overlap_grad_reduce):
        raise UserError(
            "parallel.overlap_param_gather=true needs parallel.distributed_optimizer=true and "
            "parallel.overlap_grad_reduce=true: it gathers the parameters that a sharded optimizer updates"
        )


def _multiples_near(number: int, step: int) -> str:
    below, above = number // step * step, -(-number // step) * step
    return f"{below} or {above}" if 0 < below < above else f"{above}"


_TOKENS = {
    "tp": "tensor",
    "pp": "pipeline",
    "vpp": "virtual_pipeline",
    "cp": "context",
    "ep": "expert",
    "etp": "expert_tensor",
    "dp": "data",
}


def parse_layout(text: str) -> tuple[Parallel, int]:
    """Settings and the number of ranks they mean, from a name like 'tp2-pp2-sp', 'ep2-etp1-dp4' or 'single'.

    Without dp the ranks are the fewest that the other sizes need.
    """
    sizes: dict[str, Any] = {}
    for token in [] if text.strip() == "single" else text.strip().lower().split("-"):
        if token in ("ring", "ulysses", "allgather", "hybrid", *TE_KINDS) and "cp" not in sizes:
            sizes["cp"] = token
            continue
        inner = re.fullmatch(r"ulysses([1-9]\d{0,5})|te:a2a([1-9]\d{0,5})\+p2p", token)
        if inner and "cp" not in sizes:
            sizes |= {"cp": "hybrid" if inner[1] else "te:a2a+p2p", "ulysses": int(inner[1] or inner[2])}
            continue
        match = re.fullmatch(r"([a-z]+)([1-9]\d{0,5})", token)
        name = "sequence" if token == "sp" else _TOKENS.get(match.group(1)) if match else None
        if name is None or name in sizes:
            why = "is repeated" if name else "is not a size"
            raise UserError(
                f"{token!r} in the layout {text!r} {why}: write 'single', or tpN ppN vppN cpN epN etpN dpN sp (and ring, "
                "ulysses, ulyssesN, allgather or te:p2p and the like after cpN) joined by '-', for example tp2-pp2-sp"
            )
        sizes[name] = True if token == "sp" else int(match.group(2)) if match else None
    data = sizes.pop("data", None)
    parallel = Parallel(**sizes)
    return parallel, ranks_needed(parallel, data)


def ranks_needed(parallel: Parallel, data: int | None = None) -> int:
    """The number of ranks with `data` copies of the dense weights; without `data`, the fewest that the sizes allow."""
    if data is not None:
        return parallel.tensor * parallel.context * parallel.pipeline * data
    return parallel.pipeline * math.lcm(parallel.tensor * parallel.context, parallel.expert * _expert_tensor(parallel))
