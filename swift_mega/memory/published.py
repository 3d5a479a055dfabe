"""The config.json of published models, for memory estimates without a model directory."""

import json
import tempfile
from pathlib import Path

from swift_mega.models.settings import Settings
from swift_mega.models.translate import load_settings

LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu",
    "rope_theta": 500000.0, "dtype": "bfloat16",
    "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
                     "rope_type": "llama3"},
}  # fmt: skip
"""Its config.json, as Meta published it (huggingface.co/meta-llama/Llama-3.1-8B)."""


def llama_3_1_8b() -> Settings:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_3_1_8B))
        return load_settings(folder)
