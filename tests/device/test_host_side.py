"""Where all tensors are on the CPU, code that sorts tensors by is_cuda sees a device side and a host side; nothing of this is left when it
returns."""

import pytest
import torch
from torch import Tensor

from swift_mega.device.device import Device
from swift_mega.device.host_side import two_sides


def sort(tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor], dict[Tensor, Tensor]]:
    """(on the device, on the host, host copy -> tensor): every second tensor is copied and widened."""
    device, host, origin = [], [], {}
    for number, tensor in enumerate(tensors):
        assert tensor.is_cuda
        each = tensor.detach().clone().cpu().pin_memory().float() if number % 2 else tensor.float()
        if number % 2:
            origin[each] = tensor
        (device if each.is_cuda else host).append(each)
    return device, host, origin


def test_copies_are_told_apart(cpu: Device) -> None:
    tensors = [torch.full((3,), float(n), dtype=torch.bfloat16) for n in range(4)]
    device, host, origin = two_sides(sort)(tensors)
    assert [int(each[0]) for each in device] == [0, 2] and [int(each[0]) for each in host] == [1, 3]
    assert all(type(each) is Tensor and not each.is_cuda for each in (*device, *host))
    assert [id(key) for key in origin] == [id(each) for each in host], "one copy became two tensors"
    host[0].zero_()
    assert int(tensors[1][0]) == 1, "no copy"


def test_torch_is_itself_afterwards(cpu: Device) -> None:
    def fail(tensor: Tensor) -> None:
        assert tensor.is_cuda and not tensor.cpu().is_cuda
        raise KeyError("stopped")

    tensor, before = torch.ones(1), {name: getattr(Tensor, name) for name in ("is_cuda", "cpu", "pin_memory")}
    with pytest.raises(KeyError, match="stopped"):
        two_sides(fail)(tensor)
    assert not tensor.is_cuda and tensor.cpu() is tensor
    assert {name: getattr(Tensor, name) for name in before} == before and not before.keys() & vars(Tensor).keys()
