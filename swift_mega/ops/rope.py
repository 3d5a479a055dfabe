"""Rotary position embedding of tokens that carry their own positions.

The rotation is orthogonal, so its backward is the rotation by the opposite angle: nothing but the two tables is saved.
"""

from typing import Any

import torch
from torch import Tensor


def tables(positions: Tensor, inverse_frequencies: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each [tokens, 1, rotary_dim / 2], of `positions` [tokens]; in float32 for every dtype, like Hugging Face.

    `scale` multiplies both (the attention factor of YaRN, arXiv:2309.00071).
    """
    angles = positions.float()[:, None, None] * inverse_frequencies
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    out = torch.empty_like(x)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
    out[..., 2 * half :] = rest
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the leading 2 * cos.shape[-1] features of x [tokens, heads, head_dim]; half-split pairs, as in GPT-NeoX."""
    return _Rotate.apply(x, cos, sin)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` in plain differentiable torch."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
