"""OLMo 2 and 3: norms after attention and MLP instead of before, and RMSNorm over all heads of queries and keys."""

from typing import Any

from swift_mega.models.decoder import READS, ropes_by_type, translate, windows
from swift_mega.models.family import Family
from swift_mega.models.modules.norm import WholeQKNorm
from swift_mega.models.rules import DENSE_RULES, EMBEDDING_RULES, POST_NORM_RULES, WHOLE_QK_NORM_RULES, attention_rules
from swift_mega.models.settings import Biases, Block, Settings


def _translate(config: Any) -> Settings:
    bias, sliding = bool(config.attention_bias), config.model_type == "olmo3"
    return translate(
        config,
        megatron={"add_qkv_bias": bias},
        biases=Biases(attention_output=bias),
        block=Block(pre_norms=False, post_norms=True),
        edits=(WholeQKNorm(),),
        windows=windows(config) if sliding else (None,) * config.num_hidden_layers,
        ropes=ropes_by_type(
            config, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        if sliding
        else None,
    )


FAMILY = Family(
    hf_types=("olmo2", "olmo3"),
    translate=_translate,
    rules=(*EMBEDDING_RULES, *POST_NORM_RULES, *attention_rules(), *WHOLE_QK_NORM_RULES, *DENSE_RULES),
    reads=READS | {"attention_bias"},
)
