"""The lines at the start of a run that name its backends and kernels, so that a missing kernel is visible without a profile."""

from typing import Any

import torch

from swift_mega.device.backends import apex, flash_attn, transformer_engine
from swift_mega.device.device import Device, unused_gpus
from swift_mega.models.build import ModelPart
from swift_mega.models.kernels import te_layers, uses
from swift_mega.ops.kernels import AUTO, Kernels
from swift_mega.train.wire import Training

HOMES = {"torch": "torch's", "transformer_engine": "Transformer Engine's", "apex": "apex's"}


def header(training: Training) -> list[str]:
    """Lines that rank 0 prints: backends of layers and optimizer, the form of every op, and the number of unused GPUs."""
    device, part = training.device, training.part
    layers = layer_modules(device, part.config.params_dtype, part.kernels)
    lines = [
        f"computed by         layers: {layers}; optimizer: {optimizer_kernel(training.optimizer)}",
        f"kernels             train.kernels={part.kernels.asked}: {ops(part, device)}",
    ]
    if device.kind == "cuda":
        lines.append(f"optional packages   {transformer_engine()}; {flash_attn()}; {apex()}")
    return lines + ([f"GPUs                {unused}"] if (unused := unused_gpus()) else [])


def ops(part: ModelPart, device: Device) -> str:
    """Which form of each op runs, and what better forms need: "attention: torch flash (fused); rope: …"."""
    mesh, kernels, dtype = part.layout.mesh, part.kernels, part.config.params_dtype
    found = uses(part.settings, mesh, te=te_layers(device, dtype, kernels))
    words = ["attention: Transformer Engine's"] if mesh.te else []
    return "; ".join(words + [f"{use.op.name}: {kernels.text(use, device.device, dtype)}" for use in found])


def layer_modules(device: Device, dtype: torch.dtype, kernels: Kernels = AUTO) -> str:
    """The backend of the layers (Transformer Engine or Megatron) for this dtype; on CUDA also the reason, where it is not TE."""
    te = transformer_engine()
    if te_layers(device, dtype, kernels):
        return str(te)
    if device.uses_transformer_engine(dtype):
        return "Megatron's local modules (train.kernels=reference)"
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
