"""Converts between a Megatron checkpoint of any layout and Hugging Face files, in one process with constant memory.

It goes through the model parameter by parameter, and through a large parameter in blocks of rows (`RowBlock`), so a few hundred MB are in
memory at a time. The output is what the ranks of a layout would write: each chunk is the shard of one rank, or part of one.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from swift_mega.convert.blueprint import Blueprint, Slot
from swift_mega.convert.check import check_coverage
from swift_mega.convert.files.hf_files import some
from swift_mega.convert.files.progress import bytes_bar
from swift_mega.convert.files.tensors import TensorSource
from swift_mega.convert.load import fill, not_finite
from swift_mega.convert.megatron.mcore import (
    RELEASE,
    SKIPPED,
    TRAINING,
    begin,
    complete,
    iteration_directory,
    misfit,
    reason_of,
    save_state,
)
from swift_mega.convert.megatron.places import Box, Place
from swift_mega.convert.megatron.torch_dist import UNREADABLE, ChunkWriter, TorchDist
from swift_mega.convert.save import Piece, carried_tensors, companions_from, staged_together, write_pieces
from swift_mega.convert.slices import Slice, slices
from swift_mega.errors import UserError
from swift_mega.models.packs import Fused, GateUp, Pack, Qkv
from swift_mega.models.settings import Settings, padded_vocabulary
from swift_mega.parallel.agree import agree, on_first_rank
from swift_mega.parallel.layout import Layout

MOST = 256 << 20
"""Bytes of a parameter in memory at a time. It is exceeded where a pack cannot be split further."""


@dataclass(frozen=True)
class RowBlock:
    """A block of rows of a parameter, of shape `shape`.

    slices: the Hugging Face slices that it is made of. lies: (place, first row, last row + 1) in a Megatron checkpoint, in row order.
    """

    shape: tuple[int, ...]
    slices: tuple[Slice, ...]
    lies: tuple[tuple[Place, int, int], ...]


def row_blocks(slot: Slot, settings: Settings, most: int = MOST, rows: int | None = None) -> Iterator[RowBlock]:
    """Splits a parameter into row blocks of at most `most` bytes, where its pack allows that. rows: of a vocabulary after padding."""
    shape, pack = slot.shape, slot.rule.pack
    size = slot.dtype.itemsize * math.prod(shape)
    # One Hugging Face tensor, unchanged: it can be split at any row.
    if type(pack) is Pack and shape and len(slot.places) == 1:
        (name,), (place,) = slot.parts, slot.places
        together, length = max(1, most * shape[0] // size) if size else 1, (rows if pack.padded else None) or shape[0]
        for start in range(0, length, together):
            stop = min(start + together, length)
            piece = Slice(name, 0, min(start, shape[0]), min(stop, shape[0]))
            yield RowBlock((stop - start, *shape[1:]), (piece,), ((place, start, stop),))
        return
    count = _count(slot, settings, size, most)
    rows = shape[0] // count if shape else 1
    for number in range(count):
        pieces = tuple(slices(slot.rule, slot.parts, rank_size=(number, count), heads=settings.heads, rows=rows))
        lies = []
        for place in slot.places:
            length = place.shape[0] // count if shape else 1
            lies.append((place, number * length, (number + 1) * length))
        yield RowBlock((rows, *shape[1:]) if shape else (), pieces, tuple(lies))


def _count(slot: Slot, settings: Settings, size: int, most: int) -> int:
    """The number of equal row blocks of a fused parameter: as few as possible, at most its number of query groups or MLP features."""
    pack = slot.rule.pack
    inner = pack.inner if isinstance(pack, Fused) else pack
    unit = 1
    if isinstance(inner, GateUp) and len(slot.places) == 2:
        unit = slot.shape[0] // 2
    elif isinstance(inner, Qkv) and len(slot.places) == 1:
        unit = slot.shape[0] // (sum(inner.shares(settings.heads)) * settings.heads.head_dim)
    return next((count for count in range(1, unit + 1) if unit % count == 0 and size <= most * count), unit)


def write_mcore(
    blueprint: Blueprint,
    layout: Layout,
    output: str | Path,
    checkpoint: TensorSource,
    *,
    overwrite: bool = False,
    vocab_divisible_by: int = 128,
    most: int = MOST,
) -> None:
    """Writes what `save_mcore` would write on all ranks of `layout`, from this process alone, in a process group of one rank."""
    target, settings = Path(output), blueprint.settings
    check_coverage(blueprint.family, settings, checkpoint, blueprint.wanted)
    with staged_together(target, overwrite=overwrite, needed=_bytes(blueprint)) as staging:
        agree(on_first_rank(lambda: begin(staging, checkpoint, settings), target))
        agree(save_state({"model": {thing.unique_key: thing for thing in blueprint.objects}}, staging, target))
        with torch.no_grad(), ChunkWriter(staging / RELEASE) as writer:
            rows = padded_vocabulary(settings.shape.vocab, vocab_divisible_by, layout.tensor)
            _write_slots(writer, blueprint, layout, checkpoint, rows, most)
            writer.finish()
        agree(on_first_rank(lambda: complete(staging), target))


def _write_slots(
    writer: ChunkWriter, blueprint: Blueprint, layout: Layout, checkpoint: TensorSource, rows: int, most: int
) -> None:
    """Writes every parameter in row blocks, from the Hugging Face tensors. rows: of the padded vocabulary."""
    settings = blueprint.settings
    with bytes_bar(_bytes(blueprint), "writing") as bar:
        for slot in blueprint.slots:
            size = layout.expert_tensor if slot.expert else layout.tensor
            for block in row_blocks(slot, settings, most, rows):
                value = torch.empty(block.shape, dtype=slot.dtype)
                fill(value, checkpoint, slot.rule, block.slices, settings.heads)
                if said := not_finite(value, checkpoint, block.slices):
                    raise UserError(said)
                for place, start, part in _parts(block, value):
                    _write(writer, slot, place, start, part, size=size, padded=rows)
                bar.update(value.nbytes)
                # Otherwise they stay in memory while the next block is read.
                del value, part


def _bytes(blueprint: Blueprint) -> int:
    return sum(slot.dtype.itemsize * math.prod(slot.shape) for slot in blueprint.slots)


def _parts(block: RowBlock, value: Tensor) -> Iterator[tuple[Place, int, Tensor]]:
    """(place, first row in that place, rows) for each place of a block."""
    at = 0
    for place, start, stop in block.lies:
        yield place, start, value[at : at + stop - start] if value.dim() else value
        at += stop - start


def _write(writer: ChunkWriter, slot: Slot, place: Place, start: int, value: Tensor, *, size: int, padded: int) -> None:
    """Writes rows of a place, from row `start`, in the chunks that `size` tensor ranks would write. padded: rows of a padded vocabulary."""
    rows = padded if slot.rule.pack.padded else None
    box, dim = place.box(rows=rows), slot.rule.pack.shard_dim
    if not value.dim():
        writer.add(box.key, box.size, box.offset, value.reshape((1,) * box.lead))
        return
    marks: list[int] = []
    if dim is not None:
        length, first = (rows or place.shape[0], start) if dim == 0 else (place.shape[dim], 0)
        marks = [length * rank // size - first for rank in range(1, size)] if length % size == 0 else []
    dim = dim or 0
    edges = [0, *(mark for mark in marks if 0 < mark < value.shape[dim]), value.shape[dim]]
    for begin_at, end_at in itertools.pairwise(edges):
        part, offset = value.narrow(dim, begin_at, end_at - begin_at), list(box.offset)
        offset[box.lead] += start
        offset[box.lead + dim] += begin_at
        writer.add(box.key, box.size, offset, part.reshape((1,) * box.lead + tuple(part.shape)))


def read_mcore(
    blueprint: Blueprint,
    directory: str | Path,
    output: str | Path,
    *,
    source: str | Path,
    dtypes: Mapping[str, torch.dtype] | torch.dtype,
    max_shard_bytes: int,
    overwrite: bool = False,
    most: int = MOST,
) -> tuple[int, int]:
    """Writes a Megatron checkpoint of any layout as a Hugging Face directory, from this process alone, in a process group of one rank.

    source: directory of config, tokenizer and chat template. Returns (number, bytes) of the tensors and objects of optimizer and training
    state that were left out; they are not read.
    """
    folder = iteration_directory(directory)
    try:
        stored = TorchDist(folder)
        boxes = _fit(blueprint, stored)
        stored.check_files(SKIPPED)
    except UNREADABLE as error:
        raise _unreadable(folder, error) from error
    carried = carried_tensors(blueprint.settings, Path(source), dtypes, convert=True)
    write_pieces(
        _pieces(blueprint, stored, boxes, most),
        blueprint.wanted,
        Path(output),
        dtypes=dtypes,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        companions=companions_from(source, dtypes, blueprint.settings, carried),
        carried=carried,
    )
    return stored.bytes_of(TRAINING)


def _unreadable(folder: Path, error: BaseException) -> UserError:
    return UserError(
        f"{folder} cannot be read as a torch_dist checkpoint: {reason_of(error)}; copy it again, with the "
        "config.json that belongs to it"
    )


def _fit(blueprint: Blueprint, stored: TorchDist) -> dict[Place, Box]:
    """The box of each place in this checkpoint; UserError unless its weights are exactly those that config.json asks for."""
    found: dict[Place, Box] = {}
    missing, shapes = [], []
    for slot in blueprint.slots:
        for place in slot.places:
            box = next((box for box in place.boxes() if box.key in stored.tensors), None)
            if box is None:
                missing.append(place.box().key)
                continue
            found[place] = box
            size = tuple(stored.tensors[box.key].size)
            # Megatron pads a vocabulary to a multiple that its settings give.
            longer = slot.rule.pack.padded and size[:1] > box.size[:1]
            if size != box.size and not (longer and size[1:] == box.size[1:]):
                shapes.append(f"{box.key} is {list(size)}, config.json says {list(box.size)}")
    extra = stored.tensors.keys() - {box.key for box in found.values()}
    extra = {key for key in extra if not key.startswith(SKIPPED)}
    if missing or extra or shapes:
        more = f"; shapes differ: {some(sorted(set(shapes)), 3)}" if shapes else ""
        raise UserError(misfit(stored.folder, missing, extra, more))
    return found


def _pieces(blueprint: Blueprint, stored: TorchDist, boxes: Mapping[Place, Box], most: int) -> Iterator[Piece]:
    for slot in blueprint.slots:
        dtype = stored.tensors[boxes[slot.places[0]].key].properties.dtype
        for block in row_blocks(slot, blueprint.settings, most):
            value = torch.empty(block.shape, dtype=dtype)
            for place, start, part in _parts(block, value):
                box = boxes[place]
                offset = list(box.offset)
                if value.dim():
                    offset[box.lead] += start
                try:
                    stored.read_into(part, box.key, offset, box.lead)
                except UNREADABLE as error:
                    raise _unreadable(stored.folder, error) from error
            yield from _split(slot, blueprint.settings, block, value)
            del value, part


def _split(slot: Slot, settings: Settings, block: RowBlock, value: Tensor) -> Iterator[Piece]:
    """The rows of Hugging Face tensors in a block."""
    pack = slot.rule.pack
    if pack.axis == 0 or (type(pack) is Pack and value.dim()):
        for piece, part in zip(block.slices, pack.split(value, settings.heads), strict=True):
            yield Piece(piece.name, part, piece.start)
        return
    whole: Sequence[Tensor] = pack.fuse(pack.split(value, settings.heads))
    for name, tensor in zip(slot.parts, whole, strict=True):
        yield Piece(name, tensor)
