"""Which slices of Hugging Face tensors make up a rank's parameter.

This is arithmetic on a rule and a rank's number along its axis; there is no communication.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from swift_mega.convert.files.spans import stacked
from swift_mega.models.family import Rule
from swift_mega.models.packs import Heads


@dataclass(frozen=True)
class Slice:
    """[start, stop) along dim `axis` of a Hugging Face tensor, or the whole tensor (axis None): the arguments of `Checkpoint.read`."""

    name: str
    axis: int | None = None
    start: int = 0
    stop: int | None = None


def slices(
    rule: Rule, tensors: Mapping[str, Sequence[int]], *, rank_size: tuple[int, int], heads: Heads, rows: int
) -> list[Slice]:
    """The slices of `tensors` that this rank holds, in the order of `tensors`: its shard of each part. A slice may be empty.

    tensors: name -> unsharded shape. rank_size: (rank, size) of the mesh axis that shards the parameter.
    rows: size of dim 0 of the parameter on this rank. For a padded vocabulary, rows * size may exceed the size of the tensor.
    """
    pack, (rank, size) = rule.pack, rank_size
    axis = pack.axis
    if axis is None:
        return [Slice(name) for name in tensors]
    if pack.padded:
        return [
            Slice(name, 0, min(rows * rank, shape[0]), min(rows * (rank + 1), shape[0]))
            for name, shape in tensors.items()
        ]
    parts = [(name, *ends) for name, shape in tensors.items() for ends in pack.ranges(shape[axis], heads)]
    local = pack.rows(heads.on(rank, size))
    if local is None:
        local = tuple(((end - start) * rank // size, (end - start) * (rank + 1) // size) for _, start, end in parts)
    return [
        Slice(name, axis, start + first, start + last)
        for (name, start, _), (first, last) in zip(parts, local, strict=True)
    ]


def rows_of(shape: Sequence[int]) -> int:
    """Size of dim 0 of a parameter; 1 for a scalar."""
    return shape[0] if shape else 1


def together(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Merges the names `X[0]`, `X[1]`, … into one tensor X that has them along dim 0; other tensors stay as they are."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        whole, index = stacked(name)
        count = found[whole][0] if whole in found else 0
        found[whole] = shape if index is None else (max(count, index + 1), *shape)
    return found
