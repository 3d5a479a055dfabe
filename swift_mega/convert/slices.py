"""Which slice of a Hugging Face tensor a rank's parameter is made of: arithmetic on a rule and a place, no rank talks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from swift_mega.convert.files.spans import stacked
from swift_mega.models.family import Rule
from swift_mega.models.packs import Heads


@dataclass(frozen=True)
class Slice:
    """[start, stop) along `axis` of a Hugging Face tensor, or all of it (axis None), as `Checkpoint.read` takes it."""

    name: str
    axis: int | None = None
    start: int = 0
    stop: int | None = None


def slices(
    rule: Rule, tensors: Mapping[str, Sequence[int]], *, cut: tuple[int, int], heads: Heads, rows: int
) -> list[Slice]:
    """What a rank holds of the tensors in a parameter, in their order: its share of each part in them, which may be empty.

    tensors: name -> whole shape; cut: (rank, size) of the axis that cuts the parameter; rows: the parameter's on this rank, which
    for a vocabulary may reach beyond its end.
    """
    pack, (rank, size) = rule.pack, cut
    axis = pack.axis
    if axis is None:
        return [Slice(name) for name in tensors]
    if pack.padded:
        return [
            Slice(name, 0, min(rows * rank, shape[0]), min(rows * (rank + 1), shape[0]))
            for name, shape in tensors.items()
        ]
    parts = [(name, *ends) for name, shape in tensors.items() for ends in pack.ranges(shape[axis], heads)]
    held = pack.rows(heads.on(rank, size))
    if held is None:
        held = tuple(((end - start) * rank // size, (end - start) * (rank + 1) // size) for _, start, end in parts)
    return [
        Slice(name, axis, start + first, start + last)
        for (name, start, _), (first, last) in zip(parts, held, strict=True)
    ]


def rows_of(shape: Sequence[int]) -> int:
    """Rows of a parameter; a single number, of no dim, is one."""
    return shape[0] if shape else 1


def together(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """`X[0]`, `X[1]`, … as the one Hugging Face tensor X that they are along its first dim; other tensors as they are."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        whole, index = stacked(name)
        count = found[whole][0] if whole in found else 0
        found[whole] = shape if index is None else (max(count, index + 1), *shape)
    return found
