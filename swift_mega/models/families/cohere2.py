"""Command-R7B and Command-A: Command-R in which three of four layers have a sliding window, and only those have RoPE."""

from typing import Any

from swift_mega.models.decoder import rope, windows
from swift_mega.models.families import cohere
from swift_mega.models.family import Family
from swift_mega.models.settings import Settings


def _translate(config: Any) -> Settings:
    seen = windows(config)
    rotation = rope(config, config.head_dim, interleaved=True)
    return cohere.translate_cohere(
        config, windows=seen, ropes=tuple(None if window is None else rotation for window in seen)
    )


FAMILY = Family(
    hf_types=("cohere2",),
    translate=_translate,
    rules=tuple(rule for rule in cohere.FAMILY.rules if rule not in cohere.HEAD_QK_NORM_RULES),
    reads=cohere.COHERE_READS | {"sliding_window_pattern", "use_parallel_embedding"},
    # Fields of the architecture in published configs. transformers does not read them, because it has no other architecture.
    fixed={
        "use_qk_norm": (False,),
        "layer_switch": (4,),
        "order_of_interleaved_layers": ("local_attn_first",),
        "position_embedding_type": ("rope_gptj",),
        "rotary_pct": (1.0,),
        "use_embedding_sharing": (True,),
        "use_gated_activation": (True,),
        "use_parallel_block": (True,),
    },
    absent=cohere.FAMILY.absent,
)
