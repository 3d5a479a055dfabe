"""The replacements for Megatron's gradient norm and gradient scaling, against float64, and that Megatron calls them."""

import pytest
import torch
from megatron.core.optimizer import clip_grads
from waits import waits

from swift_mega.device import many_tensors
from swift_mega.device.device import Device


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm(dtype: torch.dtype) -> None:
    """Of tensors of many sizes, one of them empty; the sum is in float32 whatever the dtype, and no value is read on the host."""
    tensors = [torch.randn(size).to(dtype) for size in (1, 7, 4096, 0, 33)]
    wanted = torch.cat([tensor.double() for tensor in tensors]).norm()
    with waits(tensors) as found:
        norm, none = many_tensors.l2_norm(65536, torch.zeros(1), [tensors], False)
    assert none is None and norm.shape == (1,) and norm.dtype == torch.float32 and not found
    torch.testing.assert_close(norm.double()[0], wanted, rtol=1e-6, atol=0)


def test_scale() -> None:
    tensors = [torch.randn(size) for size in (1, 7, 4096)]
    wanted = [tensor * 0.3 for tensor in tensors]
    into = [torch.empty_like(tensor) for tensor in tensors]
    many_tensors.scale(65536, torch.zeros(1), [tensors, into], 0.3)
    many_tensors.scale(65536, torch.zeros(1), [tensors, tensors], 0.3)
    for one, other, right in zip(tensors, into, wanted, strict=True):
        assert torch.equal(one, right) and torch.equal(other, right)


def test_megatron_calls_them(cpu: Device) -> None:
    assert clip_grads.l2_norm_impl is many_tensors.l2_norm
    assert clip_grads.multi_tensor_scale_impl is many_tensors.scale


def test_others_stay() -> None:
    """The functions of Transformer Engine and Apex are not replaced."""
    assert many_tensors.in_place_of("local_multi_tensor_scale", many_tensors.scale)(print) is print
