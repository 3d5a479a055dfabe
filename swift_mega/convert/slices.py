"""Which slice of a Hugging Face tensor a rank's parameter is made of: arithmetic on a rule and a place, no rank talks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from swift_mega.convert.spans import stacked
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
    rule: Rule, name: str, shape: Sequence[int], *, cut: tuple[int, int], heads: Heads, rows: int
) -> list[Slice]:
    """What a rank holds of tensor `name` of this whole shape: its share of each part in it, in the order of the rule's pack.

    cut: (rank, size) of the axis that cuts the parameter; rows: the parameter's on this rank, which for a vocabulary may reach
    beyond its end.
    """
    axis, (rank, size) = rule.pack.axis, cut
    if axis is None:
        return [Slice(name)]
    if rule.pack.padded:
        return [Slice(name, 0, min(rows * rank, shape[0]), min(rows * (rank + 1), shape[0]))]
    return [
        Slice(name, axis, start + (end - start) * rank // size, start + (end - start) * (rank + 1) // size)
        for start, end in rule.pack.ranges(shape[axis], heads)
    ]


def together(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """`X[0]`, `X[1]`, … as the one Hugging Face tensor X that they are along its first dim; other tensors as they are."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        whole, index = stacked(name)
        count = found[whole][0] if whole in found else 0
        found[whole] = shape if index is None else (max(count, index + 1), *shape)
    return found
