"""config.json of published dense models, for test_published_configs.py.

Those of ministral3, helium, arcee and ernie45 have the sizes of transformers' default for the checkpoint that its
documentation names. The two lists of 48 factors of phi35 are stand-ins for the published ones.
"""

import json

PHI35_FACTORS = {
    "long_factor": [1.0 + n for n in range(48)],
    "short_factor": [1.0] * 24 + [1.5] * 24,
    "type": "longrope",
}
EXAONE_LAYERS = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 16

CONFIGS = {
    "commandr": """
{"architectures": ["CohereForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 5, "eos_token_id":
255001, "hidden_act": "silu", "hidden_size": 8192, "initializer_range": 0.02, "intermediate_size": 22528, "layer_norm_eps":
1e-05, "logit_scale": 0.0625, "max_position_embeddings": 8192, "model_max_length": 131072, "model_type": "cohere",
"num_attention_heads": 64, "num_hidden_layers": 40, "num_key_value_heads": 64, "pad_token_id": 0, "rope_theta": 8000000.0,
"torch_dtype": "float16", "transformers_version": "4.38.2", "use_cache": true, "vocab_size": 256000}
""",
    "commandrplus": """
{"architectures": ["CohereForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 5, "eos_token_id":
255001, "hidden_act": "silu", "hidden_size": 12288, "initializer_range": 0.02, "intermediate_size": 33792, "layer_norm_eps":
1e-05, "logit_scale": 0.8333333333333334, "max_position_embeddings": 8192, "model_max_length": 131072, "model_type":
"cohere", "num_attention_heads": 96, "num_hidden_layers": 64, "num_key_value_heads": 8, "pad_token_id": 0, "rope_theta":
75000000.0, "tie_word_embeddings": true, "torch_dtype": "float16", "use_cache": true, "use_qk_norm": true, "vocab_size":
256000}
""",
    "commandr7b": """
{"architectures": ["Cohere2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 5,
"cache_implementation": "hybrid", "eos_token_id": 255001, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
"initializer_range": 0.02, "intermediate_size": 14336, "layer_norm_eps": 1e-05, "layer_switch": 4, "logit_scale": 0.25,
"max_position_embeddings": 132096, "model_type": "cohere2", "num_attention_heads": 32, "num_hidden_layers": 32,
"num_key_value_heads": 8, "order_of_interleaved_layers": "local_attn_first", "pad_token_id": 0, "position_embedding_type":
"rope_gptj", "rope_scaling": null, "rope_theta": 50000, "rotary_pct": 1.0, "sliding_window": 4096, "sliding_window_pattern":
4, "torch_dtype": "bfloat16", "use_cache": true, "use_embedding_sharing": true, "use_gated_activation": true,
"use_parallel_block": true, "use_parallel_embedding": true, "vocab_size": 256000}
""",
    "olmo": """
{"architectures": ["OlmoForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "clip_qkv": null, "eos_token_id":
50279, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
"max_position_embeddings": 2048, "model_type": "olmo", "num_attention_heads": 32, "num_hidden_layers": 32,
"num_key_value_heads": 32, "pad_token_id": 1, "pretraining_tp": 1, "rope_scaling": null, "rope_theta": 10000.0,
"tie_word_embeddings": false, "torch_dtype": "float32", "use_cache": true, "vocab_size": 50304}
""",
    "exaone4": """
{"architectures": ["Exaone4ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 361, "head_dim": 128,
"hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 27392, "max_position_embeddings":
131072, "model_type": "exaone4", "num_attention_heads": 40, "num_hidden_layers": 64, "num_key_value_heads": 8,
"pad_token_id": 0, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
"original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 1000000, "sliding_window": 4096,
"sliding_window_pattern": "LLLG", "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true, "vocab_size":
102400, "layer_types": LAYERS}
""".replace("LAYERS", json.dumps(EXAONE_LAYERS)),
    "hunyuan": """
{"add_classification_head": false, "architectures": ["HunYuanDenseV1ForCausalLM"], "attention_bias": false,
"attention_dropout": 0.1, "attention_head_dim": 128, "bos_token_id": 127958, "cla_share_factor": 2, "class_num": 0,
"dense_list": [4096, 0], "torch_dtype": "bfloat16", "eos_token_id": 127960, "head_dim": 128, "hidden_act": "silu",
"hidden_size": 4096, "im_end_id": 5, "im_newline_id": 11, "im_start_id": 4, "initializer_range": 0.02, "intermediate_size":
14336, "mask_init_id": 12, "max_position_embeddings": 262144, "mlp_bias": false, "model_type": "hunyuan_v1_dense",
"norm_type": "rms", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "org_vocab_size": 128167,
"pad_id": 127961, "pad_token_id": 127961, "pool_type": "last", "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling":
{"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "type": "dynamic"},
"rope_theta": 10000.0, "sep_token_id": 127962, "text_end_id": 7, "text_start_id": 6, "tie_word_embeddings": true,
"transformers_version": "4.57.6", "use_cache": true, "use_cla": false, "use_qk_norm": true, "use_rotary_pos_emb": true,
"vocab_size": 128167}
""",
    "ministral": """
{"architectures": ["MinistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 128,
"hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 12288, "max_position_embeddings":
32768, "model_type": "ministral", "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
"rms_norm_eps": 1e-05, "rope_theta": 100000000.0, "sliding_window": 32768, "tie_word_embeddings": false, "torch_dtype":
"bfloat16", "use_cache": true, "vocab_size": 131072}
""",
    "ministral3": """
{"architectures": ["Ministral3ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "dtype": "bfloat16", "eos_token_id":
2, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
"max_position_embeddings": 262144, "model_type": "ministral3", "num_attention_heads": 32, "num_hidden_layers": 34,
"num_key_value_heads": 8, "pad_token_id": 11, "rms_norm_eps": 1e-05, "rope_parameters": {"beta_fast": 32.0, "beta_slow": 1.0,
"factor": 16.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384,
"rope_theta": 1000000.0, "rope_type": "yarn", "type": "yarn"}, "sliding_window": null, "tie_word_embeddings": false,
"use_cache": true, "vocab_size": 131072}
""",
    "internlm3": """
{"architectures": ["InternLM3ForCausalLM"], "attention_dropout": 0.0, "bias": false, "bos_token_id": 1, "eos_token_id": 2,
"head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 10240,
"max_position_embeddings": 32768, "model_type": "internlm3", "num_attention_heads": 32, "num_hidden_layers": 48,
"num_key_value_heads": 2, "pad_token_id": 2, "qkv_bias": false, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 6.0,
"rope_type": "dynamic"}, "rope_theta": 50000000, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true,
"vocab_size": 128512}
""",
    "ernie45": """
{"architectures": ["Ernie4_5ForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "head_dim": 128, "hidden_act": "silu",
"hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 131072, "model_type": "ernie4_5",
"num_attention_heads": 16, "num_hidden_layers": 18, "num_key_value_heads": 2, "pad_token_id": 0, "rms_norm_eps": 1e-05,
"rope_scaling": null, "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "use_bias": false,
"use_cache": false, "vocab_size": 103424}
""",
    "helium": """
{"architectures": ["HeliumForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id":
2, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2560, "initializer_range": 0.02, "intermediate_size": 7040,
"max_position_embeddings": 4096, "mlp_bias": false, "model_type": "helium", "num_attention_heads": 20, "num_hidden_layers":
24, "num_key_value_heads": 20, "pad_token_id": 3, "rms_norm_eps": 1e-08, "rope_theta": 100000.0, "tie_word_embeddings": false,
"torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 48000}
""",
    "arcee": """
{"architectures": ["ArceeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 128000,
"eos_token_id": 128001, "hidden_act": "relu2", "hidden_size": 2560, "initializer_range": 0.02, "intermediate_size": 18432,
"max_position_embeddings": 4096, "mlp_bias": false, "model_type": "arcee", "num_attention_heads": 32, "num_hidden_layers": 32,
"num_key_value_heads": 32, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "tie_word_embeddings": false, "use_cache": true,
"vocab_size": 32000}
""",
    "apertus": """
{"architectures": ["ApertusForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id":
68, "hidden_act": "xielu", "hidden_dropout": 0.0, "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 21504,
"max_position_embeddings": 65536, "mlp_bias": false, "model_type": "apertus", "num_attention_heads": 32, "num_hidden_layers":
32, "num_key_value_heads": 8, "pad_token_id": 3, "post_norm": false, "qk_norm": true, "rms_norm_eps": 1e-05, "rope_scaling":
{"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type":
"llama3", "type": "llama3"}, "rope_theta": 12000000, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache":
true, "vocab_size": 131072}
""",
    "phi2": """
{"architectures": ["PhiForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 50256, "embd_pdrop": 0.0, "eos_token_id": 50256,
"hidden_act": "gelu_new", "hidden_size": 2560, "initializer_range": 0.02, "intermediate_size": 10240, "layer_norm_eps": 1e-05,
"max_position_embeddings": 2048, "model_type": "phi", "num_attention_heads": 32, "num_hidden_layers": 32,
"num_key_value_heads": 32, "partial_rotary_factor": 0.4, "qk_layernorm": false, "resid_pdrop": 0.1, "rope_scaling": null,
"rope_theta": 10000.0, "tie_word_embeddings": false, "torch_dtype": "float16", "use_cache": true, "vocab_size": 51200}
""",
    "phi35": """
{"architectures": ["Phi3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "auto_map": {}, "bos_token_id": 1,
"embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02,
"intermediate_size": 8192, "max_position_embeddings": 131072, "model_type": "phi3", "num_attention_heads": 32,
"num_hidden_layers": 32, "num_key_value_heads": 32, "original_max_position_embeddings": 4096, "pad_token_id": 32000,
"resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": false,
"torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 32064, "rope_scaling": FACTORS}
""".replace("FACTORS", json.dumps(PHI35_FACTORS)),
    "stablelm2_12b": """
{"architectures": ["StableLmForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 100257, "eos_token_id": 100257,
"hidden_act": "silu", "hidden_dropout": 0.0, "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 13824,
"layer_norm_eps": 1e-05, "max_position_embeddings": 4096, "model_type": "stablelm", "num_attention_heads": 32,
"num_hidden_layers": 40, "num_key_value_heads": 8, "partial_rotary_factor": 0.25, "qk_layernorm": true, "rope_theta": 10000,
"tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true, "use_parallel_residual": true, "use_qkv_bias":
false, "vocab_size": 100352}
""",
    "stablelm": """
{"architectures": ["StableLmForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 2560,
"initializer_range": 0.02, "intermediate_size": 6912, "layer_norm_eps": 1e-05, "max_position_embeddings": 4096, "model_type":
"stablelm", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "partial_rotary_factor": 0.25,
"rope_theta": 10000, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true, "use_qkv_bias": false,
"vocab_size": 50304}
""",
    "nemotron": """
{"architectures": ["NemotronForCausalLM"], "bos_token_id": 2, "eos_token_id": 3, "hidden_act": "relu2", "hidden_size": 3072,
"initializer_range": 0.0134, "intermediate_size": 9216, "max_position_embeddings": 4096, "model_type": "nemotron", "norm_eps":
1e-05, "num_attention_heads": 24, "num_hidden_layers": 32, "num_key_value_heads": 8, "partial_rotary_factor": 0.5, "rope_theta":
10000, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 256000}
""",
    "seed_oss": """
{"architectures": ["SeedOssForCausalLM"], "attention_bias": true, "attention_dropout": 0.1, "attention_out_bias": false,
"bos_token_id": 0, "eos_token_id": 2, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02,
"intermediate_size": 27648, "max_position_embeddings": 524288, "mlp_bias": false, "model_type": "seed_oss",
"num_attention_heads": 80, "num_hidden_layers": 64, "num_key_value_heads": 8, "pad_token_id": 1, "residual_dropout": 0.1,
"rms_norm_eps": 1e-06, "rope_scaling": {"rope_type": "default"}, "rope_theta": 10000000.0, "tie_word_embeddings": false,
"torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 155136}
""",
}  # fmt: skip
