"""The lines at the start of a run that name its backends and kernels, so that a missing kernel is visible without a profile."""

from typing import Any

import torch

from swift_mega.device.backends import apex, flash_attn, transformer_engine
from swift_mega.device.device import Device, unused_gpus
from swift_mega.models.modules.attention import CoreAttention
from swift_mega.train.wire import Training

HOMES = {"torch": "torch's", "transformer_engine": "Transformer Engine's", "apex": "apex's"}


def header(training: Training) -> list[str]:
    """Lines that rank 0 prints: backends of layers, attention and optimizer, and the number of unused GPUs."""
    device, config = training.device, training.part.config
    te = training.part.layout.mesh.engine
    attention = "Transformer Engine's" if te else _attention(training)
    lines = [
        f"computed by         layers: {layer_modules(device, config.params_dtype)}; attention: {attention}; optimizer: "
        f"{optimizer_kernel(training.optimizer)}"
    ]
    if device.kind == "cuda":
        lines.append(f"optional packages   {transformer_engine()}; {flash_attn()}; {apex()}")
    return lines + ([f"GPUs                {unused}"] if (unused := unused_gpus()) else [])


def _attention(training: Training) -> str:
    """The attention kernels of this stage's layers (ops/attention_kernels.py); most models use one."""
    ring = training.part.layout.mesh.ring > 1
    layers = (layer for chunk in training.part.chunks for layer in chunk.modules() if isinstance(layer, CoreAttention))
    names = dict.fromkeys(layer.kernel(training.device.device, ring=ring) for layer in layers)
    return " and ".join(names) or "none in this stage"


def layer_modules(device: Device, dtype: torch.dtype) -> str:
    """The backend of the layers (Transformer Engine or Megatron) for this dtype; on CUDA also the reason, where it is not TE."""
    te = transformer_engine()
    if device.uses_transformer_engine(dtype):
        return str(te)
    if device.kind == "cuda" and te.version is not None:
        return f"Megatron's local modules ({te} is for bfloat16 and float16, not {str(dtype).removeprefix('torch.')})"
    return "Megatron's local modules"


def optimizer_kernel(optimizer: Any) -> str:
    """Names of the optimizer classes inside this rank's Megatron optimizer."""
    found = dict.fromkeys(_named(one) for one in _leaves(optimizer))
    return " and ".join(found) or "none (nothing is trained on this rank)"


def _leaves(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The torch optimizers inside Megatron's: it chains several, and it splits one between device and host."""
    inside = getattr(optimizer, "chained_optimizers", None) or getattr(optimizer, "sub_optimizers", None)
    if inside is not None:
        return [leaf for one in inside for leaf in _leaves(one)]
    inner = getattr(optimizer, "optimizer", None)
    if inner is not None:
        return _leaves(inner)
    return [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else []


def _named(optimizer: torch.optim.Optimizer) -> str:
    kind = type(optimizer)
    groups = optimizer.param_groups
    where = {parameter.device.type for group in groups for parameter in group["params"]}
    home = HOMES.get(kind.__module__.partition(".")[0], kind.__module__)
    fused = ", fused" if all(group.get("fused") for group in groups) else ""
    return f"{home} {kind.__name__}{fused} on {' and '.join(sorted(where)).upper()}"
