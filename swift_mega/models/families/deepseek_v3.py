"""DeepSeek-V3 and models of its type (Moonlight, Kimi K2): latent attention (MLA); some dense layers, then experts chosen by groups.

Some checkpoints have multi-token-prediction layers after the last layer. They are kept, not computed.
"""

import dataclasses
from typing import Any

from swift_mega.errors import UserError
from swift_mega.models.decoder import DECODER, moe, rope, translate, vary
from swift_mega.models.family import Rule
from swift_mega.models.modules.mla import Latent
from swift_mega.models.modules.router import Routing
from swift_mega.models.packs import COLUMN, REPLICATED
from swift_mega.models.rules import HF_LAYER, LAYER, expert_rules, norm_rules, shared_expert_rules
from swift_mega.models.settings import Settings

ATTENTION, HF_ATTENTION = LAYER + "self_attention.", HF_LAYER + "self_attn."
EXPERT, SHARED = HF_LAYER + "mlp.experts.{e}.", HF_LAYER + "mlp.shared_experts."
LINEARS = {
    "linear_q_proj": "q_proj",
    "linear_q_down_proj": "q_a_proj",
    "linear_q_up_proj": "q_b_proj",
    "linear_kv_down_proj": "kv_a_proj_with_mqa",
    "linear_kv_up_proj": "kv_b_proj",
}
LATENT_RULES = (
    *(Rule(f"{ATTENTION}{ours}.weight", (f"{HF_ATTENTION}{theirs}.weight",), COLUMN) for ours, theirs in LINEARS.items()),
    *norm_rules(ATTENTION + "q_layernorm", HF_ATTENTION + "q_a_layernorm"),
    *norm_rules(ATTENTION + "kv_layernorm", HF_ATTENTION + "kv_a_layernorm"),
)  # fmt: skip
EXPERT_RULES = (
    *expert_rules(HF_LAYER + "mlp.gate.weight", EXPERT + "gate_proj", EXPERT + "up_proj", EXPERT + "down_proj"),
    *shared_expert_rules(SHARED + "gate_proj", SHARED + "up_proj", SHARED + "down_proj"),
)
BIASED_EXPERT_RULES = (
    *EXPERT_RULES,
    Rule(LAYER + "mlp.router.expert_bias", (HF_LAYER + "mlp.gate.e_score_correction_bias",), REPLICATED),
)
EXPERT_READS = (
    *("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "first_k_dense_replace"),
    *("n_group", "topk_group", "routed_scaling_factor"),
    *("num_local_experts", "num_experts"),  # transformers' other names of n_routed_experts
    *("aux_loss_alpha", "seq_aux", "ep_size"),  # settings of the checkpoint's training
)
MTP_READS = ("num_nextn_predict_layers", "num_mtp_layers")
READS = (
    *EXPERT_READS,
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim", "v_head_dim"),
)
FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "moe_layer_freq": (1,),
}


def translate_latent(config: Any, *, interleaved: bool, routing: Routing) -> Settings:
    """Settings of a DeepSeek config with latent attention, whose experts are chosen by `routing`."""
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    if config.num_key_value_heads != heads:
        raise UserError(
            f"config.json: num_key_value_heads={config.num_key_value_heads}, but latent attention gives each of the "
            f"{heads} heads keys of its own; set it to {heads}"
        )
    if config.head_dim != config.qk_rope_head_dim:
        raise UserError(
            f"config.json: head_dim={config.head_dim}, but transformers rotates qk_rope_head_dim={config.qk_rope_head_dim} "
            "features; remove head_dim"
        )
    yarn = config.rope_parameters if config.rope_parameters.get("rope_type", "default") != "default" else {}
    latent = Latent(
        query=config.q_lora_rank,
        latent=config.kv_lora_rank,
        nope_dim=config.qk_nope_head_dim,
        rope_dim=config.qk_rope_head_dim,
        value=config.v_head_dim,
    )
    # Megatron's rotation is not used. But Megatron computes the scale of the scores from these, as transformers does.
    scale = dict(
        rope_type="rope",
        rotary_scaling_factor=yarn.get("factor", 1.0),
        mscale_all_dim=yarn.get("mscale_all_dim") or 0.0,
    )
    rotation = rope(config, config.qk_rope_head_dim, interleaved=interleaved)
    settings = translate(config, megatron={**latent.megatron, **scale}, edits=(latent,), ropes=(rotation,) * layers)
    return translate_experts(settings, config, routing)


def translate_experts(settings: Settings, config: Any, routing: Routing) -> Settings:
    """`settings` with the mixture of experts of a DeepSeek config, chosen by `routing`."""
    _check_groups(config, routing)
    predict = getattr(config, "num_nextn_predict_layers", None) or getattr(config, "num_mtp_layers", None) or 0
    return moe(
        dataclasses.replace(settings, predict_layers=predict),
        experts=config.n_routed_experts,
        top_k=config.num_experts_per_tok,
        ffn=config.moe_intermediate_size,
        layers=tuple(layer >= config.first_k_dense_replace for layer in range(config.num_hidden_layers)),
        shared=config.n_shared_experts * config.moe_intermediate_size,
        routing=routing,
    )


def _check_groups(config: Any, routing: Routing) -> None:
    experts, groups, chosen = config.n_routed_experts, routing.groups, routing.chosen_groups
    size = experts // groups
    if experts % groups or chosen > groups or config.num_experts_per_tok > chosen * size or size < routing.group_best:
        raise UserError(
            f"config.json: {config.num_experts_per_tok} experts of {chosen} groups (topk_group) cannot be chosen where "
            f"{experts} experts are split into {groups} groups (n_group); correct these fields"
        )


def sigmoid_routing(config: Any) -> Routing:
    """DeepSeek-V3's choice of experts."""
    return Routing(
        score="sigmoid",
        normalise=bool(config.norm_topk_prob),
        added=1e-20,
        scale=config.routed_scaling_factor,
        groups=config.n_group or 1,
        chosen_groups=config.topk_group or 1,
    )


def _translate(config: Any) -> Settings:
    return translate_latent(config, interleaved=bool(config.rope_interleave), routing=sigmoid_routing(config))


FAMILY = vary(
    DECODER,
    hf_types=("deepseek_v3", "kimi_k2"),
    read_as={"kimi_k2": "deepseek_v3"},
    translate=_translate,
    rules=(*LATENT_RULES, *BIASED_EXPERT_RULES),
    reads=(*READS, *MTP_READS, "norm_topk_prob", "rope_interleave"),
    fixed={**FIXED, "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
)
