"""Apertus: RMSNorm on queries and keys; an MLP of two linears with xIELU between them, which has two learned parameters in every layer."""

from typing import Any

from swift_mega.models.decoder import DECODER, READS, translate
from swift_mega.models.family import Family, Rule
from swift_mega.models.modules.activation import Xielu
from swift_mega.models.packs import REPLICATED
from swift_mega.models.rules import (
    EMBEDDING_RULES,
    HF_LAYER,
    LAYER,
    QK_NORM_RULES,
    attention_rules,
    norm_rules,
    ungated_mlp_rules,
)
from swift_mega.models.settings import Biases, Settings


def _translate(config: Any) -> Settings:
    bias = bool(config.attention_bias)
    return translate(
        config,
        megatron={"gated_linear_unit": False, "qk_layernorm": True, "add_qkv_bias": bias},
        biases=Biases(attention_output=bias),
        activation=Xielu,
    )


FAMILY = Family(
    hf_types=("apertus",),
    translate=_translate,
    rules=(
        *EMBEDDING_RULES,
        *norm_rules(LAYER + "input_layernorm", HF_LAYER + "attention_layernorm"),
        *norm_rules(LAYER + "pre_mlp_layernorm", HF_LAYER + "feedforward_layernorm"),
        *attention_rules(),
        *QK_NORM_RULES,
        *ungated_mlp_rules(LAYER + "mlp.", HF_LAYER + "mlp.up_proj", HF_LAYER + "mlp.down_proj"),
        *(
            Rule(f"{LAYER}mlp.activation_func.{name}", (f"{HF_LAYER}mlp.act_fn.{name}",), REPLICATED)
            for name in ("alpha_p", "alpha_n", "beta", "eps")
        ),
    ),
    reads=(READS - {"sliding_window", "layer_types"}) | {"attention_bias"},
    # The last three are in published configs, and transformers does not read them: its architecture has no other values.
    fixed={
        "hidden_act": ("xielu",),
        "mlp_bias": (False,),
        "post_norm": (False,),
        "qk_norm": (True,),
    },
    absent=DECODER.absent,
)
