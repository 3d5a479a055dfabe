"""From a run's settings to this rank's part of the model with its weights, and the tuner attached to it."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from swift_mega.config import schema
from swift_mega.convert.load import Prepare, as_parameter, load
from swift_mega.convert.source import Source
from swift_mega.device.device import Device
from swift_mega.export.adapters import load_adapter
from swift_mega.models.build import ModelPart, build
from swift_mega.models.kernels import check_kernels
from swift_mega.models.megatron_config import transformer_config
from swift_mega.models.modules.tiles import tile_size
from swift_mega.objectives.objective import Head, Objective, find_objective
from swift_mega.ops.kernels import kernels_of
from swift_mega.parallel.agree import on_every_rank
from swift_mega.parallel.groups import Groups
from swift_mega.parallel.layout import Layout, plan_layout
from swift_mega.train.offload import offload_layer_inputs
from swift_mega.tuners.tuner import Tuner, find_tuner


def layout_of(run: schema.Run, world: int) -> Layout:
    """The layout of a run, checked before ranks start; UserError where the model cannot have it. world: number of ranks."""
    assert run.model.path is not None
    return plan_layout(run.parallel, source_of_run(run).settings.shape, world)


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


def source_of_run(run: schema.Run, dtype: torch.dtype = torch.float32) -> Source:
    """The model that a run builds: `source_of`, in the shape that its tuner gives it (`Tuner.reshape`)."""
    return find_tuner(run.tuner).reshape(source_of(run.model, dtype))


def build_part(
    run: schema.Run,
    device: Device,
    groups: Groups,
    *,
    dtype: torch.dtype,
    reads_inputs: bool,
    source: Source,
    prepare: Prepare = as_parameter,
) -> ModelPart:
    """This rank's part of the model in `source`, with its weights. Collective.

    reads_inputs: hooks need the real input of linears. prepare: how weights are kept (`Tuner.prepare`).
    """
    on_every_rank(source.open)
    settings, kernels = source.settings, kernels_of(run.train)
    on_every_rank(lambda: check_kernels(kernels, settings, groups.layout.mesh, device, dtype))
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
        reads_inputs=reads_inputs,
        tile=tile_size(run.train, config.hidden_size),
        kernels=kernels,
    )
    load(part, source.tensors, groups, prepare=prepare)
    return part


@dataclass
class Frozen:
    """A second copy of the model that is not trained."""

    part: ModelPart
    head: Head


@dataclass
class Loaded:
    """What a run needs of its model on one rank, before any optimizer: `wire` makes a Training of it."""

    run: schema.Run
    device: Device
    groups: Groups
    part: ModelPart
    tuner: Tuner
    objective: Objective
    head: Head
    base: Frozen | None
    """The model as it was loaded, for frozen passes of the objective; None: the tuner gives it, or the objective has no such passes."""


def load_training(run: schema.Run, device: Device, groups: Groups) -> Loaded:
    """This rank's part of the model with its weights, and the tuner attached to it. Collective."""
    assert run.model.path is not None
    tuner, objective = find_tuner(run.tuner), find_objective(run.objective)
    dtype = parameter_dtype(run.model, device)
    source = on_every_rank(lambda: source_of_run(run, dtype))
    part = build_part(
        run, device, groups, dtype=dtype, reads_inputs=tuner.reads_inputs, source=source, prepare=tuner.prepare
    )
    tuner.attach(part, seed=run.train.seed)
    _let_gradients_pass(part)
    for directory in run.model.adapters:
        load_adapter(directory, list(tuner.exported(part)), part, tuner.adapter_config(part, run.model.path))
    base = None
    if any(each.weights == "base" for each in objective.passes()) and tuner.reference(part) is None:
        copy = build_part(run, device, groups, dtype=dtype, reads_inputs=False, source=source)
        for chunk in copy.chunks:
            chunk.requires_grad_(False).eval()
        base = Frozen(copy, Head(copy, groups, run.train.loss_chunk_size))
    if run.train.offload_activations:
        offload_layer_inputs(part.chunks, device.device)
    head = Head(part, groups, run.train.loss_chunk_size)
    return Loaded(run, device, groups, part, tuner, objective, head, base)


def _let_gradients_pass(part: ModelPart) -> None:
    """Makes a frozen embedding's output require a gradient where recomputation or another pipeline stage follows.

    Both propagate gradients only to inputs that require one.
    """

    def require(module: torch.nn.Module, given: tuple[Any, ...], result: torch.Tensor) -> torch.Tensor:
        return result.requires_grad_() if torch.is_grad_enabled() and not result.requires_grad else result

    for chunk in part.chunks:
        if chunk.pre_process and (part.config.recompute_granularity or part.layout.pipeline > 1):
            chunk.embedding.register_forward_hook(require)
