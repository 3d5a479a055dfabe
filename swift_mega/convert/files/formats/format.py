"""The interface of a storage format of quantised weights.

A format says which stored tensors make up a weight, which part of each of them a box of the weight needs, and how to dequantise it.
A box is a range along every dim. A format only does arithmetic on boxes and tensors and opens no file. So a slice, a chunk and the whole
weight are dequantised by the same code, and give the same bits.
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
        """Shape of the plain weight."""

    @property
    def parts(self) -> Mapping[str, str]:
        """role -> name of a stored tensor that the weight is made of."""

    def boxes(self, box: Box) -> Mapping[str, Box]:
        """role -> the box of that part which a box of the weight needs."""

    def dequantise(self, parts: Mapping[str, Tensor], box: Box) -> Tensor:
        """The box of the weight in float32, from `boxes(box)` of its parts. UserError where a part has an invalid value."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The quantised weights of a checkpoint, by the name of the plain weight, and stored tensors that nothing needs."""

    weights: Mapping[str, Quantised]
    unneeded: frozenset[str] = frozenset()
    """For example scales of activations, which plain weights do not need."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A storage format of quantised weights."""

    methods: tuple[str, ...]
    """The values of `quant_method` that select it."""
    find: Callable[[TensorSource, Mapping[str, Any]], Found]
    """The weights of a checkpoint, given its quantisation config. UserError where a tensor is missing, left over, or of wrong shape."""


def ceil(count: int, size: int) -> int:
    """ceil(count / size): the number of blocks of `size` for `count` numbers."""
    return -(-count // size)


def blocks(span: tuple[int, int], size: int) -> tuple[int, int]:
    """[first, last + 1) of the blocks of `size` that overlap the range `span`."""
    return span[0] // size, ceil(span[1], size)


def modules(checkpoint: TensorSource, needed: Sequence[str], optional: Sequence[str] = ()) -> Iterator[str]:
    """Modules with tensors of the suffixes `needed`; UserError where a module has one of the suffixes but lacks one of `needed`."""
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
