"""Activations of an MLP that have parameters; Megatron's own are plain functions without parameters."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class Xielu(MegatronModule):
    """xIELU (Huang 2024, arXiv:2411.13010): a parabola above zero and an integrated ELU below it, each with a learned factor.

    Every tensor rank has both factors, and only some of the features that they act on. So their gradients are summed over tensor ranks.
    """

    beta: Tensor
    eps: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.sharded = config.tensor_model_parallel_size > 1
        self.alpha_p = torch.nn.Parameter(torch.empty(1, dtype=config.params_dtype))
        self.alpha_n = torch.nn.Parameter(torch.empty(1, dtype=config.params_dtype))
        for name in ("beta", "eps"):  # constants that checkpoints contain
            self.register_buffer(name, torch.empty((), dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        above, below = (
            F.softplus(copy_to_tensor_model_parallel_region(alpha) if self.sharded else alpha)
            for alpha in (self.alpha_p, self.alpha_n)
        )
        below = self.beta + below
        return self.beta * x + torch.where(x > 0, above * x * x, (torch.expm1(torch.min(x, self.eps)) - x) * below)


def replace_activations(layers: torch.nn.ModuleList, make: Callable[[TransformerConfig], torch.nn.Module]) -> None:
    """Gives the MLP of each of Megatron's `layers` its own activation module, in place of the function in its config."""
    for layer in layers:
        mlp: Any = layer.mlp
        mlp.activation_func = make(mlp.config)
