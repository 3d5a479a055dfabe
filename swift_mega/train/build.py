"""From a run's settings to what training steps need: this rank's part of the model with weights, Megatron's DDP, optimizer, schedule."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from swift_mega.config import schema
from swift_mega.convert.load import load
from swift_mega.convert.source import Source
from swift_mega.device.device import Device
from swift_mega.errors import UserError
from swift_mega.export.adapters import load_adapter
from swift_mega.models.build import ModelPart, build
from swift_mega.models.megatron_config import transformer_config
from swift_mega.models.modules.tiles import tile_size
from swift_mega.objectives.objective import Head, Objective, find_objective
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.agree import on_every_rank
from swift_mega.parallel.groups import Groups
from swift_mega.parallel.layout import Layout, plan_layout
from swift_mega.train.offload import offload_layer_inputs
from swift_mega.tuners.tuner import Tuner, find_tuner


@dataclass
class Training:
    """The objects of a run on one rank."""

    run: schema.Run
    device: Device
    groups: Groups
    part: ModelPart
    tuner: Tuner
    objective: Objective
    head: Head
    chunks: list[DistributedDataParallel]
    optimizer: Any
    scheduler: OptimizerParamScheduler


def layout_of(run: schema.Run, world: int) -> Layout:
    """The layout of a run, checked before ranks start; UserError where the model cannot have it. world: number of ranks."""
    assert run.model.path is not None
    return plan_layout(run.parallel, source_of(run.model).settings.shape, world)


def parameter_dtype(model: schema.Model, device: Device | Literal["cuda"]) -> torch.dtype:
    """dtype of the weights while training. device: "cuda" stands for a GPU that this process does not have."""
    if model.dtype == "auto":
        return torch.bfloat16 if device == "cuda" or device.kind == "cuda" else torch.float32
    return getattr(torch, model.dtype)


def dequantised_dtype(model: schema.Model, dtype: torch.dtype) -> torch.dtype | None:
    """The dtype to which quantised weights are dequantised, for a model of `dtype`; None: quantised weights are an error."""
    # No quantised format has more than float32 precision.
    wide = torch.float32 if dtype == torch.float64 else dtype
    return wide if model.dequantize else None


def source_of(model: schema.Model, dtype: torch.dtype = torch.float32) -> Source:
    """The model that a run names. dtype: of the model's weights; quantised weights are dequantised to it if model.dequantize is set."""
    assert model.path is not None
    return Source(model.path, dequantize=dequantised_dtype(model, dtype) or False)


def build_part(
    run: schema.Run, device: Device, groups: Groups, *, dtype: torch.dtype, adapters: bool, source: Source
) -> ModelPart:
    """This rank's part of the model in `source`, with its weights. Collective."""
    on_every_rank(source.open)
    settings = source.settings
    config = transformer_config(
        settings,
        groups.layout,
        device=device,
        dtype=dtype,
        train=run.train,
        given=run.model.megatron,
        aux_loss=run.model.router_aux_loss_coefficient,
    )
    part = build(
        source.family,
        settings,
        groups.layout,
        groups.coordinate,
        device=device,
        config=config,
        vocab_divisible_by=run.model.vocab_divisible_by,
        adapters=adapters,
        tile=tile_size(run.train, config.hidden_size),
    )
    load(part, source.tensors, groups)
    return part


def build_training(run: schema.Run, device: Device, groups: Groups, *, steps: int) -> Training:
    """Everything that `steps` optimizer steps need. Collective."""
    assert run.model.path is not None
    tuner, objective = find_tuner(run.tuner), find_objective(run.objective)
    dtype = parameter_dtype(run.model, device)
    source = source_of(run.model, dtype)
    part = build_part(run, device, groups, dtype=dtype, adapters=tuner.adapters, source=source)
    tuner.attach(part, seed=run.train.seed)
    for directory in run.model.adapters:
        load_adapter(directory, list(tuner.held(part)), part, tuner.adapter_config(part, run.model.path))
    chunks = _wrap(run, part)
    if run.train.offload_activations:
        offload_layer_inputs(part.chunks, device.device)
    # Float32 shards are views of weights. With offloading, a torch optimizer gets them, and it accepts only leaf tensors.
    with torch.no_grad():
        optimizer = get_megatron_optimizer(_optimizer_config(run, part), chunks, use_gloo_process_groups=False)
    _fuse(optimizer)
    _connect(run, part, chunks, optimizer)
    scheduler = _scheduler(run.optim, optimizer, steps)
    head = Head(part, groups, run.train.loss_chunk_size)
    # Building the model may have drawn random numbers, so dropout is seeded after it.
    parallel_groups.seed_dropout(groups.layout, groups.coordinate, run.train.seed)
    return Training(run, device, groups, part, tuner, objective, head, chunks, optimizer, scheduler)


def _wrap(run: schema.Run, part: ModelPart) -> list[DistributedDataParallel]:
    parallel = run.parallel
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=parallel.gradients_in_float32 and part.config.params_dtype != torch.float64,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
        bucket_size=parallel.ddp_bucket_size,
    )
    # Parameters of a chunk after the first are gathered while the chunk before it computes. Buckets are only for overlap inside a chunk.
    wrapped = [
        DistributedDataParallel(part.config, settings, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(part.chunks)
    ]
    return wrapped


def _optimizer_config(run: schema.Run, part: ModelPart) -> OptimizerConfig:
    optim = run.optim
    return OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=part.config.bf16,
        params_dtype=part.config.params_dtype,
        use_distributed_optimizer=run.parallel.distributed_optimizer,
        overlap_param_gather=run.parallel.overlap_param_gather,
        **_offload(run, part),
    )


def _offload(run: schema.Run, part: ModelPart) -> dict[str, Any]:
    """Fields that move the optimizer's state to the host.

    One optimizer on the host steps all parameters. overlap_cpu_optimizer_d2h_h2d has one optimizer per parameter, which steps while
    other gradients are copied; it is not set, because it was no faster and took more memory (NVIDIA-NeMo/RL #3628).
    """
    optim = run.optim
    if not optim.cpu_offload:
        return {}
    trained = {p.dtype for chunk in part.chunks for p in chunk.parameters() if p.requires_grad}
    # Trap: among parameters of another dtype, a float32 parameter that stays on the device would never be trained. Megatron stores its
    # gradient where the optimizer does not read it (hybrid_optimizer.py:85).
    assert trained <= {part.config.params_dtype}, trained
    return {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": optim.offload_fraction,
        "main_grads_dtype": torch.float32 if run.parallel.gradients_in_float32 else part.config.params_dtype,
        # With this field, float32 copies of bfloat16 weights are on the host too; without it they stay on the device.
        "use_precision_aware_optimizer": part.config.bf16,
    }


def _fuse(optimizer: Any) -> None:
    """Sets torch's fused AdamW: one call per parameter group instead of about ten per parameter. Megatron has no setting for it.

    An adapter has hundreds of small parameters, and on the CPU their calls took most of a step. On CUDA, torch's unfused AdamW
    allocates several temporary tensors of the size of all parameters, and the memory estimate does not count them. The optimizers of
    Transformer Engine and Apex, which Megatron uses where they are installed, are always fused and have no field `fused`.
    """
    for group in optimizer.param_groups:
        if "fused" in group:
            group["fused"] = True


def _connect(run: schema.Run, part: ModelPart, chunks: list[DistributedDataParallel], optimizer: Any) -> None:
    """Sets the functions that Megatron's schedules call, as Megatron-LM's training loop does."""
    config = part.config
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if run.parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]


def warmup_steps(optim: schema.Optim, steps: int) -> int:
    """Number of warmup steps of `steps`; UserError where no step would be left after them."""
    warmup = optim.warmup_steps or round(optim.warmup_fraction * steps)
    if warmup >= steps and warmup > 0:
        raise UserError(
            f"optim.warmup_steps={warmup} leaves nothing of {steps} steps to train at the full rate; choose fewer than {steps}"
        )
    return warmup


def _scheduler(optim: schema.Optim, optimizer: Any, steps: int) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=warmup_steps(optim, steps),
        lr_decay_steps=steps,
        lr_decay_style=optim.schedule,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )
