"""Command-R: LayerNorm without bias, attention and MLP in parallel after one norm, interleaved RoPE, a factor on logits."""

from typing import Any

from swift_mega.errors import UserError
from swift_mega.models.decoder import DECODER, READS, rope, translate
from swift_mega.models.family import Family, Rule
from swift_mega.models.modules.norm import HeadQKNorm
from swift_mega.models.packs import COLUMN
from swift_mega.models.rules import DENSE_RULES, EMBEDDING_RULES, HF_LAYER, LAYER, attention_rules, norm_rules
from swift_mega.models.settings import Biases, Block, NormKind, Scales, Settings

HEAD_QK_NORM_RULES = (
    Rule(LAYER + "self_attention.q_layernorm.weight", (HF_LAYER + "self_attn.q_norm.weight",), COLUMN),
    Rule(LAYER + "self_attention.k_layernorm.weight", (HF_LAYER + "self_attn.k_norm.weight",), COLUMN),
)
COHERE_READS = (READS - {"rms_norm_eps"}) | {"layer_norm_eps", "logit_scale", "attention_bias"}


def translate_cohere(config: Any, **changes: Any) -> Settings:
    """Settings that Command-R and Command-R7B share."""
    if config.logit_scale is None:
        raise UserError("config.json: logit_scale=None is not a number, and logits are multiplied by it; correct it")
    bias = bool(config.attention_bias)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotation = rope(config, head_dim, interleaved=True)
    return translate(
        config,
        epsilon="layer_norm_eps",
        megatron={"add_qkv_bias": bias},
        norm=NormKind(kind="layer"),
        biases=Biases(attention_output=bias),
        block=Block(parallel=True),
        scales=Scales(logits=config.logit_scale),
        **{"ropes": (rotation,) * config.num_hidden_layers, **changes},
    )


def _translate(config: Any) -> Settings:
    return translate_cohere(config, edits=(HeadQKNorm(),) if config.use_qk_norm else ())


FAMILY = Family(
    hf_types=("cohere",),
    translate=_translate,
    rules=(
        *EMBEDDING_RULES,
        *norm_rules(LAYER + "input_layernorm", HF_LAYER + "input_layernorm"),
        *attention_rules(),
        *HEAD_QK_NORM_RULES,
        *DENSE_RULES,
    ),
    # model_max_length is a field of the tokenizer.
    reads=(COHERE_READS - {"sliding_window", "layer_types"}) | {"use_qk_norm", "model_max_length"},
    absent=DECODER.absent,
)
