"""Granite with experts, and a shared expert that every token passes."""

from typing import Any

from swift_mega.models.decoder import vary
from swift_mega.models.families import granitemoe
from swift_mega.models.family import Rule
from swift_mega.models.packs import FUSED_GATE_UP, ROW
from swift_mega.models.rules import HF_LAYER, LAYER
from swift_mega.models.settings import Settings

SHARED, HF_SHARED = LAYER + "mlp.shared_experts.", HF_LAYER + "shared_mlp."


def _translate(config: Any) -> Settings:
    return granitemoe.translate_granite(config, shared=config.shared_intermediate_size)


FAMILY = vary(
    granitemoe.FAMILY,
    hf_types=("granitemoeshared",),
    translate=_translate,
    rules=(
        Rule(SHARED + "linear_fc1.weight", (HF_SHARED + "input_linear.weight",), FUSED_GATE_UP),
        Rule(SHARED + "linear_fc2.weight", (HF_SHARED + "output_linear.weight",), ROW),
    ),
    reads=("shared_intermediate_size",),
)
