"""Hunyuan MoE (Hunyuan-A13B): Hunyuan's attention; routed experts and a shared expert in every layer.

Its configs may list the same number for every layer. transformers has one width for all MLPs and experts, whatever they list.
"""

from typing import Any

from swift_mega.errors import UserError
from swift_mega.models.decoder import moe, vary
from swift_mega.models.families import hunyuan_v1_dense
from swift_mega.models.rules import HF_LAYER, expert_rules, shared_expert_rules
from swift_mega.models.settings import Settings

EXPERT, SHARED = HF_LAYER + "mlp.experts.{e}.", HF_LAYER + "mlp.shared_mlp."


def _translate(config: Any) -> Settings:
    width = config.intermediate_size
    for name, only in (("moe_intermediate_size", width), ("num_shared_expert", 1)):
        if (found := _everywhere(config, name, only)) != only:
            raise UserError(
                f"config.json: {name}={found!r}, but transformers supports only {only} in this model; correct it"
            )
    top_k = _everywhere(config, "moe_topk", 1)
    if type(top_k) is not int or not 1 <= top_k <= config.num_experts:
        raise UserError(
            f"config.json: moe_topk={top_k!r} of the {config.num_experts} experts cannot be chosen; correct it"
        )
    return moe(
        hunyuan_v1_dense.FAMILY.translate(config),
        experts=config.num_experts,
        top_k=top_k,
        ffn=width,
        layers=(True,) * config.num_hidden_layers,
        shared=width,
    )


def _everywhere(config: Any, name: str, default: int) -> Any:
    """The number that all layers have, of a field that may be a list with a number per layer."""
    value = getattr(config, name, None)
    if not isinstance(value, list):
        return default if value is None else value
    if len(value) != config.num_hidden_layers or len(set(value)) != 1:
        raise UserError(
            f"config.json: {name}={value!r} is not the same number for each of {config.num_hidden_layers} layers, "
            "and layers that differ are not supported"
        )
    return value[0]


FAMILY = vary(
    hunyuan_v1_dense.FAMILY,
    hf_types=("hunyuan_v1_moe",),
    translate=_translate,
    rules=(
        *expert_rules(HF_LAYER + "mlp.gate.wg.weight", EXPERT + "gate_proj", EXPERT + "up_proj", EXPERT + "down_proj"),
        *shared_expert_rules(SHARED + "gate_proj", SHARED + "up_proj", SHARED + "down_proj"),
    ),
    reads=(
        *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_topk", "moe_intermediate_size"),
        *("num_shared_expert", "image_token_id", "video_start_id", "video_end_id"),
        # They have no effect with the values below.
        *("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "xdrope_section"),
        # Settings of an image encoder, whose tensors nothing would read.
        *("anyres_pooling_size", "anyres_vit_max_image_size", "anyres_vit_two_views", "num_media_embeds"),
        *("skip_cls_token", "vit_add_patchemb_bias", "vit_input_resolution", "vit_mapping_type", "vit_norm_type"),
        *("vit_patch", "vit_path", "vit_remove_prenorm", "vit_token", "vit_type", "vit_used_rms_norm"),
    ),
    by_layer=frozenset({"moe_intermediate_size"}),
    # transformers does not read these, because it has no other architecture.
    fixed={
        "norm_type": ("rms", "hf_rms"),
        "group_limited_greedy": (False,),
        "mamba": (False,),
        "moe_drop_tokens": (False,),
        "moe_layer_num_skipped": (0,),
        "moe_random_routing_dropped_token": (False,),
        "n_group": (None, 1),
        "norm_topk_prob": (True,),
        "position_embedding_xdrope": (False,),
        "routed_scaling_factor": (None, 1.0),
        "topk_group": (None, 1),
        "use_mixed_mlp_moe": (True,),
        "use_mla": (False,),
    },
)
