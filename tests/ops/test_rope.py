"""Rotary embedding equals complex multiplication in float64, value and gradient; its tables equal Hugging Face's."""

import pytest
import torch
from torch import Tensor

from swift_mega.ops.rope import rotate, rotate_reference, tables


def _complex(x: Tensor, angles: Tensor, scale: float) -> Tensor:
    """Features i and i + rotary_dim / 2 are one complex number, rotated by its angle. angles: [tokens, 1, rotary_dim / 2]."""
    half = angles.shape[-1]
    x = x.double()
    numbers = torch.complex(x[..., :half], x[..., half : 2 * half])
    turned = numbers * torch.polar(torch.full_like(angles, scale), angles)
    return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), dim=-1)


@pytest.mark.parametrize("function", [rotate, rotate_reference])
@pytest.mark.parametrize(("head_dim", "rotary"), [(16, 16), (16, 8), (6, 2)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_value_and_gradient_equal_complex_multiplication(function, head_dim, rotary, dtype, tolerance):
    """Also where the rotary dim is smaller than the head, and with YaRN's factor, which multiplies the gradient too."""
    torch.manual_seed(0)
    angles = 7 * torch.randn(8, 1, rotary // 2, dtype=torch.float64)
    x = torch.randn(8, 3, head_dim, dtype=dtype, requires_grad=True)
    above = torch.randn_like(x)
    got = function(x, (1.25 * angles.cos()).to(dtype), (1.25 * angles.sin()).to(dtype))
    want = _complex(x, angles, 1.25)
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance, check_dtype=False)
    (found,) = torch.autograd.grad(got, x, above)
    (expected,) = torch.autograd.grad(want, x, above.double())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance, check_dtype=False)


def test_tables_of_packed_positions():
    """Every token has its own position; the factor multiplies both tables."""
    positions, frequencies = torch.tensor([0, 1, 2, 0, 1, 77]), 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    cos, sin = tables(positions, frequencies, 1.25, torch.float32)
    angles = positions.double()[:, None, None] * frequencies.double()
    torch.testing.assert_close(cos.double(), 1.25 * angles.cos(), rtol=0, atol=1e-5)
    torch.testing.assert_close(sin.double(), 1.25 * angles.sin(), rtol=0, atol=1e-5)


def test_input_is_left_as_it_is():
    x = torch.randn(4, 2, 8)
    kept = x.clone()
    cos, sin = tables(torch.arange(4), torch.rand(4), 1.0, x.dtype)
    rotate(x, cos, sin)
    assert torch.equal(x, kept)


def test_part_of_a_wider_tensor():
    """Megatron passes a slice of the fused projection's output, and gradients may have any strides."""
    wide = torch.randn(5, 4, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = tables(torch.arange(5), torch.rand(4), 1.0, wide.dtype)
    above = torch.randn(2, 5, 8, dtype=torch.float64).transpose(0, 1)
    (found,) = torch.autograd.grad(rotate(wide[:, 1:3], cos, sin), wide, above)
    (expected,) = torch.autograd.grad(rotate_reference(wide[:, 1:3], cos, sin), wide, above)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_tables_are_float32_like_hugging_face():
    """Angles of large positions are rounded to float32 before the cosine, whatever the model's dtype: the rounding is part of the model."""
    positions, frequencies = torch.tensor([131071]), torch.tensor([0.7310586])
    cos, _ = tables(positions, frequencies, 1.0, torch.bfloat16)
    assert cos.item() == (positions.float() * frequencies).cos().bfloat16().item()
