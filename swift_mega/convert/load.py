"""A Hugging Face directory into this rank's parameters: only its slices are read."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from swift_mega.convert.check import check_coverage, needs
from swift_mega.convert.hf_files import Checkpoint
from swift_mega.errors import UserError
from swift_mega.models.build import Held, ModelPart


def load(part: ModelPart, checkpoint: Checkpoint) -> None:
    """Fills every base parameter of `part` from `checkpoint`. Collective: all ranks call it; raises UserError on all alike."""
    check_coverage(part.family, checkpoint, _all_needs(part), tied=part.settings.tied)
    with torch.no_grad():
        for held, value in values(part, checkpoint):
            held.parameter.copy_(value)


def values(part: ModelPart, checkpoint: Checkpoint) -> Iterator[tuple[Held, Tensor]]:
    """This rank's parameters and what the checkpoint says they hold, in the checkpoint's dtype."""
    for held in part.held():
        rank, size = part.tensor_axis(held)
        pieces = [piece for name in held.parts for piece in pieces_of(part, checkpoint, name, held, rank, size)]
        value = held.rule.pack.join(pieces, part.settings.heads)
        assert value.shape == held.parameter.shape, (
            f"{held.name}: {tuple(value.shape)} for {tuple(held.parameter.shape)}"
        )
        yield held, value


def pieces_of(part: ModelPart, checkpoint: Checkpoint, name: str, held: Held, rank: int, size: int) -> list[Tensor]:
    """What this rank holds of one Hugging Face tensor: of each part in it, its share; zeros beyond a vocabulary's end."""
    pack = held.rule.pack
    if pack.axis is None:
        return [checkpoint.read(name)]
    length = checkpoint.entries[name].shape[pack.axis]
    if pack.padded:
        return [_padded(checkpoint, name, held, rank, length)]
    return [
        checkpoint.read(
            name, pack.axis, start + (end - start) * rank // size, start + (end - start) * (rank + 1) // size
        )
        for start, end in pack.ranges(length, part.settings.heads)
    ]


def _padded(checkpoint: Checkpoint, name: str, held: Held, rank: int, length: int) -> Tensor:
    rows = held.parameter.shape[0]
    real = checkpoint.read(name, 0, min(rows * rank, length), min(rows * (rank + 1), length))
    missing = rows - real.shape[0]
    return torch.cat((real, real.new_zeros(missing, *real.shape[1:]))) if missing else real


def _all_needs(part: ModelPart) -> dict[str, tuple[int, ...]]:
    """`needs` of all ranks together; one rank speaks for every stage and set of experts."""
    mine = needs(part) if part.coordinate.expert_tensor == 0 and part.coordinate.expert_data == 0 else {}
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mine
    gathered: list[dict[str, tuple[int, ...]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, mine)
    union: dict[str, tuple[int, ...]] = {}
    for wanted in gathered:
        for name, shape in wanted.items():
            if union.setdefault(name, shape) != shape:
                raise UserError(
                    f"ranks disagree on the shape of {name}: {union[name]} and {shape}; start all ranks with one recipe"
                )
    return union
