"""Saves the parameters of all ranks as one Hugging Face directory: file headers first, then all ranks write their byte ranges in parallel.

A shard along dim 0 is a contiguous byte range of the Hugging Face tensor, so the rank writes it as it is. Shards along another dim are
gathered on one tensor rank, round robin. The data replicas also write round robin. A rank that cannot write still takes part in the
gathers; `agree` then raises the same error on every rank. The directory appears complete or not at all (outputs.py).
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from swift_mega.convert.check import FLOATS, carried_of, count_predicted
from swift_mega.convert.files.hf_files import Checkpoint, some
from swift_mega.convert.files.hf_write import (
    Planned,
    Writer,
    bytes_needed,
    companions,
    copy_companions,
    plan_files,
    write_headers,
)
from swift_mega.convert.files.progress import bytes_bar
from swift_mega.convert.files.quantised import drop_quantization, open_checkpoint, written_dtypes
from swift_mega.convert.files.report import checksums, write_report
from swift_mega.convert.files.stream import set_dtype
from swift_mega.convert.files.tensors import TensorSource
from swift_mega.convert.files.which_files import CARRIED, MODEL, has_weights
from swift_mega.convert.slices import slices, together
from swift_mega.errors import UserError
from swift_mega.models.build import ModelPart, NamedParameter
from swift_mega.models.quantization import quantization_of
from swift_mega.models.settings import Settings
from swift_mega.outputs import cannot_write, staged, staging_of
from swift_mega.parallel.agree import agree, gather, on_every_rank, on_first_rank
from swift_mega.parallel.groups import Groups

Value = Callable[[NamedParameter], Tensor]


@dataclass(frozen=True)
class Piece:
    """Rows of the Hugging Face tensor `name`, starting at row `first_row`."""

    name: str
    value: Tensor
    first_row: int = 0


@dataclass(frozen=True)
class Carried:
    """Carried tensors: no parameter holds them, and the output keeps them. dtypes: name -> the dtype in which it is written."""

    checkpoint: TensorSource
    dtypes: Mapping[str, torch.dtype]

    def pieces(self) -> Iterator[Piece]:
        """The tensors that this rank writes: every world_size-th one."""
        for name in tuple(self.dtypes)[dist.get_rank() :: dist.get_world_size()]:
            yield Piece(name, self.checkpoint.read(name))


def pieces(part: ModelPart, groups: Groups, exported: Iterable[NamedParameter], value: Value) -> Iterator[Piece]:
    """What this rank writes, one parameter at a time. The pieces of all ranks together cover each byte of each tensor once. Collective.

    exported: `part.named_parameters()`, or a tuner's `exported`. value: the tensor to export for a parameter (its data, its
    gradient, …), of the same shape.
    """
    for turn, named in enumerate(named for named in exported if not named.copy):
        replicas = groups.expert_data if named.expert else groups.data_context
        if dist.get_rank(replicas) != turn % replicas.size():
            continue
        rank, size = part.tensor_axis(named)
        mine, axis = value(named).detach(), named.rule.pack.axis
        if axis == 0:
            yield from _rows(part, named, mine)
        elif axis is None:
            if rank == turn % size:
                yield from _whole(part, named, [mine])
        else:
            shards = _gather(mine, groups.expert_tensor if named.expert else groups.tensor, turn % size)
            if shards is not None:
                yield from _whole(part, named, shards)


def _rows(part: ModelPart, named: NamedParameter, mine: Tensor) -> Iterator[Piece]:
    tensors = dict(zip(named.parts, part.part_shapes(named), strict=True))
    wanted = slices(named.rule, tensors, rank_size=part.tensor_axis(named), heads=part.heads, rows=len(mine))
    for piece, value in zip(wanted, named.rule.pack.split(mine, part.heads), strict=True):
        assert piece.stop is not None
        yield Piece(piece.name, value[: piece.stop - piece.start], piece.start)


def _gather(shard: Tensor, group: dist.ProcessGroup, owner: int) -> list[Tensor] | None:
    if group.size() == 1:
        return [shard]
    shard = shard.contiguous()
    shards = [torch.empty_like(shard) for _ in range(group.size())] if dist.get_rank(group) == owner else None
    dist.gather(shard, shards, group=group, group_dst=owner)
    return shards


def _whole(part: ModelPart, named: NamedParameter, shards: list[Tensor]) -> Iterator[Piece]:
    pack = named.rule.pack
    assert pack.rows(part.heads) is None, f"{named.name}: shards that end within a group are written rank by rank"
    split = [pack.split(shard, part.settings.heads) for shard in shards]
    whole = [
        torch.cat(tensors, dim=pack.axis or 0) if len(tensors) > 1 else tensors[0]
        for tensors in zip(*split, strict=True)
    ]
    for name, tensor in zip(named.parts, pack.fuse(whole), strict=True):
        yield Piece(name, tensor)


def _spoken_for(part: ModelPart, exported: Iterable[NamedParameter]) -> dict[str, tuple[int, ...]]:
    """Names and unsharded shapes of this rank's tensors that it reports: only those for which it is tensor rank 0 and replica 0."""
    mine: dict[str, tuple[int, ...]] = {}
    where = part.coordinate
    for named in exported:
        replica = where.expert_data if named.expert else where.data + where.context
        if not named.copy and replica == 0 and part.tensor_axis(named)[0] == 0:
            mine.update(zip(named.parts, part.part_shapes(named), strict=True))
    return mine


def save(
    part: ModelPart,
    groups: Groups,
    directory: str | Path,
    *,
    source: str | Path,
    dtypes: Mapping[str, torch.dtype] | torch.dtype,
    max_shard_bytes: int,
    overwrite: bool = False,
    edit: Callable[[Path], None] = lambda staging: None,
    convert_carried: bool = False,
) -> None:
    """Writes a complete Hugging Face directory. Collective. Config, tokenizer and chat template are copied from `source`.

    dtypes: by Hugging Face tensor name, or one for all. edit: called on rank 0 to change the files copied from `source`.
    convert_carried: the `convert` of `carried_tensors`.
    """
    settings, origin = part.settings, Path(source)
    carried = on_every_rank(lambda: carried_tensors(settings, origin, dtypes, convert=convert_carried))
    copy = on_every_rank(lambda: companions_from(source, dtypes, settings, carried))

    def beside(staging: Path) -> None:
        copy(staging)
        edit(staging)

    write_directory(
        part,
        groups,
        Path(directory),
        list(part.named_parameters()),
        dtypes=dtypes,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        companions=beside,
        carried=carried,
    )


def companions_from(
    source: str | Path, dtypes: Mapping[str, torch.dtype] | torch.dtype, settings: Settings, carried: Carried | None
) -> Callable[[Path], None]:
    """Returns a function that writes config, tokenizer and chat template of `source` into a directory of plain weights of these dtypes.

    UserError immediately, before any weight is written, where one of these files is a broken link.
    """
    companions(Path(source))

    def write(staging: Path) -> None:
        copy_companions(Path(source), staging)
        drop_quantization(staging)
        if isinstance(dtypes, torch.dtype):
            set_dtype(staging / "config.json", dtypes)
        # All tensors of a source with weights are kept, so the counts in its config.json stay valid.
        if has_weights(Path(source)):
            return
        if said := count_predicted(staging / "config.json", settings, carried.dtypes if carried else ()):
            print(f"{source}: {said}", flush=True)

    return write


def carried_tensors(
    settings: Settings, source: Path, dtypes: Mapping[str, torch.dtype] | torch.dtype, *, convert: bool
) -> Carried | None:
    """The carried tensors of a source directory; None where it has none.

    They come from its own weights, or from the `carried` files next to a Megatron checkpoint. Plain tensors keep their dtype, except
    where `convert` is true and `dtypes` is one dtype: then they get that. Quantised ones are dequantised, since the output's config.json
    declares all weights as plain.
    """
    stem = MODEL if has_weights(source) else CARRIED
    if not has_weights(source, stem):
        return None
    one = dtypes if isinstance(dtypes, torch.dtype) else None
    if stem == MODEL and quantization_of(source) is not None:
        checkpoint = open_checkpoint(source, torch.float32)
    else:
        checkpoint = Checkpoint(source, stem=stem)
    kinds = written_dtypes(checkpoint, one)
    names = carried_of(settings, checkpoint.entries)
    if one is not None and convert:
        kinds.update({name: one for name in names if kinds[name] in FLOATS})
    return Carried(checkpoint, {name: kinds[name] for name in names}) if names else None


def write_directory(
    part: ModelPart,
    groups: Groups,
    target: Path,
    exported: Sequence[NamedParameter],
    *,
    dtypes: Mapping[str, torch.dtype] | torch.dtype,
    max_shard_bytes: int,
    companions: Callable[[Path], None],
    overwrite: bool = False,
    stem: str = "model",
    value: Value = lambda named: named.parameter,
    carried: Carried | None = None,
    allow_nonfinite: bool = False,
) -> None:
    """Writes `exported` of all ranks as one safetensors directory; rank 0 calls `companions` for the other files. Collective.

    value: the tensor that is written for a parameter, of the same shape. carried: further tensors, written unchanged.
    allow_nonfinite: allow NaN and infinity, which are refused in a model.
    """
    write_pieces(
        pieces(part, groups, exported, value),
        _gather_owned(part, exported),
        target,
        dtypes=dtypes,
        max_shard_bytes=max_shard_bytes,
        companions=companions,
        overwrite=overwrite,
        stem=stem,
        carried=carried,
        allow_nonfinite=allow_nonfinite,
    )


def write_pieces(
    mine: Iterable[Piece],
    whole: Mapping[str, tuple[int, ...]],
    target: Path,
    *,
    dtypes: Mapping[str, torch.dtype] | torch.dtype,
    max_shard_bytes: int,
    companions: Callable[[Path], None],
    overwrite: bool = False,
    stem: str = "model",
    carried: Carried | None = None,
    allow_nonfinite: bool = False,
) -> None:
    """Writes the pieces `mine` of all ranks as one safetensors directory. whole: name -> unsharded shape of every tensor. Collective."""
    shapes = together(_in_order(whole))
    kinds = _kinds(shapes, dtypes)
    if carried is not None:
        shapes.update({name: carried.checkpoint.entries[name].shape for name in carried.dtypes})
        kinds.update(carried.dtypes)
    planned = plan_files({name: (kinds[name], shape) for name, shape in shapes.items()}, max_shard_bytes, stem)
    tensors = itertools.chain(mine, carried.pieces() if carried else ())
    total = sum(place.bytes for place in planned.values()) // dist.get_world_size()
    with staged_together(target, overwrite=overwrite, needed=bytes_needed(planned)) as staging:
        agree(on_first_rank(lambda: write_headers(staging, planned), target))
        with bytes_bar(total, "writing") as bar:
            found = _write(tensors, staging, planned, bar.update, allow_nonfinite)
        agree(on_first_rank(lambda: companions(staging), target))
        agree(on_first_rank(lambda: write_report(staging, planned, found), target))


def _write(
    tensors: Iterable[Piece],
    staging: Path,
    planned: Mapping[str, Planned],
    written: Callable[[int], object],
    allow_nonfinite: bool,
) -> dict[str, str]:
    """Writes this rank's tensors; returns the sha256 of the tensors of all ranks. Collective.

    A rank that cannot write still consumes `tensors`, because the other ranks wait for it in `_gather`.
    """
    problem, found = None, {}
    with (
        torch.no_grad(),
        Writer(staging, planned, sharers=dist.get_world_size(), allow_nonfinite=lambda name: allow_nonfinite) as writer,
    ):
        try:
            for piece in tensors:
                if problem is None:
                    try:
                        writer.write(piece.name, piece.value, piece.first_row)
                        written(piece.value.nbytes)
                    except OSError as error:
                        problem = cannot_write(staging, error)
                    except UserError as error:  # a number is not finite
                        problem = str(error)
                # Otherwise it stays in memory while the next piece is made.
                del piece
        except UserError as error:  # the source cannot be read
            problem = problem or str(error)
        if problem is None:
            try:
                found = writer.finish()
            except OSError as error:
                problem = cannot_write(staging, error)
    agree(problem)
    return _share_checksums(staging, planned, found)


def _share_checksums(staging: Path, planned: Mapping[str, Planned], mine: dict[str, str]) -> dict[str, str]:
    """The sha256 of every tensor. A tensor that several ranks wrote is hashed by one rank now. Collective."""
    world, problem = dist.get_world_size(), None
    found = _united(mine)
    rest = [name for name in planned if name not in found]
    try:
        mine = checksums(staging, planned, rest[dist.get_rank() :: world], sharers=world)
    except OSError as error:
        problem = cannot_write(staging, error)
    agree(problem)
    return found | (_united(mine) if rest else {})


def _united(mine: dict[str, str]) -> dict[str, str]:
    return {name: value for one in gather(mine) for name, value in one.items()}


@contextmanager
def staged_together(target: Path, *, overwrite: bool, needed: int) -> Iterator[Path]:
    """`outputs.staged` for all ranks: rank 0 creates the staging directory, and publishes or removes it at the end. Collective.

    If the body of the `with` fails on one rank, it must fail on all (use `agree`); otherwise the other ranks wait here.
    """
    with ExitStack() as stack:
        agree(on_first_rank(lambda: stack.enter_context(staged(target, overwrite=overwrite, needed=needed))))
        yield staging_of(target)
        agree(on_first_rank(stack.close))


def _kinds(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype] | torch.dtype
) -> dict[str, torch.dtype]:
    if isinstance(dtypes, torch.dtype):
        return dict.fromkeys(shapes, dtypes)
    if unknown := [name for name in shapes if name not in dtypes]:
        raise UserError(
            f"no dtype is known for {some(unknown)}, which the source of this checkpoint does not have; give "
            "--torch_dtype bfloat16 or float32"
        )
    return {name: dtypes[name] for name in shapes}


def _gather_owned(part: ModelPart, exported: Sequence[NamedParameter]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for mine in gather(_spoken_for(part, exported)):
        twice = shapes.keys() & mine.keys()
        assert not twice, f"two ranks own {sorted(twice)[:3]}"
        shapes.update(mine)
    return shapes


def _in_order(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Sorted with numbers in numeric order, so that layers follow each other and a file contains whole layers."""

    def key(name: str) -> list[tuple[int, str | int]]:
        return [(1, int(word)) if word.isdigit() else (0, word) for word in re.split(r"(\d+)", name)]

    return {name: shapes[name] for name in sorted(shapes, key=key)}
