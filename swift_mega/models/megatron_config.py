"""Megatron's config of a model in a layout."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from swift_mega.config.schema import Train
from swift_mega.device.backends import TE_DTYPES, cannot_compile, transformer_engine, wgrad_kernel
from swift_mega.device.device import Device
from swift_mega.errors import UserError
from swift_mega.models.fusions import COMPILED, fused
from swift_mega.models.megatron_fields import FUSED, MODEL, ON_CUDA, OURS, PASSED_ON, REFUSED, UNREAD, WITH_TE, Request
from swift_mega.models.modules.balancing import balancing_fields
from swift_mega.models.modules.experts import check_biases
from swift_mega.models.settings import Settings
from swift_mega.parallel.layout import Layout


def check_passthrough(
    given: Mapping[str, Any],
    settings: Settings,
    train: Train,
    device: Device | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """UserError for a field of `model.megatron` that Megatron lacks, that follows from another setting, or that not every layer would obey
    (models/megatron_fields.py).

    device, and dtype of the model on it: None where they are not known yet.
    """
    fields = {f.name: f for f in dataclasses.fields(MLATransformerConfig) if f.init}
    request = Request(given=given, settings=settings, train=train)
    for key, value in given.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"model.megatron.{key}: Megatron's TransformerConfig has no such field{hint}")
        if key in OURS:
            raise UserError(
                f"model.megatron.{key}={value!r}: this follows from the model and the layout; set parallel.*, train.* or model.dtype"
            )
        if key in PASSED_ON or key in ON_CUDA:
            _check_obeyed(key, request)
            if device is not None and key in ON_CUDA and value and (lacking := _lacking(key, request, device, dtype)):
                raise UserError(f"model.megatron.{key}={value!r} needs {lacking}, or remove the setting")
        elif value != settings.megatron.get(key, fields[key].default):
            raise UserError(f"model.megatron.{key}={value!r} {_why_not(key)}")


def _check_obeyed(key: str, request: Request) -> None:
    if reason := (PASSED_ON.get(key) or ON_CUDA[key])(request):
        raise UserError(
            f"model.megatron.{key}={request.given[key]!r} cannot take effect: {reason}; remove the setting, or correct it"
        )


def _lacking(key: str, request: Request, device: Device, dtype: torch.dtype | None) -> str | None:
    """What a kernel of ON_CUDA needs and this machine or run lacks, with the remedy; None: nothing."""
    if request.train.kernels == "reference" and key in FUSED:
        return "train.kernels=auto, since train.kernels=reference runs no fused kernel; set that"
    if device.kind != "cuda":
        return "CUDA, and ranks run on the CPU; start them on machines with GPUs"
    if key in WITH_TE and not device.uses_transformer_engine(dtype or TE_DTYPES[0]):
        te = transformer_engine()
        if te.version is None:
            return f"Transformer Engine, which {te.problem}; install it (README.md)"
        name = str(dtype).removeprefix("torch.")
        return f"layers of Transformer Engine, and a model in {name} has Megatron's; set model.dtype=bfloat16"
    modules = request.given.get("recompute_modules") or ()
    if (
        key == "bias_dropout_fusion"
        and "layernorm" in modules
        and not device.uses_transformer_engine(dtype or TE_DTYPES[0])
    ):
        return "layers of Transformer Engine, since recompute_modules has layernorm: without them layers are ours, which do not fuse"
    # Megatron's own output layer needs apex's kernel too, so Transformer Engine's kernel for its own layers is not enough.
    if key == "gradient_accumulation_fusion" and not wgrad_kernel():
        return "apex's kernel fused_weight_gradient_mlp_cuda, which is not installed; build apex with --cuda_ext"
    return cannot_compile() if key in COMPILED else None


def _why_not(key: str) -> str:
    """The end of the error message for a field that is not passed on."""
    if key in MODEL:
        return (
            "would train another model than config.json states, and config.json is exported: this follows from the model; change "
            "config.json, or remove it"
        )
    if key in UNREAD:
        return f"would have no effect: {UNREAD[key]}"
    if key in REFUSED:
        return f"is refused: {REFUSED[key]}"
    return "is refused: this field of a newer Megatron is not known here, nor whether all layers obey it; remove it"


def transformer_config(
    settings: Settings,
    layout: Layout,
    *,
    device: Device,
    dtype: torch.dtype,
    train: Train,
    given: Mapping[str, Any],
    aux_loss: float = 0.0,
) -> TransformerConfig:
    """Megatron's config. Later sources override earlier ones: family, layout, the device's safe choices, `given` (model.megatron)."""
    check_passthrough(given, settings, train, device, dtype)
    for edit in settings.edits:
        edit.check_layout(layout)
    check_biases(settings, layout.expert_tensor)
    fields: dict[str, Any] = dict(settings.megatron, layernorm_zero_centered_gamma=settings.norm.one_plus)
    fields.update(
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,
        variable_seq_lengths=layout.pipeline > 1,
        moe_token_dispatcher_type="alltoall",  # the default refuses rows of varying length, also in a model without experts
        perform_initialization=False,
        use_cpu_initialization=device.kind == "cpu",
        deterministic_mode=train.deterministic,
        **layout.settings(),
    )
    if layout.mesh.te:
        fields["cp_comm_type"] = layout.mesh.communication
    for edit in settings.edits:
        fields.update(edit.megatron_fields())
    if train.recompute != "none":
        fields["recompute_granularity"] = train.recompute
    if train.recompute == "full":
        fields.update(recompute_method=train.recompute_method, recompute_num_layers=train.recompute_layers)
    fields.update(device.safe_schedule(layout.virtual))
    if train.kernels != "reference":
        fields.update(fused(settings, device, dtype, given.get("hidden_dropout", 0.0)))
    fields.update(given)
    fields.update(balancing_fields(aux_loss, given, experts=bool(settings.shape.experts)))
    kind = MLATransformerConfig if settings.megatron.get("multi_latent_attention") else TransformerConfig
    try:
        return kind(**fields)
    except (ValueError, AssertionError, TypeError) as error:
        raise UserError(f"Megatron refuses these settings: {error}; change the setting that it names") from error
