"""Flags of Megatron-SWIFT that are no settings of ours: each is accepted, mapped or refused, with a reason, so that its scripts run.

A flag that is accepted without effect is named once, with the reason, when a command starts. Flags that mean the same as one of our
settings are not here: they are a setting's `flag` in schema.py. Source: the arguments of ms-swift's `megatron sft|pt|export|rlhf`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from swift_mega.errors import UserError

ANY = ()
"""Every value is accepted."""


@dataclass(frozen=True)
class PeerFlag:
    """One flag. kind: how many words it takes.

    accepted: the values that are accepted without effect (ANY: all), and `why` they have none. Other values are refused with `remedy`.
    becomes: our setting that gets the value instead, if there is one; values of the peer -> ours in `values`, other values unchanged.
    """

    kind: Literal["switch", "one", "many"]
    why: str = ""
    accepted: tuple[str, ...] | None = None
    remedy: str = ""
    becomes: str | None = None
    values: Mapping[str, str] | None = None

    def note(self, name: str, value: str) -> str:
        """The line about an accepted flag; UserError for a value that is refused."""
        if self.accepted is not None and (self.accepted == ANY or value in self.accepted):
            return f"{'--' + name:<27} no effect: {self.why}"
        raise UserError(f"--{name}{f'={value}' if value else ''}: {self.remedy}")


def _none(why: str, *, kind: Literal["switch", "one", "many"] = "switch") -> PeerFlag:
    return PeerFlag(kind, why, ANY)


def _only(value: str, why: str, remedy: str) -> PeerFlag:
    return PeerFlag("switch" if value in ("true", "false") else "one", why, (value,), remedy)


def _missing(what: str, *names: str, kind: Literal["switch", "one", "many"] = "one") -> dict[str, PeerFlag]:
    return {
        name: PeerFlag(kind, remedy=f"needs {what}, which swift_mega does not have yet; remove the flag")
        for name in names
    }


_FUSED = "kernels are chosen by what is installed (train.kernels); the header of a run names them"
_WEIGHTS = "a run starts from the weights alone, and writes weights alone"
_TOKENS = "data is tokenised once, before ranks start, by the tokenizer's own threads"
PEERS: dict[str, PeerFlag] = {
    "save_safetensors": _only(
        "true", "checkpoints are safetensors", "checkpoints are safetensors, which vLLM and transformers read; remove it"
    ),
    "finetune": _only("true", _WEIGHTS, "a run cannot continue another's optimizer yet; remove it, or set it to true"),
    "no_save_optim": _only("true", _WEIGHTS, "optimizer state is not saved yet; remove it, or set it to true"),
    "no_save_rng": _only("true", _WEIGHTS, "random states are not saved yet; remove it, or set it to true"),
    "no_load_optim": _only("true", _WEIGHTS, "optimizer state is not saved yet; remove it, or set it to true"),
    "no_load_rng": _only("true", _WEIGHTS, "random states are not saved yet; remove it, or set it to true"),
    "dataloader_num_workers": _none(_TOKENS, kind="one"),
    "dataset_num_proc": _none(_TOKENS, kind="one"),
    "load_from_cache_file": _none(_TOKENS),
    "lazy_tokenize": _only("false", _TOKENS, "tokenising during training is not supported yet; remove it"),
    "padding_free": _none("rows are always packed without padding inside a microbatch; the result is the same either way"),
    "cross_entropy_loss_fusion": _none("the loss is always computed from hidden states, without logits of the whole row"),
    "cross_entropy_fusion_impl": _none("the loss is always computed from hidden states", kind="one"),
    "attention_backend": PeerFlag("one", _FUSED, ("flash", "auto", "fused"), "set train.kernels=reference for plain torch"),
    "moe_permute_fusion": _none(_FUSED),
    "moe_grouped_gemm": _none("experts are computed by grouped products where the device has them"),
    "moe_shared_expert_overlap": _none("shared experts run before the routed ones; the result is the same"),
    "gradient_accumulation_fusion": _none(_FUSED),
    "use_flash_attn": _none(_FUSED),
    "use_hf": _none("models and data are read from disk"),
    "bf16": PeerFlag("switch", becomes="model.dtype", values={"true": "bfloat16", "false": "float32"}),
    "fp16": _only("false", "weights are not float16", "float16 is not supported; remove it, and set model.dtype=bfloat16"),
    "moe_router_dtype": PeerFlag("one", becomes="model.megatron.moe_router_dtype"),
    "task_type": _only("causal_lm", "it is what is trained", "only causal_lm is supported yet"),
    "add_bias_linear": _none("config.json says which linears have biases"),
    "disable_bias_linear": _none("config.json says which linears have biases"),
    "untie_embeddings_and_output_weights": _none("config.json says whether they are tied"),
    "group_by_length": _only("false", "rows are not sorted by length", "set data.packing=true, which wastes no padding"),
    "remove_unused_columns": _none("columns that are not read are counted in the data report"),
    "trust_remote_code": _only("false", "no code of a model is run", "code of a model's directory is never run; remove it"),
    **_missing(
        "preference and reinforcement training",
        "rlhf_type", "beta", "rpo_alpha", "reward_funcs", "num_generations", "max_completion_length", "use_vllm", "vllm_mode",
        "vllm_gpu_memory_utilization", "vllm_max_model_len", "sleep_level", "vllm_tensor_parallel_size", "epsilon",
        "epsilon_high", "steps_per_generation", "importance_sampling_level", "dynamic_sample", "overlong_filter",
        "log_completions", "teacher_model", "lmbda", "center_rewards_coefficient", "desirable_weight", "undesirable_weight",
        "num_labels", "temperature", "top_p", "top_k", "external_plugins", "multi_turn_scheduler", "max_turns", "loss_type",
        "offload_model", "offload_optimizer",
    ),
    **_missing(
        "a model with vision or audio",
        "freeze_vit", "freeze_aligner", "freeze_llm", "vit_lr", "aligner_lr", "vit_gradient_checkpointing",
    ),
    **_missing("merged input projections of linear attention", "linear_decoupled_in_proj", kind="switch"),
    **_missing("a template's thinking mode", "enable_thinking", "add_non_thinking_prefix", kind="switch"),
    **_missing("multi-token prediction as a loss", "mtp_num_layers", "mtp_loss_scaling_factor"),
    **_missing("training in FP8", "fp8_recipe", "fp8_format", "fp8_param_gather", "fp8_amax_history_len"),
    **_missing("an optimizer other than AdamW", "optimizer"),
    **_missing("optimizer state below float32", "use_precision_aware_optimizer", "exp_avg_dtype", "exp_avg_sq_dtype", "main_params_dtype"),
    **_missing("dropping tokens of full experts", "moe_expert_capacity_factor", "moe_token_drop_policy"),
    **_missing("training whole modules beside an adapter", "modules_to_save", kind="many"),
}  # fmt: skip
