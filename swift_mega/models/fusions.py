"""Which of Megatron's fused functions compute the same as the model's own, and so may be on by default on CUDA.

Megatron compiles each into one kernel with torch.compile: bias, activation and gate, which also keeps less for the backward pass; and
bias, dropout and residual. Its GELU kernel is always the tanh form, whatever the model has. Its silu kernel has no clamp or offset.
In experts the clamp comes before the bias (fusions/fused_bias_geglu.py, 0.16.1 and 0.19.2). So only silu(gate) * up is fused.
"""

import torch

from swift_mega.device.backends import cannot_compile
from swift_mega.device.device import Device
from swift_mega.models.settings import Block, Settings

COMPILED = ("bias_activation_fusion", "bias_dropout_fusion")
"""Fields of Megatron's TransformerConfig that switch these kernels on."""


def fused(settings: Settings, device: Device, dtype: torch.dtype, dropout: float) -> dict[str, bool]:
    """The default values of the fields of COMPILED. dropout: Megatron's hidden_dropout."""
    able = device.kind == "cuda" and dtype != torch.float64 and cannot_compile() is None
    return {
        "bias_activation_fusion": able and activation_unfused(settings) is None,
        "bias_dropout_fusion": able and dropout_unfused(settings) is None and _has_more_than_a_sum(settings, dropout),
    }


def activation_unfused(settings: Settings) -> str | None:
    """Why Megatron's fused activation would not compute this model's; None: it would."""
    given = settings.megatron
    if settings.activation is not None:
        return "this model's activation has parameters, which the kernel does not read"
    if given.get("activation_func") is not torch.nn.functional.silu or not given.get("gated_linear_unit"):
        return "Megatron has no fused kernel of this model's activation (it has one of silu(gate) * up)"
    if given.get("activation_func_clamp_value") is not None or given.get("glu_linear_offset"):
        return "this model's gate is clamped or has an offset, which the kernel ignores"
    return _biased_experts(settings)


def dropout_unfused(settings: Settings) -> str | None:
    """Why Megatron's fused sum of bias, dropout and residual would not run in every layer; None: it would."""
    if settings.block != Block():
        return "this model's layers are joined in another way (models/modules/layer.py)"
    return _biased_experts(settings)


def _biased_experts(settings: Settings) -> str | None:
    biased = settings.shape.experts and settings.biases.mlp
    return "this model's experts have biases, which Megatron's kernels for experts do not take" if biased else None


def _has_more_than_a_sum(settings: Settings, dropout: float) -> bool:
    """Whether there is a bias or dropout: a residual sum alone is one kernel already and need not be compiled."""
    return bool(dropout) or settings.biases.mlp or settings.biases.attention_output
