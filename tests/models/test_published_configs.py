"""The config.json of published models, with their published values, are understood completely, and give the right counts."""

import dataclasses
import json
from pathlib import Path

import pytest

from swift_mega.errors import UserError
from swift_mega.models.modules.core_edits import Alibi
from swift_mega.models.modules.gated_delta import DeltaNet
from swift_mega.models.modules.norm import EmbeddingNorm, HeadQKNorm
from swift_mega.models.modules.router import Routing
from swift_mega.models.translate import load_settings
from tests.models import published_dense, published_experts

CONFIGS = {
    "llama31": """
{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 128000,
"eos_token_id": [128001, 128008], "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
"intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps":
1e-05, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
"original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0, "tie_word_embeddings":
false, "torch_dtype": "bfloat16", "transformers_version": "4.42.3", "use_cache": true, "vocab_size": 128256}
""",
    "llama2old": """
{"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size":
4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096, "max_sequence_length":
2048, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
"pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null, "tie_word_embeddings": false,
"torch_dtype": "float16", "use_cache": true, "vocab_size": 32000}
""",
    "qwen25": """
{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
"hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
"max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
"num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window":
32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "use_cache": true, "use_sliding_window": false,
"use_mrope": false, "vocab_size": 151936}
""",
    "qwen3": """
{"architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "head_dim": 128,
"hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 12288,
"max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3", "num_attention_heads": 32,
"num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000,
"sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true,
"use_sliding_window": false, "vocab_size": 151936}
""",
    "qwen3moe": """
{"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "decoder_sparse_step":
1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
"max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
"moe_intermediate_size": 768, "norm_topk_prob": true, "num_attention_heads": 32, "num_experts": 128,
"num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": false,
"rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window":
null, "tie_word_embeddings": false, "use_sliding_window": false, "vocab_size": 151936}
""",
    "mixtral": """
{"architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
"hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
"max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
"num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": false,
"rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": null,
"tie_word_embeddings": false, "vocab_size": 32000}
""",
    "mistral": """
{"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size":
4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type":
"mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
"rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false, "vocab_size": 32000}
""",
    "gemma2": """
{"architectures": ["Gemma2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "attn_logit_softcapping":
50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1, "final_logit_softcapping": 30.0,
"head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304,
"initializer_range": 0.02, "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2",
"num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0,
"query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "use_cache": true,
"vocab_size": 256000}
""",
    "gemma3": """
{"architectures": ["Gemma3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "attn_logit_softcapping":
null, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106], "final_logit_softcapping": null,
"head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
"intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4,
"num_hidden_layers": 26, "num_key_value_heads": 1, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps":
1e-06, "rope_local_base_freq": 10000, "rope_scaling": null, "rope_theta": 1000000, "sliding_window": 512,
"sliding_window_pattern": 6, "use_cache": true, "vocab_size": 262144}
""",
    "gemma": """
{"architectures": ["GemmaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 2,
"eos_token_id": 1, "head_dim": 256, "hidden_act": "gelu", "hidden_activation": null, "hidden_size": 2048,
"initializer_range": 0.02, "intermediate_size": 16384, "max_position_embeddings": 8192, "model_type": "gemma",
"num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1, "pad_token_id": 0, "rms_norm_eps": 1e-06,
"rope_scaling": null, "rope_theta": 10000.0, "vocab_size": 256000}
""",
    "granite": """
{"architectures": ["GraniteForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "attention_multiplier":
0.015625, "bos_token_id": 0, "embedding_multiplier": 12.0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size":
2048, "initializer_range": 0.02, "intermediate_size": 8192, "logits_scaling": 8.0, "max_position_embeddings": 131072,
"mlp_bias": false, "model_type": "granite", "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads":
8, "pad_token_id": 0, "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta":
10000000.0, "tie_word_embeddings": true, "vocab_size": 49155}
""",
    "olmo2": """
{"architectures": ["Olmo2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "eos_token_id": 100257,
"hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
"max_position_embeddings": 4096, "model_type": "olmo2", "num_attention_heads": 32, "num_hidden_layers": 32,
"num_key_value_heads": 32, "pad_token_id": 100277, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 500000,
"tie_word_embeddings": false, "vocab_size": 100352}
""",
    "phi4": """
{"architectures": ["Phi3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 100257,
"embd_pdrop": 0.0, "eos_token_id": 100265, "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02,
"intermediate_size": 17920, "max_position_embeddings": 16384, "model_type": "phi3", "num_attention_heads": 40,
"num_hidden_layers": 40, "num_key_value_heads": 10, "original_max_position_embeddings": 16384, "pad_token_id": 100349,
"resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 250000, "sliding_window": null,
"tie_word_embeddings": false, "vocab_size": 100352}
""",
    "smollm3": """
{"architectures": ["SmolLM3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": null,
"eos_token_id": 128012, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size":
11008, "layer_types": ["full_attention", "full_attention", "full_attention", "full_attention", "full_attention",
"full_attention", "full_attention", "full_attention", "full_attention", "full_attention", "full_attention",
"full_attention", "full_attention", "full_attention", "full_attention", "full_attention", "full_attention",
"full_attention", "full_attention", "full_attention", "full_attention", "full_attention", "full_attention",
"full_attention", "full_attention", "full_attention", "full_attention", "full_attention", "full_attention",
"full_attention", "full_attention", "full_attention", "full_attention", "full_attention", "full_attention",
"full_attention"], "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": false, "model_type":
"smollm3", "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0,
1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0], "num_attention_heads": 16, "num_hidden_layers": 36,
"num_key_value_heads": 4, "pad_token_id": 128004, "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": null,
"rope_theta": 5000000.0, "sliding_window": null, "use_cache": false, "use_sliding_window": false, "vocab_size":
128256}
""",
    "glm4": """
{"architectures": ["Glm4ForCausalLM"], "attention_bias": true, "attention_dropout": 0.0, "eos_token_id": [1],
"head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 13696,
"max_position_embeddings": 32768, "model_type": "glm4", "num_attention_heads": 32, "num_hidden_layers": 40,
"num_key_value_heads": 2, "pad_token_id": 151329, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05, "rope_theta":
10000.0, "tie_word_embeddings": false, "vocab_size": 151552}
""",
    "deepseek_v3": """
{"architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "auto_map": {},
"bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size":
7168, "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
"model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts":
256, "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 128, "num_experts_per_tok": 8,
"num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32, "beta_slow":
1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
"rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": false,
"topk_group": 4, "topk_method": "noaux_tc", "use_cache": true, "v_head_dim": 128, "vocab_size": 129280}
""",
    "starcoder2": """
{"activation_function": "gelu", "architectures": ["Starcoder2ForCausalLM"], "attention_dropout": 0.1,
"attention_softmax_in_fp32": true, "bos_token_id": 0, "embedding_dropout": 0.1, "eos_token_id": 0, "hidden_act":
"gelu_pytorch_tanh", "hidden_size": 3072, "initializer_range": 0.018042, "intermediate_size": 12288,
"layer_norm_epsilon": 1e-05, "max_position_embeddings": 16384, "mlp_type": "default", "model_type": "starcoder2",
"norm_epsilon": 1e-05, "norm_type": "layer_norm", "num_attention_heads": 24, "num_hidden_layers": 30,
"num_key_value_heads": 2, "residual_dropout": 0.1, "rope_theta": 999999.4420358813, "scale_attention_softmax_in_fp32":
true, "scale_attn_weights": true, "sliding_window": 4096, "use_bias": true, "vocab_size": 49152}
""",
    "gpt2": """
{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
"embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
"n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1,
"summary_activation": null, "summary_first_dropout": 0.1, "summary_proj_to_labels": true, "summary_type": "cls_index",
"summary_use_proj": true, "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}},
"vocab_size": 50257}
""",
    "pythia": """
{"architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu", "hidden_size":
768, "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048,
"model_type": "gpt_neox", "num_attention_heads": 12, "num_hidden_layers": 12, "rotary_emb_base": 10000, "rotary_pct":
0.25, "tie_word_embeddings": false, "torch_dtype": "float16", "transformers_version": "4.24.0", "use_cache": true,
"use_parallel_residual": true, "vocab_size": 50304}
""",
    "gpt_neox": """
{"architectures": ["GPTNeoXForCausalLM"], "attention_probs_dropout_prob": 0, "bos_token_id": 0, "eos_token_id": 0,
"hidden_act": "gelu_fast", "hidden_dropout_prob": 0, "hidden_size": 6144, "initializer_range": 0.02,
"intermediate_size": 24576, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "gpt_neox",
"num_attention_heads": 64, "num_hidden_layers": 44, "rotary_emb_base": 10000, "rotary_pct": 0.25,
"tie_word_embeddings": false, "torch_dtype": "float16", "use_cache": true, "vocab_size": 50432}
""",
    "falcon7b": """
{"alibi": false, "apply_residual_connection_post_layernorm": false, "architectures": ["FalconForCausalLM"],
"attention_dropout": 0.0, "bias": false, "bos_token_id": 11, "eos_token_id": 11, "hidden_dropout": 0.0, "hidden_size":
4544, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "falcon", "multi_query": true,
"new_decoder_architecture": false, "num_attention_heads": 71, "num_hidden_layers": 32, "parallel_attn": true,
"torch_dtype": "bfloat16", "transformers_version": "4.27.4", "use_cache": true, "vocab_size": 65024}
""",
    "falcon40b": """
{"alibi": false, "apply_residual_connection_post_layernorm": false, "architectures": ["FalconForCausalLM"],
"attention_dropout": 0.0, "bias": false, "bos_token_id": 11, "eos_token_id": 11, "hidden_dropout": 0.0, "hidden_size":
8192, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "falcon", "multi_query": true,
"new_decoder_architecture": true, "num_attention_heads": 128, "num_hidden_layers": 60, "num_kv_heads": 8,
"parallel_attn": true, "torch_dtype": "bfloat16", "transformers_version": "4.27.4", "use_cache": true, "vocab_size":
65024}
""",
    "starcoder": """
{"activation_function": "gelu", "architectures": ["GPTBigCodeForCausalLM"], "attention_softmax_in_fp32": true,
"attn_pdrop": 0.1, "bos_token_id": 0, "embd_pdrop": 0.1, "eos_token_id": 0, "inference_runner": 0, "initializer_range":
0.02, "layer_norm_epsilon": 1e-05, "max_batch_size": null, "max_sequence_length": null, "model_type": "gpt_bigcode",
"multi_query": true, "n_embd": 6144, "n_head": 48, "n_inner": 24576, "n_layer": 40, "n_positions": 8192,
"pad_key_length": true, "pre_allocate_kv_cache": false, "resid_pdrop": 0.1, "scale_attention_softmax_in_fp32": true,
"scale_attn_weights": true, "summary_activation": null, "summary_first_dropout": 0.1, "summary_proj_to_labels": true,
"summary_type": "cls_index", "summary_use_proj": true, "use_cache": true, "validate_runner_input": true, "vocab_size":
49152}
""",
    "bloom": """
{"apply_residual_connection_post_layernorm": false, "architectures": ["BloomForCausalLM"], "attention_dropout": 0.0,
"attention_softmax_in_fp32": true, "bias_dropout_fusion": true, "bos_token_id": 1, "eos_token_id": 2, "hidden_dropout":
0.0, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "masked_softmax_fusion": true, "model_type": "bloom",
"n_embed": 1024, "n_inner": null, "n_layer": 24, "num_attention_heads": 16, "offset_alibi": 100, "pad_token_id": 3,
"pretraining_tp": 1, "seq_length": 2048, "skip_bias_add": true, "skip_bias_add_qkv": false, "slow_but_exact": false,
"unk_token_id": 0, "use_cache": true, "vocab_size": 250880}
""",
    "mpt": """
{"architectures": ["MPTForCausalLM"], "attn_config": {"alibi": true, "alibi_bias_max": 8, "attn_impl": "torch",
"attn_pdrop": 0, "attn_type": "multihead_attention", "attn_uses_sequence_id": false, "clip_qkv": null, "prefix_lm":
false, "qk_ln": false, "softmax_scale": null}, "d_model": 4096, "emb_pdrop": 0, "embedding_fraction": 1.0,
"expansion_ratio": 4, "init_device": "cpu", "learned_pos_emb": true, "logit_scale": null, "max_seq_len": 2048,
"model_type": "mpt", "n_heads": 32, "n_layers": 32, "no_bias": true, "norm_type": "low_precision_layernorm",
"resid_pdrop": 0, "tokenizer_name": "EleutherAI/gpt-neox-20b", "torch_dtype": "bfloat16", "use_cache": false, "verbose":
0, "vocab_size": 50432}
""",
}
CONFIGS.update(published_dense.CONFIGS | published_experts.CONFIGS)
WORDS = {
    "num_hidden_layers": ("n_layer", "n_layers"),
    "hidden_size": ("n_embd", "n_embed", "d_model"),
    "num_attention_heads": ("n_head", "n_heads"),
    "num_key_value_heads": ("num_kv_heads",),
}
"""Other names of these fields in older configs."""
KEY_HEADS = {"gpt2": 12, "pythia": 12, "gpt_neox": 64, "falcon7b": 1, "starcoder": 1, "bloom": 16, "mpt": 32}
"""Values that config.json does not have."""
WINDOWS = {"mistral": 4096, "starcoder2": 4096, "ministral": 32768, "phi35": 262144}
"""Every layer sees this many tokens."""


def write(directory: Path, name: str, **changes: object) -> Path:
    (directory / "config.json").write_text(json.dumps({**json.loads(CONFIGS[name]), **changes}))
    return directory


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_config_is_understood(tmp_path: Path, name: str) -> None:
    raw, settings = json.loads(CONFIGS[name]), load_settings(write(tmp_path, name))
    shape = settings.shape
    for word, others in WORDS.items():
        raw[word] = next((raw[key] for key in (word, *others) if key in raw), None)
    assert (shape.layers, shape.hidden, shape.vocab) == (
        raw["num_hidden_layers"],
        raw["hidden_size"],
        raw["vocab_size"],
    )
    assert shape.heads == raw["num_attention_heads"]
    assert shape.kv_heads == (KEY_HEADS[name] if name in KEY_HEADS else raw["num_key_value_heads"])
    if name in WINDOWS:
        assert set(settings.windows) == {WINDOWS[name]}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_field_of_tomorrow_stops_the_run(tmp_path: Path, name: str) -> None:
    """The installed transformers does not read it, and a newer one may."""
    with pytest.raises(UserError, match=r"field_of_tomorrow=3; transformers 99.1.0.dev0, which wrote it and is newer"):
        load_settings(write(tmp_path, name, field_of_tomorrow=3, transformers_version="99.1.0.dev0"))


def test_layers_differ_where_the_published_models_say(tmp_path: Path) -> None:
    """Gemma 2: every other layer looks back 4096 tokens. Gemma 3: five of six layers look back 512, with a rotary base of their own.
    SmolLM3: every fourth layer has no rotary embedding. DeepSeek-V3: the first three layers are dense."""
    made = {}
    for name in ("gemma2", "gemma3", "smollm3", "deepseek_v3"):
        (tmp_path / name).mkdir()
        made[name] = load_settings(write(tmp_path / name, name))
    assert made["gemma2"].windows == (4096, None) * 13
    assert made["gemma3"].windows[:6] == (512,) * 5 + (None,) and len(made["gemma3"].distinct_ropes) == 2
    assert [rope is None for rope in made["smollm3"].ropes[:8]] == [False, False, False, True] * 2
    assert made["deepseek_v3"].moe_layers == (False,) * 3 + (True,) * 58
    assert (made["deepseek_v3"].shape.experts, made["deepseek_v3"].shape.expert_ffn) == (256, 2048)


def test_three_of_four_layers_of_qwen3_next_are_delta_nets(tmp_path: Path) -> None:
    """Every fourth layer has gated attention, with rotary embedding of 64 of 256 features."""
    settings = load_settings(write(tmp_path, "qwen3_next"))
    (delta,) = settings.edits
    assert isinstance(delta, DeltaNet) and delta.layers == (True, True, True, False) * 12 and all(settings.moe_layers)
    assert [rope is None for rope in settings.ropes] == list(delta.layers)
    assert settings.rope is not None and len(settings.rope.inverse_frequencies) == 32
    assert settings.heads.channels == (128, 128, 256)
    assert settings.megatron["attention_output_gate"] and settings.norm.one_plus


def test_what_older_models_have_for_positions(tmp_path: Path) -> None:
    """GPT-2: a table of 1024. Pythia: rotary embedding of a quarter of 64 features. BLOOM: ALiBi slopes, halved from head to head with
    16 heads."""
    made = {}
    for name in ("gpt2", "pythia", "bloom", "falcon7b", "falcon40b"):
        (tmp_path / name).mkdir()
        made[name] = load_settings(write(tmp_path / name, name))
    assert (made["gpt2"].positions, made["gpt2"].longest, made["gpt2"].rope) == (1024, 1024, None)
    assert [len(made[name].rope.inverse_frequencies) for name in ("pythia", "falcon7b", "falcon40b")] == [8, 32, 32]
    assert made["bloom"].rope is made["bloom"].longest is None
    assert made["bloom"].edits == (Alibi(slopes=tuple(2 ** -(head / 2) for head in range(1, 17))), EmbeddingNorm())
    assert (made["falcon7b"].block.shared_norm, made["falcon40b"].block.shared_norm) == (True, False)
    assert all(settings.tied == (name != "pythia") for name, settings in made.items())


def test_what_dense_models_say_of_positions_and_scales(tmp_path: Path) -> None:
    """Command-R7B and EXAONE 4 rotate in three of four layers. Hunyuan's alpha of 1000 changes the base. phi-2 rotates 32 of 80
    features. Phi-3.5 has other frequencies beyond 4096 tokens. Ministral 3 scales queries from position 16384 on."""
    made = {}
    for name in ("commandr7b", "exaone4", "hunyuan", "phi2", "phi35", "ministral3", "commandrplus"):
        (tmp_path / name).mkdir()
        made[name] = load_settings(write(tmp_path / name, name))
    for name in ("commandr7b", "exaone4"):
        assert made[name].windows[:8] == (4096, 4096, 4096, None) * 2
        assert [rope is None for rope in made[name].ropes[:8]] == [False, False, False, True] * 2
    ropes = {name: settings.rope for name, settings in made.items()}
    assert ropes["hunyuan"].inverse_frequencies[1] == pytest.approx((1e4 * 1000 ** (128 / 126)) ** (-2 / 128), rel=1e-6)
    assert made["hunyuan"].longest is None and "attention_dropout=0.1" in made["hunyuan"].notes[0]
    assert len(ropes["phi2"].inverse_frequencies) == 16 and made["phi2"].biases.head
    assert (ropes["phi35"].long_beyond, ropes["phi35"].long[0]) == (4096, 1.0)
    assert ropes["phi35"].scale == pytest.approx(1.1902380714238083)  # sqrt(1 + ln 32 / ln 4096)
    assert made["ministral3"].scales.query_growth == (0.1, 16384)
    assert made["commandrplus"].edits == (HeadQKNorm(),) and made["commandrplus"].tied


def test_experts_are_chosen_as_published(tmp_path: Path) -> None:
    """DeepSeek-V2: six experts of the best three of eight groups (the score of a group is that of its best expert), with weights times
    16; the Lite model: of all experts. Kimi K2: eight of 384. GLM-4.5-Air, dots.llm1: the first layer is dense. ERNIE 4.5: layers 1 to
    27 have experts."""
    made = {}
    for name in ("deepseek_v2", "deepseek_v2lite", "kimi_k2", "glm45air", "dots1", "minimax_m2", "ernie45_21b"):
        (tmp_path / name).mkdir()
        made[name] = load_settings(write(tmp_path / name, name))
    routing = {name: dataclasses.replace(settings.edits[-1], layers=None) for name, settings in made.items()}
    assert all(settings.edits[-1].layers == settings.moe_layers for settings in made.values())
    assert routing["deepseek_v2"] == Routing(
        score="softmax", bias=False, normalise=False, scale=16.0, groups=8, chosen_groups=3, group_best=1
    )
    assert routing["deepseek_v2lite"] == Routing(score="softmax", bias=False, normalise=False, group_best=1)
    assert routing["kimi_k2"] == Routing(score="sigmoid", added=1e-20, scale=2.827)
    assert routing["glm45air"] == Routing(score="sigmoid", added=1e-20)
    assert routing["dots1"] == Routing(score="sigmoid", added=1e-20, scale=2.5)
    assert routing["minimax_m2"] == Routing(score="sigmoid", balanced_score="softmax")
    assert routing["ernie45_21b"] == Routing(score="softmax", smallest=1e-12)
    for name in ("glm45air", "dots1", "ernie45_21b", "kimi_k2"):
        assert made[name].moe_layers == (False,) + (True,) * (made[name].shape.layers - 1)
    assert (made["kimi_k2"].shape.experts, made["ernie45_21b"].shape.shared_ffn) == (384, 3072)
    for name, half in (("glm45air", 32), ("minimax_m2", 32), ("dots1", 64), ("ernie45_21b", 64)):
        assert made[name].rope is not None and len(made[name].rope.inverse_frequencies) == half
