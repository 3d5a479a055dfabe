"""Arcee (AFM): the common decoder with squared ReLU between the two linears of its MLP."""

from typing import Any

from swift_mega.models.activations import squared_relu
from swift_mega.models.decoder import DECODER, READS, translate
from swift_mega.models.family import Family
from swift_mega.models.rules import EMBEDDING_RULES, HF_LAYER, LAYER, NORM_RULES, attention_rules, ungated_mlp_rules
from swift_mega.models.settings import Biases, Settings


def _translate(config: Any) -> Settings:
    attention, mlp = bool(config.attention_bias), bool(config.mlp_bias)
    return translate(
        config,
        megatron={"activation_func": squared_relu, "gated_linear_unit": False, "add_qkv_bias": attention},
        biases=Biases(attention_output=attention, mlp=mlp),
    )


FAMILY = Family(
    hf_types=("arcee",),
    translate=_translate,
    rules=(
        *EMBEDDING_RULES,
        *NORM_RULES,
        *attention_rules(),
        *ungated_mlp_rules(LAYER + "mlp.", HF_LAYER + "mlp.up_proj", HF_LAYER + "mlp.down_proj"),
    ),
    reads=(READS - {"sliding_window", "layer_types"}) | {"attention_bias", "mlp_bias"},
    fixed={"hidden_act": ("relu2",)},
    absent=DECODER.absent,
)
