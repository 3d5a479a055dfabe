"""What an on-disk format of quantised weights has to say: which tensors are one weight, what a part of it needs, what the numbers are.

A format is arithmetic on boxes, ranges along every dim: the box of a weight that is asked for becomes the box of each stored
tensor that it is made of. It opens no file, so a cut, a chunk and the whole go the same way and give the same bits.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from swift_mega.convert.files.hf_files import some
from swift_mega.convert.files.tensors import TensorSource
from swift_mega.errors import UserError

Box = tuple[tuple[int, int], ...]
"""[start, stop) along every dim."""


class Quantised(Protocol):
    """One weight that is stored quantised."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""

    @property
    def parts(self) -> Mapping[str, str]:
        """The stored tensors it is made of, by their role."""

    def boxes(self, box: Box) -> Mapping[str, Box]:
        """What a box of the weight needs of each part, by role."""

    def dequantise(self, parts: Mapping[str, Tensor], box: Box) -> Tensor:
        """The box of the weight in float32, from those boxes of its parts. UserError where a part holds what it may not."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The quantised weights of a checkpoint by the name that the plain weight has, and stored tensors that nothing needs."""

    weights: Mapping[str, Quantised]
    unneeded: frozenset[str] = frozenset()
    """Such as scales of activations, which plain weights have no use for."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A way of storing quantised weights."""

    methods: tuple[str, ...]
    """The `quant_method` values that mean it."""
    find: Callable[[TensorSource, Mapping[str, Any]], Found]
    """The weights of a checkpoint, given its quantisation config. UserError where a tensor is missing, left over, or of odd shape."""


def ceil(count: int, size: int) -> int:
    """Blocks of `size` that `count` takes."""
    return -(-count // size)


def blocks(span: tuple[int, int], size: int) -> tuple[int, int]:
    """The blocks of `size` that a range touches."""
    return span[0] // size, ceil(span[1], size)


def modules(checkpoint: TensorSource, needed: Sequence[str], optional: Sequence[str] = ()) -> Iterator[str]:
    """Modules that have tensors with one of the suffixes `needed`; UserError where a module has only some of these."""
    suffixes = (*needed, *optional)
    names = checkpoint.entries
    found = {name.removesuffix(end) for name in names for end in suffixes if name.endswith(end)}
    for module in sorted(found):
        if missing := [module + end for end in needed if module + end not in names]:
            there = [module + end for end in suffixes if module + end in names]
            raise UserError(
                f"{checkpoint.directory} has {some(there)} without {some(missing)}, and a weight needs them all; copy the "
                "checkpoint from the source again"
            )
        yield module


def check_tensor(
    checkpoint: TensorSource, name: str, shape: Sequence[int], kinds: Sequence[torch.dtype], why: str
) -> None:
    """UserError unless a stored tensor has this shape and one of these dtypes."""
    entry = checkpoint.entries[name]
    if entry.shape != tuple(shape) or entry.dtype not in kinds:
        wanted = " or ".join(str(kind).removeprefix("torch.") for kind in kinds)
        raise UserError(
            f"{checkpoint.directory}: {name} is {list(entry.shape)} {str(entry.dtype).removeprefix('torch.')}, and {why} needs "
            f"{list(shape)} {wanted}; use the config.json of this checkpoint, or copy it again"
        )
