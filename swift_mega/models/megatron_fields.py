"""Every field of Megatron's TransformerConfig and MLATransformerConfig, 0.16 to 0.19, and what model.megatron does with it.

A field is passed on only where every layer, ours or Megatron's, obeys it (PASSED_ON and ON_CUDA, each with its condition). All others are
refused with a reason. A field that this table does not list is refused too, because nobody has checked what reads it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from swift_mega.config.schema import Train
from swift_mega.models.fusions import activation_unfused, dropout_unfused
from swift_mega.models.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Request:
    """What conditions look at: the fields that the user gave, and the run around them."""

    given: Mapping[str, Any]
    settings: Settings
    train: Train


Condition = Callable[[Request], str | None]
"""Returns why the field would have no effect, or a wrong one; None: it is obeyed."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _experts(request: Request) -> str | None:
    return None if request.settings.shape.experts else "this model has no experts"


def _dropout(request: Request) -> str | None:
    rate = request.given["hidden_dropout"]
    fits = isinstance(rate, int | float) and not isinstance(rate, bool) and 0 <= rate < 1
    return None if fits else "expected a probability of at least 0 and below 1"


def _router_dtype(request: Request) -> str | None:
    if request.given["moe_router_dtype"] not in ("fp32", "fp64", None):
        return "expected fp32, fp64 or null"
    return _experts(request)


def _expert_bias(request: Request) -> str | None:
    return None if request.given.get("moe_router_enable_expert_bias") else "it needs moe_router_enable_expert_bias=true"


def _modules(request: Request) -> str | None:
    """Each of the named modules must exist, so that it can be recomputed."""
    settings, wanted = request.settings, request.given["recompute_modules"]
    if request.train.recompute != "selective":
        return "only train.recompute=selective reads it"
    if not isinstance(wanted, list | tuple) or not wanted or not all(isinstance(name, str) for name in wanted):
        return "expected a list of core_attn, mlp, layernorm, moe, shared_experts"
    missing = {
        "core_attn": None,
        "mlp": "every MLP of this model is a mixture of experts" if all(settings.moe_layers) else None,
        "layernorm": None if settings.block.pre_norms else "this model has no norms before attention and MLP",
        "moe": None if any(settings.moe_layers) else "this model has no experts",
        "shared_experts": None if settings.shape.shared_ffn else "this model has no shared experts",
        "mla_up_proj": "latent attention here is not Megatron's",
        "moe_act": "only Megatron's grouped experts read it",
    }
    for name in wanted:
        if name not in missing:
            return f"{name!r} is none of {', '.join(name for name in missing if not _never(name))}"
        if reason := missing[name]:
            return f"{name}: {reason}"
    return None


def _never(name: str) -> bool:
    return name in ("mla_up_proj", "moe_act")


def _saved(request: Request) -> str | None:
    return None if request.train.recompute == "full" else "only train.recompute=full reads it"


def _fp8(request: Request) -> str | None:
    return None if request.given.get("fp8") else "it needs fp8"


def _activation_fusion(request: Request) -> str | None:
    return activation_unfused(request.settings) if request.given["bias_activation_fusion"] else None


def _dropout_fusion(request: Request) -> str | None:
    if not request.given["bias_dropout_fusion"]:
        return None
    if request.settings.biases.mlp and "mlp" in (request.given.get("recompute_modules") or ()):
        return "recompute_modules has mlp and this model's MLPs have biases, so its layers are ours (models/modules/layer.py)"
    return dropout_unfused(request.settings)


def _always(request: Request) -> str | None:
    return None


PASSED_ON: dict[str, Condition] = {
    "hidden_dropout": _dropout,
    "recompute_modules": _modules,
    "distribute_saved_activations": _saved,
    "clone_scatter_output_in_embedding": _always,
    "moe_z_loss_coeff": _always,  # read by models/modules/balancing.py, like the next two
    "moe_aux_loss_coeff": _always,
    "moe_router_load_balancing_type": _always,
    "moe_router_dtype": _router_dtype,
    "moe_router_enable_expert_bias": _experts,
    "moe_router_bias_update_rate": _expert_bias,
}
"""Fields that are passed on, and their conditions."""

ON_CUDA: dict[str, Condition] = {
    **dict.fromkeys(_words("fp8 batch_p2p_comm batch_p2p_sync overlap_p2p_comm deallocate_pipeline_outputs"), _always),
    **dict.fromkeys(
        _words(
            "fp8_recipe fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad tp_only_amax_red "
            "first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 disable_parameter_transpose_cache"
        ),
        _fp8,
    ),
    **dict.fromkeys(_words("moe_shared_expert_overlap moe_permute_fusion moe_router_fusion"), _experts),
    "gradient_accumulation_fusion": _always,
    "bias_activation_fusion": _activation_fusion,
    "bias_dropout_fusion": _dropout_fusion,
}
"""Kernels, streams and communication between stages, of Megatron and Transformer Engine, that the CPU lacks or that gloo gets wrong."""

WITH_TE = _words("""
    fp8 fp8_recipe fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad tp_only_amax_red first_last_layers_bf16
    num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 disable_parameter_transpose_cache moe_permute_fusion moe_router_fusion
""")
"""Those of ON_CUDA that are kernels of Transformer Engine."""

FUSED = (*WITH_TE, "gradient_accumulation_fusion", "bias_activation_fusion", "bias_dropout_fusion")
"""Those of ON_CUDA that are kernels, of Transformer Engine, apex or torch.compile."""

OURS = _words("""
    tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size context_parallel_size
    expert_model_parallel_size expert_tensor_parallel_size sequence_parallel params_dtype pipeline_dtype bf16 fp16
    recompute_granularity recompute_method recompute_num_layers calculate_per_token_loss variable_seq_lengths
    pipeline_model_parallel_layout num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage cp_comm_type
    hierarchical_context_parallel_sizes account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
    moe_extended_tp moe_grouped_gemm moe_token_dispatcher_type use_cpu_initialization perform_initialization
    pipeline_model_parallel_comm_backend microbatch_group_size_per_vp_stage max_seqlen_per_dp_cp_rank hybrid_context_parallel
    transformer_impl enable_autocast autocast_dtype deterministic_mode
""")
"""Fields that follow from the layout and our own settings."""

MODEL = _words("""
    num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels num_moe_experts moe_ffn_hidden_size
    moe_layer_freq moe_router_topk moe_router_score_function moe_router_pre_softmax moe_router_num_groups moe_router_group_topk
    moe_router_topk_limited_devices moe_router_topk_scaling_factor moe_shared_expert_intermediate_size moe_shared_expert_gate
    moe_apply_probs_on_input moe_latent_size layernorm_epsilon layernorm_zero_centered_gamma normalization add_bias_linear
    add_qkv_bias gated_linear_unit activation_func activation_func_clamp_value glu_linear_offset qk_layernorm qk_l2_norm
    attention_output_gate multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim rope_type
    rotary_base rotary_percent rotary_scaling_factor original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim
    mrope_section softmax_scale experimental_attention_variant linear_attention_freq linear_conv_kernel_dim linear_key_head_dim
    linear_value_head_dim linear_num_key_heads linear_num_value_heads apply_residual_connection_post_layernorm
    use_fused_weighted_squared_relu
""")
"""Fields that follow from config.json, with which a trained model is exported and run."""

_ATTENTION = "attention here is not Megatron's (models/modules/attention.py), and "
_WINDOWS = _ATTENTION + "takes windows from the model's config.json; remove it"
_ROTATIONS = _ATTENTION + "takes rotations from the model's config.json; remove it"


def _by_name(groups: Mapping[str, str]) -> dict[str, str]:
    return {name: reason for reason, names in groups.items() for name in names.split()}


def _no_effect() -> dict[str, str]:
    groups = {
        _ATTENTION + "has no dropout; remove it": "attention_dropout",
        _WINDOWS: "window_size window_attn_skip_freq",
        _ATTENTION + "takes sinks from the model's config.json; remove it": "softmax_type",
        _ROTATIONS: "no_rope_freq rotary_interleaved apply_rope_fusion fused_single_qkv_rope",
        _ATTENTION + "takes its scale from the model's config.json; remove it": "apply_query_key_layer_scaling",
        _ATTENTION + "always has its softmax in float32; remove it": "attention_softmax_in_fp32",
        _ATTENTION + "chooses its kernels by device and dtype; remove it": """
            attention_backend masked_softmax_fusion flash_attention_version fp8_dot_product_attention fp8_multi_head_attention""",
        _ATTENTION
        + "does not return its scores; remove it": "qk_clip qk_clip_alpha qk_clip_threshold log_max_attention_logit",
        "it excludes recomputation; set train.offload_activations": """
            cpu_offloading cpu_offloading_num_layers _cpu_offloading_context cpu_offloading_activations cpu_offloading_weights
            cpu_offloading_double_buffering cpu_offloading_retain_pinned_cpu_buffers""",
        "activations are moved by train.offload_activations; set that": """
            fine_grained_activation_offloading offload_modules min_offloaded_tensor_size activation_offload_fraction
            delay_offload_until_cuda_graph delta_offload_bytes_across_pp_ranks fine_grained_offloading_max_inflight_offloads""",
        "every weight is read from the checkpoint; remove it": """
            init_method output_layer_init_method init_method_std embedding_init_method embedding_init_method_std
            init_model_with_meta_device use_mup mup_attn_scale_power mup_base_head_dim mup_base_hidden_size mup_embedding_mult
            mup_output_mult mup_width_mult""",
        "the loss is computed here (parallel/vocab.py); remove it": """
            cross_entropy_loss_fusion cross_entropy_fusion_impl defer_embedding_wgrad_compute wgrad_deferral_limit""",
        "norms are Transformer Engine's or our own; remove it": """
            persist_layer_norm memory_efficient_layer_norm fused_residual_rmsnorm""",
        "it belongs to inference with Megatron; remove it": """
            flash_decode inference_rng_tracker inference_sampling_seed symmetric_ar_type use_inference_optimized_layers
            inference_fuse_tp_communication mlp_chunks_for_prefill cache_mla_latents inference_cuda_graph_scope
            inference_disable_triton_nvls_kernels inference_grouped_gemm_backend inference_moe_disable_fused_quant_kernels
            inference_moe_token_dispatcher_type moe_pad_experts_for_cuda_graph_inference nccl_all_reduce_for_prefill""",
        "layers of multi-token prediction are kept as they are, not trained; remove it": """
            mtp_num_layers mtp_loss_scaling_factor mtp_standalone mtp_detach_heads mtp_grad_scale_func
            mtp_hybrid_override_pattern mtp_use_repeated_layer""",
        "it belongs to kinds of layers that no supported model has; remove it": """
            is_hybrid_model mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads use_mamba_mem_eff_path
            mamba_training_ssm_states_dtype heterogeneous_block_specs hetereogenous_dist_checkpoint dsa_indexer_n_heads
            dsa_indexer_head_dim dsa_indexer_topk dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss dsa_indexer_k_norm_epsilon
            dsa_indexer_k_norm_fp32 dsa_indexer_rope_interleaved dsa_indexer_rotate_activation dsa_indexer_scoring_relu
            dsa_indexer_skip_topk_offset dsa_indexer_topk_freq dsa_kernel_backend
            experimental_attention_variant_loss_scale_func""",
        "training here sets it, or has another way to do it; remove it": """
            timers barrier_with_L1_time finalize_model_grads_func grad_scale_func no_sync_func grad_sync_func param_sync_func
            moe_grad_scale_func test_mode config_logger_dir moe_per_layer_logging use_te_rng_tracker
            num_microbatches_with_partial_activation_checkpoints moe_enable_routing_replay""",
    }
    return _by_name(groups)


UNREAD = _no_effect()
"""Fields that would have no effect, or none in some layers, and why."""


def _refused() -> dict[str, str]:
    groups = {
        "which tokens an expert drops would depend on the tokens of a rank, so that layouts train different models; remove it": """
            moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_token_drop_policy moe_token_dropping
            moe_expert_rank_capacity_factor moe_router_quantile_balancing_ema""",
        "the router's choice would be random, in validation too; remove it": """
            moe_input_jitter_eps moe_router_force_load_balancing moe_router_force_biased""",
        "set train.recompute=selective and model.megatron.recompute_modules=[moe]": "moe_layer_recompute",
        "graphs need rows of one length, and rows here vary; remove it": """
            enable_cuda_graph external_cuda_graph cuda_graph_impl cuda_graph_scope cuda_graph_modules cuda_graph_use_single_mempool
            cuda_graph_retain_backward_graph cuda_graph_warmup_steps""",
        "its buffers and streams are set up by Megatron-LM's initialisation, which is not run here; remove it": """
            tp_comm_overlap tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs tp_comm_overlap_rs_dgrad
            tp_comm_split_ag tp_comm_atomic_ag tp_comm_split_rs tp_comm_atomic_rs tp_comm_overlap_disable_qkv
            tp_comm_overlap_disable_fc1 tp_comm_bootstrap_backend use_ring_exchange_p2p overlap_p2p_comm_warmup_flush
            high_priority_a2a_comm_stream""",
        "it needs a schedule that calls the parts of a layer, and weight gradients after it; remove it": """
            overlap_moe_expert_parallel_comm delay_wgrad_compute ep_overlap_early_attn_memory_release
            overlap_dispatch_backward_with_experts_wgrad""",
        "its token dispatcher is not tested here, only alltoall is; remove it": """
            moe_enable_deepep moe_flex_dispatcher_backend moe_deepep_num_sms moe_hybridep_num_sms moe_flex_dispatcher_num_sms
            moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms_preprocessing
            moe_hybridep_pad_uneven_dispatch_inputs moe_ncclep_static_shape moe_ncclep_zero_copy moe_permute_fusion_into_hybridep
            moe_paged_stash moe_paged_stash_buffer_size_factor_cpu moe_paged_stash_buffer_size_factor_cuda
            moe_paged_stash_page_size""",
        "weights in another format would be neither read nor written; remove it": """
            fp8_param fp4_param moe_single_grouped_bias moe_single_grouped_weight moe_mlp_glu_interleave_size
            moe_shared_expert_glu_interleave_size mla_down_proj_fusion tensor_parallel_num_weight_shards
            expert_tensor_parallel_num_weight_shards gtp_weight_remat_size expert_gtp_weight_remat_size""",
        "it is not tested with the layers here; remove it": """
            fp4 fp4_recipe fp4_quantizer_factory fp8_quantizer_factory fp8_output_proj activation_func_fp8_input_store use_kitchen
            use_kitchen_attention kitchen_attention_backend quant_recipe use_te_activation_func use_transformer_engine_op_fuser
            use_grouped_gemm_for_dense_mlp use_grouped_gemm_for_shared_expert moe_use_legacy_grouped_gemm mlp_chunks_for_training
            moe_router_padding_for_quantization moe_router_padding_for_fp8 fp32_residual_connection""",
        "layers here do not obey it in all their parts; remove it": """
            batch_invariant_mode disable_bf16_reduced_precision_matmul async_tensor_model_parallel_allreduce""",
    }
    return _by_name(groups)


REFUSED = _refused()
"""Fields whose effect here would be wrong, or is not proven, and why."""
