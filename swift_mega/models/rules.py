"""Which Hugging Face tensors fill which parameters of Megatron, for the parts that decoders are made of.

A family takes the rules of its parts from here and adds its own. Rules contain names only; a Pack describes the layout of the tensors.
"""

from swift_mega.models.family import Rule
from swift_mega.models.packs import COLUMN, FUSED_GATE_UP, GATE_UP, QKV, REPLICATED, ROW, VOCAB

LAYER = "decoder.layers.{i}."
HF_LAYER = "model.layers.{i}."

EMBEDDING_RULES = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), VOCAB),
    *(Rule(f"decoder.final_layernorm.{leaf}", (f"model.norm.{leaf}",), REPLICATED) for leaf in ("weight", "bias")),
    Rule("output_layer.weight", ("lm_head.weight",), VOCAB),
)


def attention_rules(source: str = HF_LAYER + "self_attn.") -> tuple[Rule, ...]:
    """Grouped-query attention with separate q, k, v projections."""
    target = LAYER + "self_attention."
    fused = tuple(f"{source}{name}_proj" for name in "qkv")
    return (
        Rule(target + "linear_qkv.weight", tuple(f"{name}.weight" for name in fused), QKV),
        Rule(target + "linear_qkv.bias", tuple(f"{name}.bias" for name in fused), QKV),
        Rule(target + "linear_proj.weight", (source + "o_proj.weight",), ROW),
        Rule(target + "linear_proj.bias", (source + "o_proj.bias",), REPLICATED),
    )


def fused_attention_rules(source: str, output: str) -> tuple[Rule, ...]:
    """Attention with one query-key-value projection in Megatron's order. source, output: modules of this and of the output projection."""
    target = LAYER + "self_attention."
    return (
        Rule(target + "linear_qkv.weight", (source + ".weight",), COLUMN),
        Rule(target + "linear_qkv.bias", (source + ".bias",), COLUMN),
        Rule(target + "linear_proj.weight", (output + ".weight",), ROW),
        Rule(target + "linear_proj.bias", (output + ".bias",), REPLICATED),
    )


def mlp_rules(target: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """A gated MLP. gate, up, down: Hugging Face module names."""
    return (
        Rule(target + "linear_fc1.weight", (gate + ".weight", up + ".weight"), GATE_UP),
        Rule(target + "linear_fc1.bias", (gate + ".bias", up + ".bias"), GATE_UP),
        Rule(target + "linear_fc2.weight", (down + ".weight",), ROW),
        Rule(target + "linear_fc2.bias", (down + ".bias",), REPLICATED),
    )


def ungated_mlp_rules(target: str, up: str, down: str) -> tuple[Rule, ...]:
    """An MLP of two linears with an activation between them. up, down: Hugging Face module names."""
    return (
        Rule(target + "linear_fc1.weight", (up + ".weight",), COLUMN),
        Rule(target + "linear_fc1.bias", (up + ".bias",), COLUMN),
        Rule(target + "linear_fc2.weight", (down + ".weight",), ROW),
        Rule(target + "linear_fc2.bias", (down + ".bias",), REPLICATED),
    )


def expert_rules(router: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """A mixture of experts with one set of tensors per expert {e}."""
    experts = LAYER + "mlp.experts.local_experts.{e}."
    return (Rule(LAYER + "mlp.router.weight", (router,), REPLICATED), *mlp_rules(experts, gate, up, down))


def shared_expert_rules(gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """The shared expert, which every token passes. All expert ranks have the same one, sharded over tensor ranks, so it has no {e}."""
    return mlp_rules(LAYER + "mlp.shared_experts.", gate, up, down)


def norm_rules(target: str, source: str) -> tuple[Rule, ...]:
    """Weight and bias of a norm. target, source: names of its module in Megatron and in Hugging Face."""
    return tuple(Rule(f"{target}.{leaf}", (f"{source}.{leaf}",), REPLICATED) for leaf in ("weight", "bias"))


NORM_RULES = (
    *norm_rules(LAYER + "input_layernorm", HF_LAYER + "input_layernorm"),
    *norm_rules(LAYER + "pre_mlp_layernorm", HF_LAYER + "post_attention_layernorm"),
)
QK_NORM_RULES = (
    Rule(LAYER + "self_attention.q_layernorm.weight", (HF_LAYER + "self_attn.q_norm.weight",), REPLICATED),
    Rule(LAYER + "self_attention.k_layernorm.weight", (HF_LAYER + "self_attn.k_norm.weight",), REPLICATED),
)
WHOLE_QK_NORM_RULES = (
    Rule(LAYER + "self_attention.q_layernorm.weight", (HF_LAYER + "self_attn.q_norm.weight",), COLUMN),
    Rule(LAYER + "self_attention.k_layernorm.weight", (HF_LAYER + "self_attn.k_norm.weight",), COLUMN),
)
"""Norms over all heads of queries and keys together, which tensor parallelism shards with the heads."""
POST_NORM_RULES = (
    *norm_rules(LAYER + "post_self_attn_layernorm", HF_LAYER + "post_attention_layernorm"),
    *norm_rules(LAYER + "post_mlp_layernorm", HF_LAYER + "post_feedforward_layernorm"),
)
"""Norms after attention and MLP, for layers without norms before them."""
MLP = HF_LAYER + "mlp."
DENSE_RULES = mlp_rules(LAYER + "mlp.", MLP + "gate_proj", MLP + "up_proj", MLP + "down_proj")
FUSED_DENSE_RULES = (
    Rule(LAYER + "mlp.linear_fc1.weight", (MLP + "gate_up_proj.weight",), FUSED_GATE_UP),
    Rule(LAYER + "mlp.linear_fc2.weight", (MLP + "down_proj.weight",), ROW),
)
"""A gated MLP whose gate and up projections are one tensor."""
RULES = (*EMBEDDING_RULES, *NORM_RULES, *attention_rules(), *DENSE_RULES)
