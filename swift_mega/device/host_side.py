"""Distinguishes tensors of the device from copies on the host, where both are in the CPU's memory.

Megatron's optimizer offload sorts parameters by `is_cuda` while it copies some of them to the host. Without CUDA, is_cuda is False for
every parameter, and no copy is made. Inside `two_sides`, is_cuda is True for every tensor except what `.cpu()` returned and what was
computed from that.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


class _OnHost(Tensor):
    """A result of `.cpu()`, or a copy of it."""


def two_sides(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, in which `.cpu()` copies and is_cuda is False for these copies; it returns plain tensors."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        with _told_apart():
            result = function(*args, **options)
        return _plain(result, {})

    return call


@contextlib.contextmanager
def _told_apart() -> Iterator[None]:
    answers: dict[str, Any] = {
        "is_cuda": property(lambda tensor: not isinstance(tensor, _OnHost)),
        "cpu": lambda tensor: Tensor.clone(tensor).as_subclass(_OnHost),
        "pin_memory": lambda tensor: tensor,  # without CUDA it raises
    }
    assert not answers.keys() & vars(Tensor).keys(), "torch answers these in the class above Tensor"
    for name, answer in answers.items():
        setattr(Tensor, name, answer)
    try:
        yield
    finally:
        for name in answers:
            delattr(Tensor, name)


def _plain(value: Any, made: dict[int, Tensor]) -> Any:
    """`value` with every host copy in it, keys included, as a plain tensor. One host copy always becomes the same tensor."""
    if isinstance(value, _OnHost):
        return made.setdefault(id(value), value.as_subclass(Tensor))
    if isinstance(value, dict):
        return {_plain(key, made): _plain(each, made) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(each, made) for each in value)
    return value
