"""Megatron's config of a model in a layout."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from swift_mega.config.schema import Train
from swift_mega.device import Device
from swift_mega.errors import UserError
from swift_mega.models.balancing import balancing_fields
from swift_mega.models.experts import check_biases
from swift_mega.models.mla import check_cut, is_latent
from swift_mega.models.settings import Settings
from swift_mega.parallel.layout import Layout

DERIVED = frozenset(
    "tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size context_parallel_size "
    "expert_model_parallel_size expert_tensor_parallel_size sequence_parallel num_layers hidden_size ffn_hidden_size "
    "num_attention_heads num_query_groups kv_channels params_dtype pipeline_dtype bf16 fp16 recompute_granularity "
    "recompute_method recompute_num_layers calculate_per_token_loss variable_seq_lengths num_moe_experts moe_ffn_hidden_size "
    "pipeline_model_parallel_layout num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage cp_comm_type "
    "hierarchical_context_parallel_sizes".split()
)
"""Fields of TransformerConfig that follow from the model and the layout."""

_ATTENTION = "attention here is not Megatron's (models/attention.py), and "
UNREAD: dict[str, tuple[tuple[Any, ...], str]] = {
    "attention_dropout": ((0, 0.0), _ATTENTION + "has no dropout; leave it out"),
    "window_size": ((), _ATTENTION + "takes windows from the model's config.json; leave it out"),
    "window_attn_skip_freq": ((), _ATTENTION + "takes windows from the model's config.json; leave it out"),
    "softmax_type": ((), _ATTENTION + "takes sinks from the model's config.json; leave it out"),
    "no_rope_freq": ((), _ATTENTION + "takes rotations from the model's config.json; leave it out"),
    "rotary_interleaved": ((), _ATTENTION + "takes rotations from the model's config.json; leave it out"),
    "apply_rope_fusion": ((False,), _ATTENTION + "rotates by itself; leave it out"),
    "apply_query_key_layer_scaling": (
        (False,),
        _ATTENTION + "takes its scale from the model's config.json; leave it out",
    ),
    "attention_softmax_in_fp32": ((True,), _ATTENTION + "always has its softmax in float32; leave it out"),
    "attention_backend": ((), _ATTENTION + "chooses its kernels by device and dtype; leave it out"),
    "cpu_offloading": ((False,), "it excludes recomputation; set train.offload_activations"),
}
"""Fields that would have no effect, the values that change nothing, and why."""


def check_passthrough(given: Mapping[str, Any]) -> None:
    """`model.megatron` names fields of TransformerConfig, and none that follow from the model or the layout."""
    fields = {f.name for f in dataclasses.fields(TransformerConfig) if f.init}
    for key in given:
        if key not in fields:
            import difflib

            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"model.megatron.{key}: Megatron's TransformerConfig has no such field{hint}")
        if key in DERIVED:
            raise UserError(
                f"model.megatron.{key}={given[key]!r}: this follows from the model and the layout; set parallel.*, train.* or model.dtype"
            )
        harmless, reason = UNREAD.get(key, ((given[key],), ""))
        if given[key] not in harmless:
            raise UserError(f"model.megatron.{key}={given[key]!r} would have no effect: {reason}")


def transformer_config(
    settings: Settings, layout: Layout, *, device: Device, dtype: torch.dtype, train: Train, given: Mapping[str, Any],
    aux_loss: float = 0.0,
) -> TransformerConfig:  # fmt: skip
    """Megatron's config: family's settings < layout < device's safe choices < `given` (model.megatron)."""
    check_passthrough(given)
    if is_latent(settings):
        check_cut(settings, layout.tensor)
    check_biases(settings, layout.expert_tensor)
    fields: dict[str, Any] = dict(settings.megatron, layernorm_zero_centered_gamma=settings.norm.one_plus)
    fields.update(
        tensor_model_parallel_size=layout.tensor, pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        context_parallel_size=layout.context, expert_model_parallel_size=layout.expert, expert_tensor_parallel_size=layout.expert_tensor,
        sequence_parallel=layout.sequence, params_dtype=dtype, pipeline_dtype=dtype, bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True, variable_seq_lengths=layout.pipeline > 1,
        moe_token_dispatcher_type="alltoall",  # the default refuses rows of varying length, also in a model without experts
        perform_initialization=False, use_cpu_initialization=device.kind == "cpu", **layout.pipeline_settings(),
    )  # fmt: skip
    if layout.mesh.engine:
        fields["cp_comm_type"] = layout.mesh.communication
    if settings.whole_qk_norm or settings.head_qk_norm:
        # Lets newer Megatrons take the spec's norms. Not qk_layernorm, which would sum the gradients of weights that heads cut.
        fields["qk_l2_norm"] = True
    if train.recompute != "none":
        fields["recompute_granularity"] = train.recompute
    if train.recompute == "full":
        fields.update(recompute_method=train.recompute_method, recompute_num_layers=train.recompute_layers)
    fields.update(device.safe_schedule(layout.virtual))
    fields.update(given)
    fields.update(balancing_fields(aux_loss, given, experts=bool(settings.shape.experts)))
    try:
        return MLATransformerConfig(**fields) if is_latent(settings) else TransformerConfig(**fields)
    except (ValueError, AssertionError, TypeError) as error:
        raise UserError(f"Megatron refuses these settings: {error}; change the setting that it names") from error
