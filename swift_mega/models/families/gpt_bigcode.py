"""StarCoder (GPT-BigCode): GPT-2 with weights stored [out, in], and one key head for all queries."""

from typing import Any

from swift_mega.models.families import gpt2
from swift_mega.models.family import Family
from swift_mega.models.packs import COLUMN, ROW
from swift_mega.models.settings import Settings


def _translate(config: Any) -> Settings:
    return gpt2.translate_gpt2(config, kv_heads=1 if config.multi_query else config.n_head)


FAMILY = Family(
    hf_types=("gpt_bigcode",),
    translate=_translate,
    pad_without_gradient=False,
    # The fused projection is in Megatron's order: queries, key and value of the only group, or query, key and value of each head.
    rules=gpt2.gpt2_rules(query_key_value=COLUMN, bias=COLUMN, column=COLUMN, row=ROW),
    # num_key_value_heads: transformers writes it, but reads multi_query. The others are about inference, and about the dtype of the
    # softmax, which is always float32 here.
    reads=(gpt2.FAMILY.reads - {"scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"})
    | {"multi_query", "num_key_value_heads", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"}
    | {
        "inference_runner",
        "validate_runner_input",
        "pad_key_length",
        "pre_allocate_kv_cache",
        "max_batch_size",
        "max_sequence_length",
    },
    fixed=gpt2.FAMILY.fixed,
    absent=gpt2.FAMILY.absent,
)
