"""Loads a Hugging Face directory into this rank's parameters.

A rank reads only the slices that it needs. The first data replica reads them, and broadcasts them to the other replicas.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from swift_mega.convert.check import check_coverage, needs
from swift_mega.convert.files.finite import check_finite, is_finite
from swift_mega.convert.files.progress import bytes_bar
from swift_mega.convert.files.tensors import TensorSource
from swift_mega.convert.slices import Slice, rows_of, slices
from swift_mega.errors import UserError
from swift_mega.models.build import ModelPart, NamedParameter
from swift_mega.models.family import Rule
from swift_mega.models.packs import Heads
from swift_mega.parallel.agree import agree, attempt, gather
from swift_mega.parallel.groups import Groups

Prepare = Callable[[NamedParameter], Callable[[Tensor], None] | None]
"""How a weight is kept (`Tuner.prepare`): None: as a parameter; else a function that takes this rank's value."""


def as_parameter(named: NamedParameter) -> None:
    """Keeps every weight as a parameter."""


def load(part: ModelPart, checkpoint: TensorSource, groups: Groups, *, prepare: Prepare = as_parameter) -> None:
    """Fills every base parameter of `part` from `checkpoint`. Collective; a UserError is raised on all ranks.

    prepare: says how each weight is kept. Where it returns a function, the parameter is emptied before anything is read, and the function
    gets the value on the parameter's device; one such value exists at a time.

    The first data replica reads, and broadcasts to the others: the network is faster than every replica reading the files. The others
    wait for it in `agree`. A broadcast would time out where reading takes longer than the timeout of a collective.
    """
    check_coverage(part.family, part.settings, checkpoint, _all_needs(part))
    problem: str | None = None
    keepers = {
        id(named.parameter): (keep, named.parameter.shape)
        for named in part.named_parameters()
        if (keep := prepare(named))
    }
    kept = [named for named in part.named_parameters() if id(named.parameter) in keepers]
    mine = [
        (named, *_replicas(part, named, groups))
        for named in part.named_parameters()
        if id(named.parameter) not in keepers
    ]
    for named in kept:
        named.parameter.data = named.parameter.new_empty(0)
    with torch.no_grad(), bytes_bar(sum(named.parameter.nbytes for named, *_ in mine), "loading") as bar:
        # Every replica reads these by itself, since they cannot all wait in memory for a broadcast.
        for named in kept:
            if problem is None:
                said, broken = attempt(partial(_read_kept, part, checkpoint, named, *keepers[id(named.parameter)]))
                problem = broken or said
        for named, _, first in mine:
            if first and problem is None:
                said, broken = attempt(partial(_read, part, checkpoint, named))
                problem = broken or said
                bar.update(named.parameter.nbytes)
        agree(problem)
        for named, replicas, first in mine:
            if replicas.size() > 1:
                dist.broadcast(named.parameter.data, group=replicas, group_src=0)
            bar.update(0 if first else named.parameter.nbytes)


def _read_kept(
    part: ModelPart, checkpoint: TensorSource, named: NamedParameter, keep: Callable[[Tensor], None], shape: torch.Size
) -> str | None:
    """Reads one weight, gives it to `keep` and empties the parameter; returns what `_read` does."""
    named.parameter.data = named.parameter.new_empty(shape)
    said = _read(part, checkpoint, named)
    keep(named.parameter.data)
    named.parameter.data = named.parameter.new_empty(0)
    return said


def _read(part: ModelPart, checkpoint: TensorSource, named: NamedParameter) -> str | None:
    """Fills one parameter from its files; returns an error message where a number is not finite."""
    pieces = slices_of(part, checkpoint, named)
    fill(named.parameter.data, checkpoint, named.rule, pieces, part.heads)
    return not_finite(named.parameter, checkpoint, pieces)


def not_finite(value: Tensor, checkpoint: TensorSource, pieces: Sequence[Slice]) -> str | None:
    """The error message for a parameter that holds NaN or infinity, with the name of the Hugging Face tensor; None where all are finite.

    It is returned, not raised: the rank must continue, since other ranks wait for its broadcasts.
    """
    if is_finite(value):
        return None
    try:
        for piece in pieces:
            check_finite(piece.name, checkpoint.read(piece.name, piece.axis, piece.start, piece.stop))
    except UserError as error:
        return f"{checkpoint.directory}: {error}"
    return f"{checkpoint.directory}: {pieces[0].name} has values beyond the range of {value.dtype}; load it in a wider dtype"


def _replicas(part: ModelPart, named: NamedParameter, groups: Groups) -> tuple[dist.ProcessGroup, bool]:
    """The group of ranks that hold the same shard of this parameter, and whether this rank is the first of it."""
    group = groups.expert_data if named.expert else groups.data_context
    return group, dist.get_rank(group) == 0


def fill(value: Tensor, checkpoint: TensorSource, rule: Rule, pieces: Sequence[Slice], heads: Heads) -> None:
    """Fills `value` from its slices. They are read straight into memory where the pack gives views for them (`places`).

    Padding rows of a vocabulary are set to zero.
    """
    pack = rule.pack
    if pack.padded:
        (piece,) = pieces
        real = (piece.stop or 0) - piece.start
        value[real:].zero_()
        value = value[:real]
    places = pack.places(value, heads)
    if places is None:
        read = [checkpoint.read(piece.name, piece.axis, piece.start, piece.stop) for piece in pieces]
        value.copy_(pack.join(read, heads))
        return
    for place, piece in zip(places, pieces, strict=True):
        checkpoint.read_into(place, piece.name, piece.axis, piece.start, piece.stop)


def slices_of(part: ModelPart, checkpoint: TensorSource, named: NamedParameter) -> list[Slice]:
    """The slices that this rank reads for a parameter."""
    return slices(
        named.rule,
        {name: checkpoint.shape(name) for name in named.parts},
        rank_size=part.tensor_axis(named),
        heads=part.heads,
        rows=rows_of(named.parameter.shape),
    )


def _all_needs(part: ModelPart) -> dict[str, tuple[int, ...]]:
    """The union of `needs` over all ranks. Only ranks with expert_tensor = expert_data = 0 send theirs: one per stage and expert rank."""
    mine = needs(part) if part.coordinate.expert_tensor == 0 and part.coordinate.expert_data == 0 else {}
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mine
    union: dict[str, tuple[int, ...]] = {}
    for wanted in gather(mine):
        for name, shape in wanted.items():
            if union.setdefault(name, shape) != shape:
                raise UserError(
                    f"ranks disagree on the shape of {name}: {union[name]} and {shape}; start all ranks with one recipe"
                )
    return union
