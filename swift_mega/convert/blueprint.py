"""Blueprint: which slices each rank of any layout holds, known from config.json alone. No weights are read, no other rank is needed.

Megatron is built once on the meta device, with one layer of each kind, to learn which parameters a layer has. The rest is arithmetic:
a rank of a layout holds some layers and experts, and a shard of each parameter along the dim that its pack gives. Real ranks use the same
function `slices` to load. Tests compare the blueprint with Megatron built in each layout.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject

from swift_mega.config import schema
from swift_mega.convert.files.spans import Span, spans, stacked
from swift_mega.convert.files.tensors import TensorSource
from swift_mega.convert.load import fill
from swift_mega.convert.megatron.places import Place, layer_of, object_of_layer, places_of
from swift_mega.convert.slices import Slice, rows_of, slices
from swift_mega.convert.source import Source
from swift_mega.device.device import Device
from swift_mega.models.build import build
from swift_mega.models.family import Family, Rule
from swift_mega.models.megatron_config import transformer_config
from swift_mega.models.settings import LayerKind, Settings, padded_vocabulary
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.layout import Coordinate, Layout, plan_layout

META = Device(kind="cpu", device=torch.device("meta"), backend="gloo", name="meta")


@dataclass(frozen=True)
class Slot:
    """One Megatron parameter (or a buffer that checkpoints contain) of the unsharded model, under the name that rules use."""

    name: str
    rule: Rule
    numbers: Mapping[str, int]
    shape: tuple[int, ...]
    """Unsharded; a vocabulary without padding."""
    parts: Mapping[str, tuple[int, ...]]
    """The Hugging Face tensors in it, with their unsharded shapes."""
    dtype: torch.dtype
    places: tuple[Place, ...]
    """Where its rows are stored in a Megatron checkpoint, in the order of the rows."""

    @property
    def expert(self) -> bool:
        """Whether it belongs to one expert: sharded along the expert-tensor axis, and present on one expert rank only."""
        return "e" in self.numbers


@dataclass(frozen=True)
class Blueprint:
    """Every parameter of the unsharded model, in order."""

    family: Family
    settings: Settings
    slots: tuple[Slot, ...]
    objects: tuple[ShardedObject, ...]
    """What a Megatron checkpoint contains besides tensors: the empty `_extra_state` objects of linears."""

    @property
    def wanted(self) -> dict[str, tuple[int, ...]]:
        """All Hugging Face tensors that the parameters need, with their shapes."""
        return {name: shape for slot in self.slots for name, shape in slot.parts.items()}


@dataclass(frozen=True)
class Shard:
    """The shard of a slot that one rank holds."""

    slot: Slot
    shape: tuple[int, ...]
    slices: tuple[Slice, ...]
    rank_size: tuple[int, int]
    """(rank, size) of the mesh axis that shards it."""
    copy: bool = False
    """Whether it is the second copy of a tied embedding: the output layer on a last stage that is not the first."""


def make_blueprint(source: Source, dtype: torch.dtype = torch.bfloat16) -> Blueprint:
    """The blueprint of a model, from its config.json. Creates and closes a process group of one rank, since Megatron needs one.

    dtype: of the model; a few parameters may have another dtype.
    """
    family, settings = source.family, source.settings
    kinds = _kinds(settings)
    small = _only(settings, [layers[0] for layers in kinds])
    layout = plan_layout(schema.Parallel(), small.shape, 1, training=False)
    groups = parallel_groups.init(layout)
    try:
        config = transformer_config(small, layout, device=META, dtype=dtype, train=schema.Train(), given={})
        with torch.device("meta"):
            part = build(family, small, layout, groups.coordinate, device=META, config=config, vocab_divisible_by=1)
        slots, layers = [], settings.shape.layers
        places, objects = places_of(part.chunks[0], groups)
        for named in part.named_parameters():
            shape, numbers = tuple(named.parameter.shape), dict(named.numbers)
            shapes, lies = part.part_shapes(named), places.pop(named.name)
            for layer in kinds[numbers["i"]] if "i" in numbers else [None]:
                at = numbers if layer is None else {**numbers, "i": layer}
                parts = dict(zip((name.format(**at) for name in named.rule.parts), shapes, strict=True))
                there = lies if layer is None else tuple(place.of_layer(layer, layers) for place in lies)
                dtype = named.parameter.dtype
                slots.append(Slot(named.rule.megatron.format(**at), named.rule, at, shape, parts, dtype, there))
        assert not places, f"Megatron saves {sorted(places)}, which no rule fills"
    finally:
        parallel_groups.close()
    return Blueprint(family, settings, tuple(slots), tuple(_objects(objects, kinds, layers)))


def _objects(
    objects: Iterable[tuple[str, ShardedObject]], kinds: Sequence[list[int]], layers: int
) -> Iterator[ShardedObject]:
    for name, thing in objects:
        if (small := layer_of(name)) is None:
            yield thing
        else:
            yield from (object_of_layer(thing, layer, layers) for layer in kinds[small])


def _kinds(settings: Settings) -> list[list[int]]:
    """The layer numbers of each kind; layers of one kind have the same parameters."""
    found: dict[LayerKind, list[int]] = {}
    for layer, kind in enumerate(settings.layer_kinds):
        found.setdefault(kind, []).append(layer)
    return list(found.values())


def _only(settings: Settings, layers: Sequence[int]) -> Settings:
    """The settings of a model that consists of these layers only."""
    megatron = {**settings.megatron, "num_layers": len(layers)}
    if "moe_layer_freq" in megatron:
        megatron["moe_layer_freq"] = [int(settings.moe_layers[layer]) for layer in layers]
    return dataclasses.replace(
        settings,
        megatron=megatron,
        shape=dataclasses.replace(settings.shape, layers=len(layers)),
        ropes=tuple(settings.ropes[layer] for layer in layers),
        windows=tuple(settings.windows[layer] for layer in layers),
        moe_layers=tuple(settings.moe_layers[layer] for layer in layers),
        edits=tuple(edit.only(layers) for edit in settings.edits),
    )


def shards_of(
    blueprint: Blueprint, layout: Layout, where: Coordinate, *, vocab_divisible_by: int = 128
) -> Iterator[Shard]:
    """The shards that the rank at `where` holds, in the order of the slots."""
    stage_of = _stage_of(layout)
    for slot in blueprint.slots:
        rank_size, expert = _rank_size(layout, where, slot), _expert_rank(blueprint, layout, slot)
        for stage, copy in _stages(blueprint, layout, stage_of, slot):
            if stage == where.pipeline and expert in (None, where.expert):
                yield _shard(blueprint.settings, slot, rank_size, vocab_divisible_by, copy)


def _stage_of(layout: Layout) -> list[int]:
    """The pipeline stage of each layer."""
    found = [0] * sum(layout.layers)
    for stage in range(layout.pipeline):
        for virtual in range(layout.virtual):
            for layer in layout.layers_of(stage, virtual):
                found[layer] = stage
    return found


def _stages(blueprint: Blueprint, layout: Layout, stage_of: Sequence[int], slot: Slot) -> list[tuple[int, bool]]:
    """[(stage, is_copy)] for the stages that hold a slot; the copy is a tied embedding used as output layer on the last stage."""
    if "i" in slot.numbers:
        return [(stage_of[slot.numbers["i"]], False)]
    last = layout.pipeline - 1
    if not slot.name.startswith("embedding."):
        return [(last, False)]
    tied = blueprint.settings.tied and last and slot.rule.pack.padded
    return [(0, False), *([(last, True)] if tied else [])]


def _expert_rank(blueprint: Blueprint, layout: Layout, slot: Slot) -> int | None:
    """The expert rank that holds a slot; None: every expert rank holds it."""
    if not slot.expert:
        return None
    return slot.numbers["e"] // ((blueprint.settings.shape.experts or 1) // layout.expert)


def _rank_size(layout: Layout, where: Coordinate, slot: Slot) -> tuple[int, int]:
    """(rank, size) of the mesh axis that shards a slot."""
    return (where.expert_tensor, layout.expert_tensor) if slot.expert else (where.tensor, layout.tensor)


def _shard(settings: Settings, slot: Slot, rank_size: tuple[int, int], vocab_divisible_by: int, copy: bool) -> Shard:
    shape, pack, (_, size) = list(slot.shape), slot.rule.pack, rank_size
    if pack.padded:
        shape[0] = padded_vocabulary(settings.shape.vocab, vocab_divisible_by, size) // size
    elif pack.shard_dim is not None:
        assert shape[pack.shard_dim] % size == 0, f"{slot.name} {slot.shape} over {size} ranks"
        shape[pack.shard_dim] //= size
    pieces = slices(slot.rule, slot.parts, rank_size=rank_size, heads=settings.heads, rows=rows_of(shape))
    return Shard(slot, tuple(shape), tuple(pieces), rank_size, copy)


def value_of(checkpoint: TensorSource, shard: Shard, settings: Settings, dtype: torch.dtype) -> torch.Tensor:
    """The values of a shard, read by the same `fill` that a rank uses to load. It needs no process group."""
    made = torch.empty(shard.shape, dtype=dtype)
    fill(made, checkpoint, shard.slot.rule, shard.slices, settings.heads.on(*shard.rank_size))
    return made


def check_tiling(blueprint: Blueprint, layout: Layout, *, vocab_divisible_by: int = 128) -> int:
    """Checks that the ranks of one replica together hold each number exactly once; returns how many parameters the model has.

    Copies of a tied embedding are not counted. AssertionError with the tensor's name otherwise: that is a bug of this code.
    """
    count, seen, stage_of = 0, set(), _stage_of(layout)
    for slot in blueprint.slots:
        size = 1 if slot.rule.pack.axis is None else layout.expert_tensor if slot.expert else layout.tensor
        assert [copy for _, copy in _stages(blueprint, layout, stage_of, slot)].count(False) == 1, slot.name
        assert _expert_rank(blueprint, layout, slot) in (None, *range(layout.expert)), slot.name
        pieces = [
            piece
            for rank in range(size)
            for piece in _shard(blueprint.settings, slot, (rank, size), vocab_divisible_by, False).slices
        ]
        for name, shape in slot.parts.items():
            assert name not in seen, f"{name} is in two parameters"
            seen.add(name)
            _check_whole(name, shape, slot.rule.pack.axis, [piece for piece in pieces if piece.name == name])
            count += math.prod(shape)
    return count


def _check_whole(name: str, shape: Sequence[int], axis: int | None, pieces: Sequence[Slice]) -> None:
    if axis is None:
        assert len(pieces) == 1 and pieces[0].axis is None, f"{name}: {pieces}"
        return
    ends = sorted((piece.start, piece.stop or 0) for piece in pieces if piece.start != piece.stop)
    reached = 0
    for start, stop in ends:
        assert start == reached, f"{name} {shape}: {ends[:8]}"
        reached = stop
    assert reached == shape[axis], f"{name} {shape}: {ends[:8]}"


def byte_ranges(checkpoint: TensorSource, shard: Shard) -> list[tuple[Path, Span]]:
    """(file, byte range) of each slice of a shard that is not empty."""
    found = []
    for piece in shard.slices:
        if piece.start == piece.stop:
            continue
        entry = checkpoint.entries[stacked(piece.name)[0]]
        found.append((entry.file, spans(entry, piece.name, piece.axis, piece.start, piece.stop)))
    return found
