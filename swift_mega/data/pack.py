"""Examples, and how they lie in one row of tokens.

A microbatch is a single row: examples stand one after another, positions restart and `cu_seqlens` says where each begins,
so attention never crosses from one to the next and no padding stands between them, but where Transformer Engine's context
parallelism wants examples of some multiple. That padding counts as the end of its example: attention is causal, so no real token
sees it. Packing is then only the choice of
which examples share a row: best-fit decreasing, which fills typical mixes to more than 99 per cent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swift_mega.errors import UserError

IGNORED = -100
"""The label of a position without loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One tokenised row. tokens: [n] int32; trained: [n] bool, whether the model learns to produce that token."""

    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def targets(self) -> int:
        """Number of tokens with a loss; the first token has none, since nothing stands before it."""
        return int(self.trained[1:].sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class Microbatch:
    """One row of t tokens: n examples after each other, the padding at the end (if any) being one more of them, without a token.

    tokens: [t] int64. labels: [t] int64, the token that follows, -100 where it has no loss; the last token of an example
    has none. positions: [t] int64, from 0 in each example; 0 in padding. cu_seqlens: [n + 1] int32, where examples begin, and t.
    lengths: [n] int32, tokens of each example without the padding behind it.

    All are on the host. Of the row that a model is given only tokens and positions are on the device: how many labels there are and where
    examples begin decide the sizes of tensors, and the host would wait for a device that it asks.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    lengths: Tensor

    @property
    def targets(self) -> int:
        """Number of tokens with a loss."""
        return int((self.labels != IGNORED).sum())

    @property
    def padding(self) -> Tensor | None:
        """[t] bool, which tokens are padding; None: none is."""
        total = len(self.tokens)
        if int(self.lengths.sum()) == total:
            return None
        padding = torch.ones(total, dtype=torch.bool)
        for start, length in zip(self.cu_seqlens.tolist(), self.lengths.tolist(), strict=False):
            padding[start : start + length] = False
        return padding

    @property
    def max_length(self) -> int:
        """Tokens of the longest example."""
        return int(self.lengths.max())


def pack_examples(lengths: Sequence[int] | NDArray[np.int64], max_length: int, pad_each: int = 1) -> list[list[int]]:
    """Rows of example indices, each of at most `max_length` tokens, by best-fit decreasing; equal input, equal rows.

    lengths: tokens of each example. Each example goes, longest first, into the fullest row that still has room for it. With pad_each,
    all numbers of tokens count as rounded up to a multiple of it.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and int(sizes.max()) > max_length:
        longest = int(sizes.argmax())
        raise UserError(
            f"example {longest} has {int(sizes[longest])} tokens and does not fit into a row of {max_length}; raise "
            "data.max_length or choose data.truncation"
        )
    sizes, max_length = rounded_up(sizes, pad_each), int(rounded_up(max_length, pad_each))
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(max_length + 1)]
    # Bit r of `open_rooms` says that some row has room for exactly r tokens: the fullest row that fits is then the
    # lowest bit at or above the length, a few operations on one integer in place of a search tree.
    open_rooms = 0
    for index, size in zip(np.argsort(-sizes, kind="stable").tolist(), np.sort(-sizes).tolist(), strict=True):
        size = -size
        fitting = open_rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                open_rooms ^= 1 << room
            rows[row].append(index)
        else:
            room, row = max_length, len(rows)
            rows.append([index])
        left = room - size
        if left:
            if not by_room[left]:
                open_rooms |= 1 << left
            by_room[left].append(row)
    return rows


def rounded_up(tokens: Any, multiple: int) -> Any:
    """The next multiple, of a number or of each in an array."""
    return -(-tokens // multiple) * multiple


def collate(examples: Sequence[Example], pad_to: int = 1, *, pad_each: int = 1, pad_token: int = 0) -> Microbatch:
    """One row of all `examples` in order, each padded to a multiple of `pad_each` tokens and the row at its end to one of `pad_to`.

    The padding is `pad_token` and without loss; at the row's end it is a segment of its own. So it changes no other token's result.
    """
    assert examples, "a microbatch holds at least one example"
    assert pad_to % pad_each == 0, (pad_to, pad_each)
    lengths = np.array([len(example) for example in examples])
    room = rounded_up(lengths, pad_each)
    if padding := -int(room.sum()) % pad_to:
        lengths, room = np.append(lengths, 0), np.append(room, padding)
    bounds = np.concatenate(([0], room.cumsum()))
    tokens = np.full(bounds[-1], pad_token, dtype=np.int64)
    labels, positions = np.full(len(tokens), IGNORED, dtype=np.int64), np.zeros(len(tokens), dtype=np.int64)
    for example, start in zip(examples, bounds.tolist(), strict=False):
        end = start + len(example)
        tokens[start:end] = example.tokens
        # The first token of an example follows no token of it, and after the last one nothing is known.
        labels[start : end - 1] = np.where(example.trained[1:], example.tokens[1:], IGNORED)
        positions[start:end] = np.arange(len(example))
    return Microbatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        lengths=torch.from_numpy(lengths.astype(np.int32)),
    )


def padding_row(pad_to: int = 1, *, pad_token: int = 0) -> Microbatch:
    """A row of padding alone, as short as can be: for a rank that takes part in a step and has no example left for it."""
    length = int(rounded_up(2, pad_to))
    return Microbatch(
        tokens=torch.full((length,), pad_token, dtype=torch.int64),
        labels=torch.full((length,), IGNORED, dtype=torch.int64),
        positions=torch.zeros(length, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        lengths=torch.zeros(1, dtype=torch.int32),
    )
