"""What `quantization_config` may contain for each method: fields that are understood for some values, and fields that change no number.

A field in neither list is refused where transformers' class of the method declares it. Otherwise a note names it: tools write fields of
their own, and transformers ignores them.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from swift_mega.errors import UserError

REMEDY = "Convert the checkpoint to bfloat16 with its own tools first"
Values = tuple[Any, ...] | None
"""The values that are understood. None: all, because the numbers do not depend on it or it is checked where the weights are read."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One `quant_method`. check: what a list of values cannot express."""

    fields: Mapping[str, Values]
    transformers: str | None = None
    """Name of its class in transformers."""
    check: Callable[[Mapping[str, Any]], None] = lambda config: None


def judge(config: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Notes on fields that nothing reads; UserError where the weights would not be read correctly."""
    name = config["quant_method"]
    if name not in METHODS:
        raise UserError(
            f"{where}: quant_method={name!r} is not supported; supported: {', '.join(sorted(METHODS))}. {REMEDY}"
        )
    method = METHODS[name]
    known = {**COMMON, **method.fields}
    _require(config, known, name)
    method.check(config)
    unknown = sorted(key for key in config if key not in known and config[key] is not None)
    if unknown and (read := _declared(method).intersection(unknown)):
        raise UserError(
            f"{where}: {', '.join(f'{key}={config[key]!r}' for key in sorted(read))} of quant_method={name!r} is not understood, and "
            f"transformers reads it. {REMEDY}"
        )
    if not unknown:
        return ()
    listed = ", ".join(f"{key}={config[key]!r}" for key in unknown)
    return (f"quantization_config has fields that neither transformers nor this reads: {listed[:300]}",)


def _declared(method: Method) -> set[str]:
    import transformers.utils.quantization_config as theirs

    made = getattr(theirs, method.transformers or "", None)
    return set(inspect.signature(made.__init__).parameters) - {"self", "kwargs"} if made else set()


def _require(config: Mapping[str, Any], fields: Mapping[str, Values], method: str) -> None:
    for key, values in fields.items():
        value = config.get(key)
        if values is None or value is None:
            continue
        said = value.lower() if isinstance(value, str) else value
        if said not in values:
            raise UserError(
                f"quantization_config: {key}={value!r} of quant_method={method!r} is not supported; "
                f"supported: {', '.join(map(repr, values))}. {REMEDY}"
            )


def block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """(rows, columns) of a block; None where scales are for whole tensors or rows."""
    sizes = [config.get("weight_block_size")]
    for group in (config.get("config_groups") or {}).values():
        sizes.append((group.get("weights") or {}).get("block_structure"))
    found = [size for size in sizes if size is not None]
    for size in found:
        plain = isinstance(size, list | tuple) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
        if not plain or size != found[0]:
            raise UserError(
                f"quantization_config: weight_block_size={size!r} is not two counts, such as [128, 128], the same for "
                "every weight; correct it"
            )
    return (found[0][0], found[0][1]) if found else None


def _check_blocks(config: Mapping[str, Any]) -> None:
    block_size(config)


def _check_groups(config: Mapping[str, Any]) -> None:
    groups = config.get("config_groups") or {}
    inside: list[Any] = list(groups.values()) if _is(groups) else [None]
    if not all(_is(group) and _is(group.get("weights") or {}) for group in inside):
        raise UserError(
            f"quantization_config: config_groups={groups!r} is not groups of weights; copy it from the original"
        )
    for group in inside:
        _require(group, {"format": COMPRESSED}, config["quant_method"])
        _require(group.get("weights") or {}, WEIGHTS, config["quant_method"])
    block_size(config)


def _is(value: object) -> bool:
    return isinstance(value, dict)


def _check_group_size(config: Mapping[str, Any]) -> None:
    for key in ("group_size", "q_group_size"):
        size = config.get(key)
        if size is not None and (type(size) is not int or size < -1 or size == 0):
            raise UserError(f"quantization_config: {key}={size!r} is not a count, or -1 for whole rows; correct it")


def _check_gptq(config: Mapping[str, Any]) -> None:
    _check_group_size(config)
    forms = {str(config[key]).lower() for key in ("checkpoint_format", "format") if config.get(key) is not None}
    if len(forms) > 1:
        raise UserError(f"quantization_config: checkpoint_format and format say {sorted(forms)}; correct one of them")
    # GPTQModel's patterns of modules. "-:" leaves modules unquantised, as their tensors show; others may set other bits and group sizes.
    special = config.get("dynamic") or {}
    if not _is(special) or any(not name.startswith("-:") and of_its_own for name, of_its_own in special.items()):
        raise UserError(
            f"quantization_config: dynamic={special!r} gives modules bits or groups of their own, which is not supported. {REMEDY}"
        )


def gptq_format(config: Mapping[str, Any]) -> str:
    """gptq, whose zero points are stored minus one, or gptq_v2. transformers writes the field under one of two names."""
    return str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()


ANY = None
COMMON: dict[str, Values] = dict.fromkeys(
    (
        "quant_method",
        "modules_to_not_convert",
        "ignored_layers",
        "ignore",
        "exclude_modules",
        "producer",
        "meta",
        "dequantize",
    )
)
"""Accepted with any value: the tensors show which modules are quantised."""
COMPRESSED = ("float-quantized", "int-quantized", "naive-quantized")
WEIGHTS: dict[str, Values] = {
    "num_bits": (8,),
    "symmetric": (True,),
    "strategy": ("tensor", "channel", "block"),
    "dynamic": (False,),
    "type": ("float", "int"),
    "actorder": ("static", "weight", False),
}
"""What is understood in the weights of a group of modules (compressed-tensors)."""
CACHE: dict[str, Values] = dict.fromkeys(
    ("kv_cache_scheme", "kv_cache_quant_method", "kv_cache_quant_algo", "activation_scheme", "activation_scale_ub")
)
"""Fields about activations and the key-value cache, which weights alone do not need."""
OF_GPTQS_MAKING = dict.fromkeys(
    "tokenizer dataset damp_percent damp_auto_increment act_group_aware true_sequential static_groups backend model_seqlen mse "
    "block_name_to_quantize module_name_preceding_first_block batch_size pad_token_id max_input_length cache_block_outputs "
    "modules_in_block_to_quantize inside_layer_modules model_name_or_path model_file_base_name use_cuda_fp16 use_exllama "
    "disable_exllama exllama_config quantizer lm_head".split()
)
"""Fields about how the weights were quantised and which kernels run them."""
METHODS: dict[str, Method] = {
    "fp8": Method(
        fields={
            **CACHE,
            "fmt": ("e4m3", "float8_e4m3fn", "e4m3fn"),
            "expert_dtype": ("fp8",),
            "scale_fmt": ("float", "ue8m0"),
            **dict.fromkeys(("weight_block_size", "modules_to_convert", "is_checkpoint_fp8_serialized")),
        },
        transformers="FineGrainedFP8Config",
        check=_check_blocks,
    ),
    "fbgemm_fp8": Method(fields=CACHE, transformers="FbgemmFp8Config"),
    "modelopt": Method(
        fields={**CACHE, "quant_algo": ("fp8",), **dict.fromkeys(("config_groups", "group_size"))}, check=_check_groups
    ),
    "compressed-tensors": Method(
        fields={
            **CACHE,
            "format": COMPRESSED,
            "sparsity_config": ({}, {"format": "dense"}),
            "transform_config": ({},),
            "quantization_status": ("compressed", "frozen"),
            **dict.fromkeys(("config_groups", "global_compression_ratio", "version", "run_compressed", "weight_block_size")),
            "use_optimized_inference": ANY,
        },
        transformers="CompressedTensorsConfig",
        check=_check_groups,
    ),
    "gptq": Method(
        fields={
            **OF_GPTQS_MAKING,
            "bits": (2, 4, 8),
            "checkpoint_format": ("gptq", "gptq_v2"),
            "format": ("gptq", "gptq_v2"),
            "is_marlin_format": (False,),
            "pack_dtype": ("int32",),
            "desc_act": (True, False),
            "sym": (True, False),
            **dict.fromkeys(("group_size", "dynamic")),
        },
        transformers="GPTQConfig",
        check=_check_gptq,
    ),
    "awq": Method(
        fields={
            **OF_GPTQS_MAKING,
            "bits": (4,),
            "w_bit": (4,),
            "version": ("gemm",),
            "format": ("gemm",),
            "zero_point": (True,),
            "backend": (
                "autoawq", "auto", "auto_trainable", "gemm", "marlin", "machete", "exllama_v1", "exllama_v2", "exllama", "ipex",
                "torch", "torch_fused", "torch_awq", "torch_fused_awq", "triton", "gemm_triton", "bitblas",
            ),
            **dict.fromkeys(("group_size", "q_group_size", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "desc_act", "sym")),
        },
        transformers="AwqConfig",
        check=_check_group_size,
    ),
    "bitsandbytes": Method(
        fields={
            "bnb_4bit_quant_storage": ("uint8", "torch.uint8"),
            **dict.fromkeys(
                "load_in_4bit load_in_8bit _load_in_4bit _load_in_8bit bnb_4bit_compute_dtype bnb_4bit_quant_type "
                "bnb_4bit_use_double_quant llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight llm_int8_skip_modules "
                "llm_int8_threshold".split()
            ),
        },
        transformers="BitsAndBytesConfig",
    ),
    "mxfp4": Method(fields={}, transformers="Mxfp4Config"),
}  # fmt: skip
