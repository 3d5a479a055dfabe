"""Rotary position embedding. Positions are given as data: one per token, or one per axis and token (M-RoPE, arXiv:2409.12191).

The rotation is orthogonal, so its backward is the rotation by the opposite angle: only the two tables are saved.
"""

from typing import Any

import torch
from torch import Tensor

from swift_mega.ops.kernels import AUTO, Form, Kernels, Op


def tables(
    positions: Tensor, inverse_frequencies: Tensor, scale: float, dtype: torch.dtype, axes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each [tokens, 1, rotary_dim / 2]. Computed in float32 for every dtype, as in Hugging Face.

    positions: [tokens], or [axes, tokens]. axes: [rotary_dim / 2] int64, the axis that gives each rotated pair its position; it is read
    only where positions have several axes. inverse_frequencies: [rotary_dim / 2], or [tokens, 1, rotary_dim / 2].
    scale: multiplies both tables (the attention factor of YaRN, arXiv:2309.00071).
    """
    places = positions.float()
    if positions.dim() == 2:
        assert axes is not None, "positions of several axes, and no axis for each pair"
        angles = places[axes].t()[:, None] * inverse_frequencies
    else:
        angles = places[:, None, None] * inverse_frequencies
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def _halves(x: Tensor, half: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The two features of each rotated pair, as two views of x."""
    if interleaved:
        return x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2]
    return x[..., :half], x[..., half : 2 * half]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    half = cos.shape[-1]
    first, second = _halves(x, half, interleaved)
    out = torch.empty_like(x)
    first_out, second_out = _halves(out, half, interleaved)
    torch.mul(first, cos, out=first_out).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=second_out).addcmul_(first, sin)
    out[..., 2 * half :] = x[..., 2 * half :]
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotated(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin, ctx.interleaved), None, None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, kernels: Kernels = AUTO) -> Tensor:
    """Rotates the leading 2 * cos.shape[-1] features of x [tokens, heads, head_dim].

    Features i and i + half are rotated as a pair, as in GPT-NeoX; with `interleaved`, 2i and 2i + 1, as in GPT-J.
    """
    return kernels.form(ROPE, x.device, x.dtype).run(x, cos, sin, interleaved)  # type: ignore[no-any-return]


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """`rotate` in plain differentiable torch."""
    half = cos.shape[-1]
    first, second = _halves(x, half, interleaved)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    joined = torch.stack(rotated, dim=-1).flatten(-2) if interleaved else torch.cat(rotated, dim=-1)
    return torch.cat((joined, x[..., 2 * half :]), dim=-1)


ROPE = Op(
    "rope",
    (
        Form("tuned", "gradient by the opposite rotation", _Rotate.apply),
        Form("reference", "torch", rotate_reference),
    ),
)
