"""Examples, and how they are stored in one packed row of tokens.

A microbatch is one packed row: examples one after another. Positions restart at 0 in each example, and `cu_seqlens` says where each
example begins, so attention never crosses from one example to the next. There is no padding between examples, except where Transformer
Engine's context parallelism needs examples of a multiple of some length. This padding counts as the end of its example: attention is
causal, so no real token sees it. Packing is then only the choice of the examples that share a row. It is best-fit decreasing, which
fills typical data to more than 99 per cent.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swift_mega.errors import UserError

IGNORED = -100
"""The label of a token without loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One tokenised data row. tokens: [n] int32. trained: [n] bool, whether the model learns to predict this token.

    numbers: what the objective reads of the data row beside its text, by column.
    """

    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    numbers: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def targets(self) -> int:
        """Number of tokens with a loss; the first token has none, because no token precedes it."""
        return int(self.trained[1:].sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class Microbatch:
    """One packed row of t tokens: n examples one after another. Padding at the end of the row counts as one more example of length 0.

    tokens: [t] int64. labels: [t] int64, the next token, -100 where it has no loss; the last token of an example has no label.
    positions: [t] int64, from 0 in each example; 0 in padding. Or [axes, t], for a model whose rotation has sections (`Rope.sections`).
    cu_seqlens: [n + 1] int32, the begin of each example, then t. lengths: [n] int32, tokens of each example without the padding after it.
    numbers: column -> [examples] float64, what the objective reads of the data beside text (`Example.numbers`).

    All tensors are on the host. For the forward pass, only tokens and positions are copied to the device. The number of labels and the
    begins of examples decide sizes of tensors, and the host would have to wait for the device to read them.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    lengths: Tensor
    numbers: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def examples(self) -> int:
        """Number of examples; padding at the end of the row is none."""
        return int((self.lengths > 0).sum())

    @property
    def targets(self) -> int:
        """Number of tokens with a loss."""
        return int((self.labels != IGNORED).sum())

    @property
    def padding(self) -> Tensor | None:
        """[t] bool, True for padding; None where no token is padding."""
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
    """Packed rows as lists of example indices, each of at most `max_length` tokens, by best-fit decreasing. Deterministic.

    lengths: tokens of each example. Examples are placed longest first; each goes into the fullest row that still has room for it.
    With pad_each, all lengths are rounded up to a multiple of it.
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
    # Bit r of `open_rooms` is set where some row has room for exactly r tokens. The fullest row that fits is then the lowest set bit
    # at or above the length: a few operations on one integer, instead of a search tree.
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
    """A number, or each number of an array, rounded up to a multiple."""
    return -(-tokens // multiple) * multiple


def collate(examples: Sequence[Example], pad_to: int = 1, *, pad_each: int = 1, pad_token: int = 0) -> Microbatch:
    """One packed row of all `examples` in order. Each example is padded to a multiple of `pad_each` tokens, the row to one of `pad_to`.

    Padding is `pad_token` without loss. Padding at the end of the row is a segment of its own in cu_seqlens. So padding changes no
    other token's result.
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
        # The first token of an example is no label, because no token precedes it. The last token has no label.
        labels[start : end - 1] = np.where(example.trained[1:], example.tokens[1:], IGNORED)
        positions[start:end] = np.arange(len(example))
    return Microbatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        lengths=torch.from_numpy(lengths.astype(np.int32)),
        numbers={
            name: torch.tensor([example.numbers[name] for example in examples], dtype=torch.float64)
            for name in examples[0].numbers
        },
    )


def padding_row(pad_to: int = 1, *, pad_token: int = 0, numbers: Iterable[str] = ()) -> Microbatch:
    """The shortest row of padding only, for a rank that takes part in a step but has no example left.

    numbers: the columns of `Microbatch.numbers` that other rows have.
    """
    length = int(rounded_up(2, pad_to))
    return Microbatch(
        tokens=torch.full((length,), pad_token, dtype=torch.int64),
        labels=torch.full((length,), IGNORED, dtype=torch.int64),
        positions=torch.zeros(length, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        lengths=torch.zeros(1, dtype=torch.int32),
        numbers={name: torch.empty(0, dtype=torch.float64) for name in numbers},
    )
