"""StarCoder2: LayerNorm with bias, biases on every linear, and an MLP of two linears with tanh-GELU between them."""

from typing import Any

from swift_mega.models.activations import TANH_GELU
from swift_mega.models.decoder import READS, translate, windows
from swift_mega.models.family import Family
from swift_mega.models.rules import EMBEDDING_RULES, HF_LAYER, LAYER, NORM_RULES, attention_rules, ungated_mlp_rules
from swift_mega.models.settings import LAYER_NORM, Biases, Settings

UNGATED = READS - {"rms_norm_eps", "layer_types"}


def _translate(config: Any) -> Settings:
    bias = bool(config.use_bias)
    return translate(
        config,
        epsilon="norm_epsilon",
        megatron={"activation_func": TANH_GELU, "gated_linear_unit": False, "add_qkv_bias": bias},
        norm=LAYER_NORM,
        biases=Biases(attention_output=bias, mlp=bias),
        windows=windows(config),
    )


FAMILY = Family(
    hf_types=("starcoder2",),
    translate=_translate,
    rules=(
        *EMBEDDING_RULES,
        *NORM_RULES,
        *attention_rules(),
        *ungated_mlp_rules(LAYER + "mlp.", HF_LAYER + "mlp.c_fc", HF_LAYER + "mlp.c_proj"),
    ),
    # The last five are fields of the model's code before transformers had it. transformers does not read them.
    reads=UNGATED
    | {"norm_epsilon", "use_bias", "activation_function", "layer_norm_epsilon", "scale_attn_weights"}
    | {"attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"},
    fixed={
        "hidden_act": ("gelu_pytorch_tanh",),
        "mlp_type": ("default",),
        "norm_type": ("layer_norm",),
    },
)
