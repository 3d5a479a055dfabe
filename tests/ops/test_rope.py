"""Rotary embedding equals complex multiplication in float64, value and gradient, and its tables are Hugging Face's."""

import pytest
import torch
from torch import Tensor

from swift_mega.ops.rope import rotate, rotate_reference, tables


def _complex(x: Tensor, positions: Tensor, frequencies: Tensor, scale: float) -> Tensor:
    """Features i and i + rotary_dim / 2 are one complex number, turned by position * frequency."""
    half = len(frequencies)
    x = x.double()
    numbers = torch.complex(x[..., :half], x[..., half : 2 * half])
    angles = positions.double()[:, None, None] * frequencies.double()
    turned = numbers * torch.polar(torch.full_like(angles, scale), angles)
    return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), dim=-1)


@pytest.mark.parametrize("function", [rotate, rotate_reference])
@pytest.mark.parametrize(("head_dim", "rotary"), [(16, 16), (16, 8), (6, 2)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_value_and_gradient_equal_complex_multiplication(function, head_dim, rotary, dtype, tolerance):
    """Packed positions, a rotary dim smaller than the head, and YaRN's factor, which the gradient carries too."""
    torch.manual_seed(0)
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 0, 77])
    frequencies = 10000.0 ** -(torch.arange(0, rotary, 2) / rotary)
    x = torch.randn(8, 3, head_dim, dtype=dtype, requires_grad=True)
    above = torch.randn_like(x)
    cos, sin = tables(positions, frequencies, 1.25, dtype)
    assert cos.shape == (8, 1, rotary // 2) and cos.dtype == sin.dtype == dtype
    got, want = function(x, cos, sin), _complex(x, positions, frequencies, 1.25)
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance, check_dtype=False)
    (found,) = torch.autograd.grad(got, x, above)
    (expected,) = torch.autograd.grad(want, x, above.double())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance, check_dtype=False)


def test_input_is_left_as_it_is():
    x = torch.randn(4, 2, 8)
    kept = x.clone()
    cos, sin = tables(torch.arange(4), torch.rand(4), 1.0, x.dtype)
    rotate(x, cos, sin)
    assert torch.equal(x, kept)


def test_part_of_a_wider_tensor():
    """Megatron hands on a slice of the fused projection's output, and gradients of any strides come back."""
    wide = torch.randn(5, 4, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = tables(torch.arange(5), torch.rand(4), 1.0, wide.dtype)
    above = torch.randn(2, 5, 8, dtype=torch.float64).transpose(0, 1)
    (found,) = torch.autograd.grad(rotate(wide[:, 1:3], cos, sin), wide, above)
    (expected,) = torch.autograd.grad(rotate_reference(wide[:, 1:3], cos, sin), wide, above)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_tables_are_float32_like_hugging_face():
    """Angles of far positions are rounded in float32 before the cosine, whatever the model's dtype: the rounding is part of the model."""
    positions, frequencies = torch.tensor([131071]), torch.tensor([0.7310586])
    cos, _ = tables(positions, frequencies, 1.0, torch.bfloat16)
    assert cos.item() == (positions.float() * frequencies).cos().bfloat16().item()
