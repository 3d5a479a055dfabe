"""From a Hugging Face directory to the settings of its model: every field is understood, or the run stops with its name."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swift_mega.errors import UserError
from swift_mega.models.config_json import read_config
from swift_mega.models.family import family_of
from swift_mega.models.quantization import FLAG, KEYS, quantization_of
from swift_mega.models.settings import Settings


def load_settings(directory: str | Path, *, dequantize: bool = False) -> Settings:
    """Config of a Hugging Face directory in Megatron's terms; a field that nobody understands stops the run.

    dequantize: the weights will be read dequantised, so a quantisation changes nothing of the model.
    """
    family, raw = family_of(directory), read_config(directory)
    if (quantization := quantization_of(directory)) is not None and not dequantize:
        raise UserError(
            f"{directory} is quantised: quantization_config={quantization!r}; pass {FLAG} to read its weights dequantised"
        )
    raw = {key: value for key, value in raw.items() if key not in KEYS}
    fixed = {**FIXED, **family.fixed}
    for key, allowed in fixed.items():
        if key in raw and raw[key] not in allowed:
            raise UserError(
                f"{directory}/config.json: {key}={raw[key]!r} is not supported for family {'/'.join(family.hf_types)}; "
                f"supported: {', '.join(map(repr, allowed))}"
            )
    known = family.reads | NEUTRAL | fixed.keys()
    unknown = sorted(key for key in raw if key not in known and not key.startswith("_"))
    if unknown:
        listed = ", ".join(f"{key}={raw[key]!r}" for key in unknown)
        raise UserError(
            f"{directory}/config.json has fields that family {'/'.join(family.hf_types)} does not know: {listed}; they "
            "may change what the model computes. Remove them if they don't, or add them to the family's file"
        )
    _check_sizes(directory, {key: value for key, value in raw.items() if key not in family.by_layer})
    from huggingface_hub.errors import StrictDataclassError

    try:
        config = hf_config(directory)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"transformers cannot read {directory}/config.json: {reason}; correct the field it names"
        ) from None
    settings = family.translate(config)
    _check_fit(directory, settings)
    windows = any(window is not None for window in settings.windows)
    shape = dataclasses.replace(settings.shape, not_engine=settings.not_engine, windows=windows)
    pad_row = _pad_row(directory, config, settings.shape.vocab) if family.pad_without_gradient else None
    return dataclasses.replace(settings, notes=_notes(raw, fixed), shape=shape, pad_row=pad_row)


def _pad_row(directory: str | Path, config: Any, vocab: int) -> int | None:
    """torch counts a negative padding_idx from the end, and makes no embedding where it is beyond the rows."""
    pad = config.pad_token_id
    if pad is None:
        return None
    if not -vocab <= pad < vocab:
        raise UserError(
            f"{directory}/config.json: pad_token_id={pad} is beyond vocab_size={vocab}, and transformers makes no such embedding; "
            "set pad_token_id to one of the tokens, or to null"
        )
    return pad % vocab  # type: ignore[no-any-return]


def _notes(raw: Mapping[str, Any], fixed: Mapping[str, Any]) -> tuple[str, ...]:
    """Dropout is a setting of pretraining that a family may let config.json name; nothing here but an adapter has any."""
    rates = [f"{key}={raw[key]}" for key in sorted(fixed) if key.endswith(("dropout", "pdrop")) and raw.get(key)]
    return (
        (f"config.json names {', '.join(rates)}; training here uses no dropout but an adapter's own",) if rates else ()
    )


def hf_config(directory: str | Path) -> Any:
    """The transformers config of a Hugging Face directory, of a type that transformers has a model for."""
    from transformers import AutoConfig  # 2 s: only when a model is really read

    fields, family = read_config(directory), family_of(directory)
    known = family.read_as.get(fields.pop("model_type"))
    if known is None:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    return AutoConfig.for_model(known, **fields)


def _check_sizes(directory: str | Path, raw: Mapping[str, Any]) -> None:
    """Sizes are counts; transformers lets most of them be anything, and Megatron would fail far from the cause."""
    for key in SIZES & raw.keys():
        value = raw[key]
        unset = value is None and key in MAY_BE_NONE
        if not unset and (type(value) is not int or value < 1):
            raise UserError(f"{directory}/config.json: {key}={value!r} is not a whole number of at least 1; correct it")


def _check_fit(directory: str | Path, settings: Settings) -> None:
    shape, per_token = settings.shape, settings.megatron.get("moe_router_topk", 0)
    if shape.heads % shape.kv_heads:
        raise UserError(
            f"{directory}/config.json: num_key_value_heads={shape.kv_heads} does not divide "
            f"num_attention_heads={shape.heads}; correct it"
        )
    if shape.experts is not None and per_token > shape.experts:
        raise UserError(
            f"{directory}/config.json: num_experts_per_tok={per_token} is more than the {shape.experts} experts there "
            "are; correct it"
        )


MAY_BE_NONE = frozenset("num_key_value_heads head_dim num_kv_heads ffn_hidden_size n_inner n_group topk_group".split())


SIZES = MAY_BE_NONE | frozenset(
    "hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads vocab_size "
    "max_position_embeddings query_pre_attn_scalar n_embd n_head n_layer n_positions "
    "n_embed d_model n_heads n_layers max_seq_len "
    "num_experts num_local_experts num_experts_per_tok decoder_sparse_step "
    "n_routed_experts n_shared_experts n_group topk_group moe_num_experts moe_k moe_layer_interval "
    "linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads "
    "full_attention_interval".split()
)
"""Fields of config.json that count something; those that may be null have a default that follows from others."""


NEUTRAL = frozenset(
    "architectures model_type torch_dtype dtype transformers_version use_cache bos_token_id eos_token_id pad_token_id "
    "sep_token_id unk_token_id cls_token_id mask_token_id decoder_start_token_id suppress_tokens "
    "begin_suppress_tokens initializer_range output_router_logits router_aux_loss_coef auto_map name_or_path "
    "is_llama_config unsloth_version unsloth_fixed return_dict output_attentions output_hidden_states id2label "
    "label2id problem_type finetuning_task task_specific_params tokenizer_class prefix chunk_size_feed_forward "
    "is_encoder_decoder is_decoder add_cross_attention "
    "transformers.js_config attn_implementation attention_implementation max_length "
    "max_sequence_length pretraining_tp cache_implementation".split()
)
"""Fields of config.json that change nothing that a decoder computes."""


FIXED: Mapping[str, tuple[Any, ...]] = {
    "rope_interleaved": (False, None),
    "use_mrope": (False, None),
    "attention_dropout": (0.0, None),
    "hidden_act": ("silu", "swish"),
}
"""Fields that every family here understands for these values only."""
