"""Phi 1 to 2: LayerNorm with bias, attention and MLP in parallel after one norm, biases on every linear and on the output layer."""

from typing import Any

from swift_mega.models.activations import TANH_GELU
from swift_mega.models.decoder import DECODER, READS, translate, whole_heads
from swift_mega.models.family import Family, Rule
from swift_mega.models.packs import REPLICATED, ROW, VOCAB
from swift_mega.models.rules import EMBEDDING_RULES, HF_LAYER, LAYER, attention_rules, norm_rules, ungated_mlp_rules
from swift_mega.models.settings import LAYER_NORM, Biases, Block, Settings

ATTENTION, HF_ATTENTION = LAYER + "self_attention.", HF_LAYER + "self_attn."


def _translate(config: Any) -> Settings:
    whole_heads(config)
    return translate(
        config,
        epsilon="layer_norm_eps",
        megatron={
            "activation_func": TANH_GELU,
            "gated_linear_unit": False,
            "add_qkv_bias": True,
            "qk_layernorm": bool(config.qk_layernorm),
        },
        norm=LAYER_NORM,
        block=Block(parallel=True),
        biases=Biases(attention_output=True, mlp=True, head=True),
    )


FAMILY = Family(
    hf_types=("phi",),
    translate=_translate,
    rules=(
        *(rule for rule in EMBEDDING_RULES if "final_layernorm" not in rule.megatron),
        *norm_rules("decoder.final_layernorm", "model.final_layernorm"),
        Rule("output_layer.bias", ("lm_head.bias",), VOCAB),
        *norm_rules(LAYER + "input_layernorm", HF_LAYER + "input_layernorm"),
        *(rule for rule in attention_rules() if "linear_proj" not in rule.megatron),
        Rule(ATTENTION + "linear_proj.weight", (HF_ATTENTION + "dense.weight",), ROW),
        Rule(ATTENTION + "linear_proj.bias", (HF_ATTENTION + "dense.bias",), REPLICATED),
        *norm_rules(ATTENTION + "q_layernorm", HF_ATTENTION + "q_layernorm"),
        *norm_rules(ATTENTION + "k_layernorm", HF_ATTENTION + "k_layernorm"),
        *ungated_mlp_rules(LAYER + "mlp.", HF_LAYER + "mlp.fc1", HF_LAYER + "mlp.fc2"),
    ),
    reads=(READS - {"rms_norm_eps", "sliding_window", "layer_types"})
    | {"layer_norm_eps", "partial_rotary_factor", "qk_layernorm"},
    fixed={"hidden_act": ("gelu_new",)},
    absent=DECODER.absent,
)
