"""gpt-oss: attention sinks, a sliding window in every other layer, biases on every linear, stacked experts with a clamped SwiGLU."""

from typing import Any

from megatron.core.fusions.fused_bias_geglu import quick_gelu

from swift_mega.models.decoder import DECODER, READS, moe, translate, windows
from swift_mega.models.family import Family, Rule
from swift_mega.models.modules.core_edits import Sinks
from swift_mega.models.packs import (
    COLUMN,
    INTERLEAVED_GATE_UP,
    INTERLEAVED_GATE_UP_BIAS,
    REPLICATED,
    TRANSPOSED_ROW,
)
from swift_mega.models.rules import EMBEDDING_RULES, HF_LAYER, LAYER, NORM_RULES, attention_rules
from swift_mega.models.settings import Biases, Settings

MOE, EXPERT, HF_EXPERTS = LAYER + "mlp.", LAYER + "mlp.experts.local_experts.{e}.", HF_LAYER + "mlp.experts."


def _translate(config: Any) -> Settings:
    bias = bool(config.attention_bias)
    settings = translate(
        config,
        # Megatron's quick_gelu is x sigmoid(1.702 x). It clamps the gate from above, and up from both sides.
        megatron={
            "add_qkv_bias": bias,
            "activation_func": quick_gelu,
            "activation_func_clamp_value": config.swiglu_limit,
            "glu_linear_offset": 1.0,
        },
        biases=Biases(attention_output=bias, mlp=True),
        windows=windows(config),
        edits=(Sinks(),),
    )
    return moe(
        settings,
        experts=config.num_local_experts,
        top_k=config.num_experts_per_tok,
        ffn=config.intermediate_size,
        layers=(True,) * config.num_hidden_layers,
    )


FAMILY = Family(
    hf_types=("gpt_oss",),
    translate=_translate,
    rules=(
        *EMBEDDING_RULES,
        *NORM_RULES,
        *attention_rules(),
        Rule(LAYER + "self_attention.core_attention.softmax_offset", (HF_LAYER + "self_attn.sinks",), COLUMN),
        *(Rule(f"{MOE}router.{leaf}", (f"{HF_LAYER}mlp.router.{leaf}",), REPLICATED) for leaf in ("weight", "bias")),
        Rule(EXPERT + "linear_fc1.weight", (HF_EXPERTS + "gate_up_proj[{e}]",), INTERLEAVED_GATE_UP),
        Rule(EXPERT + "linear_fc1.bias", (HF_EXPERTS + "gate_up_proj_bias[{e}]",), INTERLEAVED_GATE_UP_BIAS),
        Rule(EXPERT + "linear_fc2.weight", (HF_EXPERTS + "down_proj[{e}]",), TRANSPOSED_ROW),
        Rule(EXPERT + "linear_fc2.bias", (HF_EXPERTS + "down_proj_bias[{e}]",), REPLICATED),
    ),
    # The last two are OpenAI's names of num_experts_per_tok and of the original length in rope_parameters.
    reads=READS
    | {"attention_bias", "num_local_experts", "num_experts", "num_experts_per_tok", "swiglu_limit"}
    | {"experts_per_token", "initial_context_length"},
    fixed={"swiglu_alpha": (1.702,)},
    absent=DECODER.absent,
)
