"""Nemotron 4 and Minitron: LayerNorm whose weight is stored minus one, squared ReLU between two linears, RoPE on half of each head."""

from typing import Any

from swift_mega.errors import UserError
from swift_mega.models.activations import squared_relu
from swift_mega.models.decoder import DECODER, READS, translate
from swift_mega.models.family import Family
from swift_mega.models.rules import EMBEDDING_RULES, HF_LAYER, LAYER, NORM_RULES, attention_rules, ungated_mlp_rules
from swift_mega.models.settings import Biases, NormKind, Settings


def _translate(config: Any) -> Settings:
    if getattr(config, "kv_channels", config.head_dim) != config.head_dim:
        raise UserError(f"config.json: kv_channels={config.kv_channels} is not head_dim={config.head_dim}; correct one")
    attention, mlp = bool(config.attention_bias), bool(config.mlp_bias)
    return translate(
        config,
        epsilon="norm_eps",
        megatron={"activation_func": squared_relu, "gated_linear_unit": False, "add_qkv_bias": attention},
        norm=NormKind(kind="layer", one_plus=True, bias=True),
        biases=Biases(attention_output=attention, mlp=mlp),
    )


FAMILY = Family(
    hf_types=("nemotron",),
    translate=_translate,
    rules=(
        *EMBEDDING_RULES,
        *NORM_RULES,
        *attention_rules(),
        *ungated_mlp_rules(LAYER + "mlp.", HF_LAYER + "mlp.up_proj", HF_LAYER + "mlp.down_proj"),
    ),
    reads=(READS - {"rms_norm_eps", "sliding_window", "layer_types"})
    | {"norm_eps", "partial_rotary_factor", "attention_bias", "mlp_bias", "kv_channels"},
    fixed={"hidden_act": ("relu2",)},
    absent=DECODER.absent,
)
