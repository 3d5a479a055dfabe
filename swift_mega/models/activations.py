"""Activations by their names in config.json; transformers has several names for tanh-GELU."""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

ERF_GELU = torch.nn.functional.gelu
TANH_GELU = functools.partial(torch.nn.functional.gelu, approximate="tanh")


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2, elementwise (So et al. 2021, arXiv:2109.08668)."""
    return x.relu().square()


UNGATED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": ERF_GELU,
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), TANH_GELU),
    "relu": torch.nn.functional.relu,
    **dict.fromkeys(("silu", "swish"), torch.nn.functional.silu),
}
"""For an MLP of two linears. The three names of tanh-GELU are one formula, written in three ways in transformers."""
