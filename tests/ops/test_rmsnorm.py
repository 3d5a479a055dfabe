"""RMSNorm and its gradients equal the formula written out in float64."""

import pytest
import torch
from torch import Tensor

from swift_mega.ops.rmsnorm import rms_norm, rms_norm_reference


def _dense(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, weight = x.double(), weight.double()
    return x / ((x * x).mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("shape", [(7, 1, 48), (5, 3, 16), (1, 1), (0, 1, 8), (4, 33)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 3e-6), (torch.bfloat16, 3e-2)]
)
def test_value_and_gradients_equal_float64(shape, dtype, tolerance):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    weight = torch.randn(shape[-1], dtype=dtype, requires_grad=True)
    above = torch.randn(shape, dtype=dtype)
    got, want = rms_norm(x, weight, 1e-5), _dense(x, weight, 1e-5)
    assert got.dtype == dtype and got.shape == x.shape
    close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    torch.testing.assert_close(got, want, **close)
    found = torch.autograd.grad(got, (x, weight), above)
    expected = torch.autograd.grad(want, (x, weight), above.double())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **close)


def test_frozen_weight_gets_no_gradient():
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8)
    rms_norm(x, weight, 1e-6).sum().backward()
    assert x.grad is not None and weight.grad is None


def test_gradient_from_a_transposed_tensor():
    """The gradient of the output need not be contiguous."""
    x, weight = torch.randn(3, 8, dtype=torch.float64, requires_grad=True), torch.randn(8, dtype=torch.float64)
    above = torch.randn(8, 3, dtype=torch.float64).t()
    (found,) = torch.autograd.grad(rms_norm(x, weight, 1e-6), x, above)
    (expected,) = torch.autograd.grad(_dense(x, weight, 1e-6), x, above)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_zeros_and_large_numbers_stay_finite():
    """A vector of zeros is scaled by 1 / sqrt(eps). 1e18 squared is within float32, and its mean stays finite."""
    for x in (torch.zeros(2, 8), torch.full((2, 8), 1e18)):
        x.requires_grad_()
        got = rms_norm(x, torch.ones(8), 1e-6)
        got.sum().backward()
        assert got.isfinite().all() and x.grad is not None and x.grad.isfinite().all()


def test_reference_equals_float64():
    x, weight = torch.randn(5, 16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    torch.testing.assert_close(rms_norm_reference(x, weight, 1e-5), _dense(x, weight, 1e-5))
