"""From a loaded model to training steps: Megatron's DDP, optimizer and schedule over the parameters that are trained in a step.

Which parameters these are may change from step to step (`Tuner.trainable`). Megatron's DDP and optimizer are made for a fixed set, and
move its parameters and gradients into buffers of their own; so a change makes them anew (`rewired`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from swift_mega.config import schema
from swift_mega.device.device import Device
from swift_mega.errors import AgreedError, UserError
from swift_mega.models.build import ModelPart, NamedParameter
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.groups import Groups
from swift_mega.train.build import Loaded, load_training

EMBEDDING = "embedding.word_embeddings.weight"


@dataclass
class Training(Loaded):
    """The objects of a run on one rank."""

    chunks: list[DistributedDataParallel]
    optimizer: Any
    scheduler: OptimizerParamScheduler
    steps: int
    """Optimizer steps of the whole run."""
    trainable: tuple[str, ...] | None
    """`Tuner.trainable` of the steps that DDP and optimizer were made for."""
    weight: Tensor
    """Weight of the global batch, by which finished gradients are divided: float64 on the device."""


def build_training(run: schema.Run, device: Device, groups: Groups, *, steps: int) -> Training:
    """Everything that `steps` optimizer steps need: `load_training`, then `wire`. Collective."""
    training = wire(load_training(run, device, groups), steps=steps)
    # Building the model may have drawn random numbers, so dropout is seeded after it.
    parallel_groups.seed_dropout(groups.layout, groups.coordinate, run.train.seed)
    return training


def wire(loaded: Loaded, *, steps: int, step: int = 1) -> Training:
    """DDP, optimizer and schedule for the parameters that are trained in optimizer step `step` (from 1) of `steps`. Collective."""
    run, part, tuner = loaded.run, loaded.part, loaded.tuner
    trainable = tuner.trainable(step)
    if trainable is not None:
        _choose(list(tuner.exported(part)), trainable, step)
    chunks = _wrap(run, part)
    weight = torch.ones((), dtype=torch.float64, device=loaded.device.device)
    optimizer = _optimizer(loaded, chunks)
    _fuse(optimizer)
    _connect(run, part, chunks, optimizer, weight)
    scheduler = _scheduler(run.optim, optimizer, steps)
    scheduler.step(increment=step - 1)
    given = {name: getattr(loaded, name) for name in Loaded.__dataclass_fields__}
    return Training(
        **given,
        chunks=chunks,
        optimizer=optimizer,
        scheduler=scheduler,
        steps=steps,
        trainable=trainable,
        weight=weight,
    )


def rewired(training: Training, step: int) -> Training:
    """The training for optimizer step `step`: itself, or with other DDP and optimizer where other parameters are trained. Collective."""
    if training.tuner.trainable(step) == training.trainable:
        return training
    _take_apart(training)
    return wire(training, steps=training.steps, step=step)


def _take_apart(training: Training) -> None:
    """Undoes what DDP did to the model, so that nothing of it acts on the next steps or keeps its memory."""
    with torch.no_grad():
        for chunk in training.chunks:
            if training.run.parallel.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)
                chunk.disable_forward_pre_hook(param_sync=False)
            # The nodes that accumulate gradients hold DDP's hooks; they live as long as something refers to them.
            chunk.grad_accs.clear()
        for parameter in (parameter for chunk in training.part.chunks for parameter in chunk.parameters()):
            parameter.grad = None
            for name in ("main_grad", "main_param"):
                if hasattr(parameter, name):
                    delattr(parameter, name)
            # With the distributed optimizer, parameters are views of its buffers.
            if parameter.requires_grad:
                parameter.data = parameter.data.clone()
    config = training.part.config
    config.finalize_model_grads_func = config.grad_scale_func = config.no_sync_func = None
    training.chunks.clear()
    training.optimizer = training.scheduler = None


def _choose(named: Sequence[NamedParameter], patterns: Sequence[str], step: int) -> None:
    """Freezes the parameters that no pattern selects. UserError where a pattern selects no parameter of any rank."""
    hit = [0] * len(patterns)
    for one in named:
        # The head of a tied model is the embedding again, on another stage.
        name = EMBEDDING if one.copy else one.name
        chosen = [fnmatchcase(name, pattern) for pattern in patterns]
        hit = [before + now for before, now in zip(hit, chosen, strict=True)]
        one.parameter.requires_grad_(any(chosen))
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, hit)
    for pattern, *found in zip(patterns, *counts, strict=True):
        if not any(found):
            raise AgreedError(
                f"step {step}: the tuner trains {pattern!r}, and no parameter of the model has such a name; names are like "
                f"{named[0].name if named else 'decoder.layers.0.mlp.linear_fc1.weight'}"
            )


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


def _optimizer(loaded: Loaded, chunks: list[DistributedDataParallel]) -> Any:
    """Megatron's optimizer, chained with the tuner's own where it has one."""
    run, part, tuner = loaded.run, loaded.part, loaded.tuner
    config = _optimizer_config(run, part)
    mine = [
        named
        for named in tuner.exported(part)
        if named.parameter.requires_grad and tuner.own_optimizer and tuner.owns(named)
    ]
    # Float32 shards are views of weights. With offloading, a torch optimizer gets them, and it accepts only leaf tensors.
    with torch.no_grad(), _left_out(mine):
        megatron = get_megatron_optimizer(config, chunks, use_gloo_process_groups=False)
    if not tuner.own_optimizer:
        return megatron
    # All ranks have the same optimizers, with parameters or without, because each takes part in the norm's sum.
    own = [
        _own(loaded, config, [named for named in mine if named.expert == expert], expert) for expert in (False, True)
    ]
    return ChainedOptimizer([*megatron.chained_optimizers, *own])


@contextmanager
def _left_out(mine: Sequence[NamedParameter]) -> Iterator[None]:
    """Within it, parameters do not require gradients: Megatron's optimizer takes those that do."""
    for named in mine:
        named.parameter.requires_grad_(False)
    try:
        yield
    finally:
        for named in mine:
            named.parameter.requires_grad_(True)


def _own(loaded: Loaded, config: OptimizerConfig, mine: Sequence[NamedParameter], expert: bool) -> Any:
    """The tuner's optimizer over these parameters inside Megatron's, which copies bfloat16 weights to float32, sums norms and clips."""
    optim = loaded.run.optim
    rates = {"lr": optim.lr, "weight_decay": optim.weight_decay, "max_lr": optim.lr, "min_lr": optim.min_lr}
    marks = {
        "wd_mult": 1.0,
        "lr_mult": 1.0,
        "is_decoupled_lr": False,
        "default_config": True,
        "is_expert_parallel": expert,
    }
    groups = [{"params": [named.parameter], "named": named, **rates, **marks} for named in mine]
    inner = loaded.tuner.optimizer(groups) if groups else None
    if loaded.part.config.bf16:
        made: Any = Float16OptimizerWithFloat16Params(inner, config, None, _no_state)
    else:
        made = FP32Optimizer(inner, config, _no_state)
    made.tp_group = parallel_state.get_tensor_model_parallel_group()
    made.grad_stats_parallel_group = (
        parallel_state.get_expert_tensor_model_pipeline_parallel_group()
        if expert
        else parallel_state.get_model_parallel_group()
    )
    return made


def _no_state(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """Megatron's function that makes an optimizer's state early: a torch optimizer makes its own in its first step."""


def _fuse(optimizer: Any) -> None:
    """Sets torch's fused AdamW: one call per parameter group instead of about ten per parameter. Megatron has no setting for it.

    An adapter has hundreds of small parameters, and on the CPU their calls took most of a step. On CUDA, torch's unfused AdamW
    allocates several temporary tensors of the size of all parameters, and the memory estimate does not count them. The optimizers of
    Transformer Engine and Apex, which Megatron uses where they are installed, are always fused and have no field `fused`.
    """
    for group in optimizer.param_groups:
        if "fused" in group:
            group["fused"] = True


def _connect(
    run: schema.Run, part: ModelPart, chunks: list[DistributedDataParallel], optimizer: Any, weight: Tensor
) -> None:
    """Sets the functions that Megatron's schedules call, as Megatron-LM's training loop does."""
    config = part.config

    def finalize(model: list[torch.nn.Module], num_tokens: Any = None, **given: Any) -> None:
        """Sums gradients over ranks, and divides them once by the weight of the global batch.

        Megatron would divide by a whole number of tokens that it counts itself, and would wait for it.
        """
        finalize_model_grads(model, None, **given)
        for chunk in model:
            chunk.scale_gradients(1 / weight.clamp(min=torch.finfo(weight.dtype).tiny))  # type: ignore[operator]

    config.finalize_model_grads_func = finalize
    config.grad_scale_func = optimizer.scale_loss
    if run.parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]


def warmup_steps(optim: schema.Optim, steps: int) -> int:
    """Number of warmup steps of `steps`; UserError where no step would be left after them."""
    warmup = optim.warmup_steps or round(optim.warmup_fraction * steps)
    if warmup >= steps and warmup > 0:
        raise UserError(
            f"optim.warmup_steps={warmup} leaves none of the {steps} steps at the full rate; choose fewer than {steps}"
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
