"""Tiny random Hugging Face models of every family, written to disk by transformers itself, as oracles."""

import importlib
import json
from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, head_dim=8, intermediate_size=48,
    vocab_size=131, max_position_embeddings=256, pad_token_id=25,
)  # fmt: skip
"""pad_token_id: a token that occurs in the random rows of tests (7 times in 16 rows), because most types give its embedding no gradient.
"""
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


ZERO_CENTRED = "Qwen3NextRMSNorm'"
"""Norms whose stored weight is the factor minus one. Its noise is around zero; otherwise every norm would double its input and its
rounding."""


def _families(file: Path) -> dict[str, dict[str, Any]]:
    """FAMILIES of a file beside this one: name -> fields of the config, which override SIZES."""
    return importlib.import_module(file.stem).FAMILIES


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": dict(model_type="llama"),
    "llama_tied": dict(model_type="llama", tie_word_embeddings=True, num_key_value_heads=8),
    "llama_bias": dict(model_type="llama", attention_bias=True, mlp_bias=True),
    "llama_rope3": dict(model_type="llama", rope_parameters=LLAMA3),
    "llama_yarn": dict(model_type="llama", rope_parameters=YARN),
    "llama_linear": dict(model_type="llama", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
    "llama_dynamic": dict(model_type="llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    "mistral": dict(model_type="mistral", sliding_window=6),
    "qwen2": dict(model_type="qwen2"),
    "qwen2_window": dict(
        model_type="qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=2, tie_word_embeddings=True
    ),
    "qwen3": dict(model_type="qwen3"),
    "qwen3_tied": dict(model_type="qwen3", tie_word_embeddings=True),
    "qwen3_moe": dict(
        model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True
    ),
    "qwen3_moe_mixed": dict(
        model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=False,
        mlp_only_layers=[1], decoder_sparse_step=1,
    ),
    "seed_oss": dict(model_type="seed_oss", attention_bias=True, attention_out_bias=False),
    "smollm3": dict(model_type="smollm3", bos_token_id=None, eos_token_id=None),
    "granite": dict(
        model_type="granite", embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.3, logits_scaling=2.0
    ),
    "olmo2": dict(model_type="olmo2", eos_token_id=None),
    "olmo3": dict(model_type="olmo3", eos_token_id=None, sliding_window=5),
    "glm4": dict(model_type="glm4", attention_bias=True, eos_token_id=None),
    "glm": dict(model_type="glm", attention_bias=True, eos_token_id=None),
    "phi3": dict(model_type="phi3", bos_token_id=None, eos_token_id=None, resid_pdrop=0.0),
    "gemma": dict(model_type="gemma", bos_token_id=None, eos_token_id=None),
    "mixtral": dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2),
}  # fmt: skip


CORPUS = [
    "The quick brown fox jumps over the lazy dog. Who are you? I am an assistant, made to help you.",
    "def add(a, b):\n    return a + b\n\nassistant user system Hello there, how are you today?\n",
    "<think>\nLet me think about this.\n</think>\n\nThe answer is four.  Two  spaces, and\ttabs.\n\n\n",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


FAMILIES.update(
    {
        name: fields
        for file in sorted(Path(__file__).parent.glob("families_*.py"))
        for name, fields in _families(file).items()
    }
)


FEW_KEY_HEADS: dict[str, dict[str, Any]] = {
    f"{name}_{heads}_{key_heads}": FAMILIES[name] | dict(num_attention_heads=heads, num_key_value_heads=key_heads)
    for name, heads, key_heads in [
        ("llama", 4, 1),
        ("llama_tied", 4, 2),
        ("llama_bias", 8, 2),
        ("qwen2", 4, 1),
        ("qwen3", 4, 2),
        ("phi3", 4, 1),
        ("olmo2", 4, 1),
        ("olmo2", 8, 2),
        ("hunyuan", 4, 2),
        ("gpt_oss", 8, 2),
        ("mixtral", 4, 1),
        ("llama_bias", 4, 1),
        ("qwen3", 4, 1),
        ("hunyuan", 4, 1),
        ("gpt_oss", 4, 1),
    ]
}
"""For more tensor ranks than key heads. Not in FAMILIES, because they differ from families there only in the heads."""


def tokenizer(template: str | None = None, *special: str, eos: str = "</s>") -> Any:
    """A byte-level BPE of a few hundred merges, trained here, with each of `special` as a single token; a fast tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False))
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token=eos, pad_token=eos)
    made.add_special_tokens({"additional_special_tokens": list(special)})
    made.chat_template = template
    return made


def make_chat(directory: Path, name: str, **changes: Any) -> Path:
    """`make` with a chatml tokenizer beside the weights, and a vocabulary that is large enough for it."""
    made = tokenizer(CHATML, "<|im_start|>", "<|im_end|>", eos="<|im_end|>")
    make(directory, name, vocab_size=len(made) + 3, **changes)
    made.save_pretrained(directory)
    return directory


def fields_of(name: str, **changes: Any) -> dict[str, Any]:
    """Fields of the config of FAMILIES[name]. Fields set to `...` are left out, for types that do not have them."""
    return {
        key: value
        for key, value in {**SIZES, **(FAMILIES | FEW_KEY_HEADS)[name], **changes}.items()
        if value is not ...
    }


def make(
    directory: Path, name: str, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", **changes: Any
) -> Path:
    """A tiny random model of FAMILIES[name] in `directory`. Every parameter (norms and biases too) differs from its default."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = fields_of(name, **changes)
    written_as = fields.pop("written_as", None)  # a type that transformers knows under another name only
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(sum(map(ord, name)))
    model = AutoModelForCausalLM.from_config(config)
    owners = {key: model.get_submodule(key.rpartition(".")[0]) for key, _ in model.named_parameters()}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            centred = ZERO_CENTRED in str(type(owners[key]))
            parameter.copy_(
                0.2 * noise + (not centred) if "norm" in key else noise * (0.5 if parameter.dim() == 1 else 0.15)
            )
    with torch.no_grad():
        for key, buffer in [*model.named_buffers(), *model.named_parameters()]:
            if key.endswith("e_score_correction_bias"):  # zero by default: then no test would show that it is read
                buffer.copy_(torch.randn_like(buffer) * 0.2)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    if written_as is not None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": written_as}))
    return directory
