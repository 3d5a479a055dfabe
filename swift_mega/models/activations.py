"""Activations by the names that config.json gives them: transformers knows tanh-GELU under several."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from swift_mega.models.families.gemma import TANH_GELU

ERF_GELU = torch.nn.functional.gelu

UNGATED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": ERF_GELU,
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), TANH_GELU),
    "relu": torch.nn.functional.relu,
    **dict.fromkeys(("silu", "swish"), torch.nn.functional.silu),
}
"""Of an MLP of two linears. The three of the second line write one formula down in three ways."""
