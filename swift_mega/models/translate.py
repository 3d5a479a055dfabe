"""From a Hugging Face directory to the settings of its model: every field is understood, or the run stops and names the field."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from swift_mega.errors import UserError
from swift_mega.models.config_json import read_config
from swift_mega.models.family import Family, family_of
from swift_mega.models.quantization import FLAG, KEYS, quantization_of
from swift_mega.models.quantization_fields import judge
from swift_mega.models.settings import Settings
from swift_mega.models.unread import unread_fields

CONFIG_ACCIDENTS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError)
"""What a config class raises when a field has another type than it expects."""


def load_settings(directory: str | Path, *, dequantize: bool = False) -> Settings:
    """Settings from the config.json of a Hugging Face directory; UserError for a field that may change the model and is not understood.

    dequantize: the weights will be read dequantised, so quantisation does not change the model.
    """
    family, raw = family_of(directory), read_config(directory)
    if (quantization := quantization_of(directory)) is not None and not dequantize:
        raise UserError(
            f"{directory} is quantised: quantization_config={quantization!r}; pass {FLAG} to read its weights dequantised"
        )
    _check_task(directory, raw.get("architectures"))
    quantised = judge(quantization, str(directory)) if quantization is not None else ()
    raw = {key: value for key, value in raw.items() if key not in KEYS}
    fixed = {**FIXED, **family.fixed}
    for key, allowed in fixed.items():
        if key in raw and raw[key] not in allowed:
            raise UserError(
                f"{directory}/config.json: {key}={raw[key]!r} is not supported for family {'/'.join(family.hf_types)}; "
                f"supported: {', '.join(map(repr, allowed))}"
            )
    rates = {key: value for key, value in raw.items() if DROPOUT.fullmatch(key)}
    _check_rates(directory, rates)
    known = family.reads | NEUTRAL | fixed.keys() | rates.keys()
    others = {key: value for key, value in raw.items() if key not in known and not key.startswith("_")}
    unread = unread_fields(directory, family, known, others)
    _check_sizes(directory, {key: value for key, value in raw.items() if key not in family.by_layer})
    from huggingface_hub.errors import StrictDataclassError

    try:
        config = hf_config(directory)
    except (*CONFIG_ACCIDENTS, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"transformers cannot read {directory}/config.json: {reason}; correct the field it names"
        ) from None
    settings = family.translate(config)
    _check_fit(directory, settings)
    windows = any(window is not None for window in settings.windows)
    shape = dataclasses.replace(settings.shape, no_te_context=settings.no_te_context, windows=windows)
    for edit in settings.edits:
        shape = edit.limits(shape)
    notes = (*quantised, *settings.notes, *_notes(rates, unread, family, bool(raw.get("auto_map"))))
    pad_row = _pad_row(directory, config, settings.shape.vocab) if family.pad_without_gradient else None
    return dataclasses.replace(settings, notes=notes, shape=shape, pad_row=pad_row)


def _pad_row(directory: str | Path, config: Any, vocab: int) -> int | None:
    """The padding token's row of the embedding. As in torch, a negative padding_idx counts from the end, and one outside is an error."""
    pad = config.pad_token_id
    if pad is None:
        return None
    if not -vocab <= pad < vocab:
        raise UserError(
            f"{directory}/config.json: pad_token_id={pad} is beyond vocab_size={vocab}, and transformers refuses such an embedding; "
            "set pad_token_id to one of the tokens, or to null"
        )
    return pad % vocab  # type: ignore[no-any-return]


def _check_task(directory: str | Path, architectures: Any) -> None:
    """UserError where config.json says that the model is for another task than predicting the next token."""
    names = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    if names and all(OTHER_TASK.fullmatch(name) for name in names):
        raise UserError(
            f"{directory}/config.json: architectures={names} is a model with the head of another task, such as a reward model or a "
            "classifier, not a causal language model, and only those are supported; give the *ForCausalLM model that it was trained from"
        )


def _check_rates(directory: str | Path, rates: Mapping[str, Any]) -> None:
    for key, rate in rates.items():
        if rate is not None and not (type(rate) in (int, float) and 0 <= rate < 1):
            raise UserError(
                f"{directory}/config.json: {key}={rate!r} is not a dropout rate (0 or more and below 1); correct it"
            )


def _notes(rates: Mapping[str, Any], unread: Mapping[str, Any], family: Family, own_code: bool) -> Iterator[str]:
    """What config.json says and nothing here does.

    Dropout in config.json is a setting of pretraining. Fine-tuning here has dropout only where an adapter or model.megatron asks for it.
    """
    computing = [f"{key}={rates[key]}" for key in sorted(rates) if rates[key] and not key.startswith(OF_OTHER_TASKS)]
    if computing:
        yield f"{DROPOUT_NOTE} {', '.join(computing)}"
    if unread:
        said = [f"{key}={_short(unread[key])}" for key in sorted(unread)]
        listed = ", ".join(said[:MOST_NAMED]) + (
            f" and {len(said) - MOST_NAMED} more" if len(said) > MOST_NAMED else ""
        )
        code = "; the checkpoint's own code (auto_map), which may, is not run" if own_code else ""
        yield f"config.json has fields that transformers' {family.hf_types[0]} does not read, so they change nothing: {listed}{code}"


def _short(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 40 else said[:37] + "..."


def hf_config(directory: str | Path) -> Any:
    """The transformers config of a Hugging Face directory, by the model type in `Family.read_as` where transformers lacks its own."""
    from transformers import AutoConfig  # takes 2 s, so only where a model is read

    fields, family = read_config(directory), family_of(directory)
    known = family.read_as.get(fields.pop("model_type"))
    if known is None:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    return AutoConfig.for_model(known, **fields)


def _check_sizes(directory: str | Path, raw: Mapping[str, Any]) -> None:
    """UserError for a size that is not a positive count: transformers accepts most values, and Megatron would fail far from the cause."""
    for key in SIZES & raw.keys():
        value = raw[key]
        unset = value is None and key in MAY_BE_NONE
        if not unset and (type(value) is not int or value < 1):
            raise UserError(
                f"{directory}/config.json: {key}={_short(value)} is not a whole number of at least 1; correct it"
            )
        most = MOST_LAYERS if key in LAYERS else LARGEST
        if not unset and value > most:
            raise UserError(f"{directory}/config.json: {key}={_short(value)} is more than {most:,}; correct it")


def _check_fit(directory: str | Path, settings: Settings) -> None:
    shape, per_token = settings.shape, settings.megatron.get("moe_router_topk", 0)
    if shape.heads % shape.kv_heads:
        raise UserError(
            f"{directory}/config.json: num_key_value_heads={shape.kv_heads} does not divide "
            f"num_attention_heads={shape.heads}; correct it"
        )
    if shape.experts is not None and per_token > shape.experts:
        raise UserError(
            f"{directory}/config.json: num_experts_per_tok={per_token} is more than the {shape.experts} experts of "
            "the model; correct it"
        )


MAY_BE_NONE = frozenset("num_key_value_heads head_dim num_kv_heads ffn_hidden_size n_inner n_group topk_group".split())


LAYERS = ("num_hidden_layers", "n_layer", "n_layers")
MOST_LAYERS, LARGEST = 100_000, 2**28
"""Far beyond any model. A larger number comes from a damaged file, and would make a list that does not fit into memory."""
SIZES = MAY_BE_NONE | frozenset(
    "hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads vocab_size "
    "max_position_embeddings query_pre_attn_scalar n_embd n_head n_layer n_positions "
    "n_embed d_model n_heads n_layers max_seq_len "
    "num_experts num_local_experts num_experts_per_tok decoder_sparse_step "
    "n_routed_experts n_shared_experts n_group topk_group moe_num_experts moe_k moe_layer_interval "
    "linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads "
    "full_attention_interval".split()
)
"""Fields of config.json that are counts. Those that may be null have a default that follows from other fields."""


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
"""Fields of config.json that do not change what a decoder computes."""


DROPOUT = re.compile(r".*(dropout|pdrop|dropout_prob)")
DROPOUT_NOTE = (
    "training uses no dropout but that of an adapter and model.megatron.hidden_dropout; not used from config.json:"
)
MOST_NAMED = 12
OTHER_TASK = re.compile(
    r".*(For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice|MaskedLM|RewardModel(ing)?)|RewardModel"
    r"|DoubleHeadsModel)"
)
"""Class names, in transformers and elsewhere, of models that are not causal language models."""
OF_OTHER_TASKS = ("classifier_", "summary_")
"""Prefixes of dropout fields that belong to heads for other tasks."""


FIXED: Mapping[str, tuple[Any, ...]] = {
    "rope_interleaved": (False, None),
    "use_mrope": (False, None),
    "hidden_act": ("silu", "swish"),
}
"""Fields that every family here understands for these values only, unless its own `fixed` has others."""
