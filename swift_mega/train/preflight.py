"""Checks of a run before its ranks start, so that a wrong setting fails within seconds and not after a wait in a job queue."""

import torch

from swift_mega.config import schema
from swift_mega.config.parse import parse_size
from swift_mega.device.device import Device
from swift_mega.errors import UserError
from swift_mega.models.family import Family
from swift_mega.models.megatron_config import check_passthrough
from swift_mega.models.modules.balancing import balancing_fields
from swift_mega.models.modules.tiles import check_tiles
from swift_mega.models.settings import Settings
from swift_mega.tuners.tuner import find_tuner


def check_run(
    run: schema.Run, family: Family, settings: Settings, dtype: torch.dtype, device: Device | None = None
) -> None:
    """UserError where settings of model, tuner, data and optimizer do not fit together, or do not fit weights of `dtype`.

    device: the device that ranks will use; None for a memory estimate: what depends on the device is not checked.
    """
    _check_dtype(run, dtype)
    _check_training(run, family, settings, device, dtype)


def _check_training(
    run: schema.Run, family: Family, settings: Settings, device: Device | None = None, dtype: torch.dtype | None = None
) -> None:
    tuner = find_tuner(run.tuner)
    tuner.check(family, settings)
    if run.model.adapters and not run.tuner.makes_adapter:
        raise UserError(
            f"model.adapters={list(run.model.adapters)} with tuner.type={run.tuner.type}, which trains the whole model; "
            "merge the adapter first (swift-mega export --merge_lora true), or set tuner.type=lora"
        )
    if tuner.own_optimizer and (run.parallel.distributed_optimizer or run.optim.cpu_offload):
        key = "parallel.distributed_optimizer" if run.parallel.distributed_optimizer else "optim.cpu_offload"
        raise UserError(
            f"{key}=true with tuner.type={run.tuner.type}, whose own optimizer needs whole gradients on the device; set {key}=false"
        )
    if settings.longest is not None and run.data.max_length > settings.longest:
        raise UserError(
            f"data.max_length={run.data.max_length}: this model's positions are defined up to {settings.longest} tokens; set "
            f"data.max_length={settings.longest}"
        )
    balancing_fields(run.model.router_aux_loss_coefficient, run.model.megatron, experts=bool(settings.shape.experts))
    parse_size(run.export.max_shard_size)
    check_passthrough(run.model.megatron, settings, run.train, device, dtype)
    if not tuner.trains_model and run.model.megatron.get("moe_router_enable_expert_bias"):
        raise UserError(
            f"model.megatron.moe_router_enable_expert_bias=True with tuner.type={run.tuner.type}: it changes model weights, which an "
            "adapter does not have; remove it, or set tuner.type=full"
        )
    check_tiles(settings, run.train, run.model.megatron)


def _check_dtype(run: schema.Run, dtype: torch.dtype) -> None:
    """UserError where Megatron cannot train weights of `dtype` with the settings of the run."""
    name = str(dtype).removeprefix("torch.")
    if not run.parallel.gradients_in_float32 and dtype != torch.bfloat16:
        raise UserError(
            f"parallel.gradients_in_float32=false sums gradients in the dtype of the weights, and that is {name}; set "
            "model.dtype=bfloat16, or parallel.gradients_in_float32=true"
        )
    if dtype == torch.float64 and (run.parallel.distributed_optimizer or run.optim.clip_grad):
        raise UserError(
            "model.dtype=float64: Megatron's distributed optimizer and its clipping of gradients support float32 at most; set "
            "parallel.distributed_optimizer=false and optim.clip_grad=0, or model.dtype=float32"
        )
