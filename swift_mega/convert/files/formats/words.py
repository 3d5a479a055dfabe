"""Small unsigned integers packed into int32 words, as GPTQ and AWQ pack them along one dim of a matrix."""

import torch
from torch import Tensor

from swift_mega.convert.files.tensors import TensorSource
from swift_mega.errors import UserError

WORD = 32
SCALES = (torch.float16, torch.bfloat16, torch.float32)


def unpack(words: Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> Tensor:
    """int32 words [..., n, ...] -> the unsigned integers in them, [..., n * 32 / bits, ...] along `dim`, int32.

    order: which field of its word each integer is stored in; default: from the lowest bits upwards.
    """
    shifts = torch.tensor(order or range(WORD // bits), dtype=torch.int32) * bits
    shape = [1] * (words.dim() + 1)
    shape[dim + 1] = len(shifts)
    return (words.unsqueeze(dim + 1) >> shifts.view(shape)).bitwise_and_((1 << bits) - 1).flatten(dim, dim + 1)


def trim(values: Tensor, dim: int, wanted: tuple[int, int], each: int) -> Tensor:
    """The range `wanted` along `dim` of `values`, which were unpacked from whole words of `each` integers."""
    return values.narrow(dim, wanted[0] % each, wanted[1] - wanted[0])


def matrix(checkpoint: TensorSource, name: str) -> tuple[int, int]:
    """The shape of a stored matrix; UserError where it does not have two dims."""
    shape = checkpoint.entries[name].shape
    if len(shape) != 2:
        raise UserError(
            f"{checkpoint.directory}: {name} has shape {list(shape)}, not a matrix of packed words; copy the checkpoint again"
        )
    return shape[0], shape[1]
