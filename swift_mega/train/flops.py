"""Floating-point operations per token: 2 per weight in the forward pass, 2 more for each gradient.

A token uses the weights of its own experts only. The embedding is a lookup and counts nothing; the output layer counts, also when it is
tied to the embedding.
"""

from swift_mega.models.settings import LayerKind, Settings


def flops_per_token(settings: Settings, *, trained: bool) -> float:
    """Operations per token in the whole model; a multiply-add counts 2.

    Per weight: 2 in the forward pass, 2 for the gradient of the input, and 2 for the gradient of the weight where weights are trained.
    Not counted: the products of attention (QKᵀ and PV), which depend on the lengths and are small compared with the weights at the
    usual lengths; the products of a delta net with its state, which do not depend on the lengths.
    """
    return (6.0 if trained else 4.0) * weights_per_token(settings)


def weights_per_token(settings: Settings) -> int:
    """Number of elements in the matrices that one token is multiplied with; norms and biases do not count."""
    shape = settings.shape
    mlps = sum(_experts(settings) if moe else _mlp(settings, shape.ffn or 0) for moe in settings.moe_layers)
    attention = sum(_attention(settings, kind) for kind in settings.layer_kinds)
    return attention + mlps + shape.hidden * shape.vocab


def _attention(settings: Settings, kind: LayerKind) -> int:
    shape = settings.shape
    replaced = [weights for edit in kind.edits if (weights := edit.attention_weights(shape)) is not None]
    if replaced:
        return replaced[0]
    gates = shape.heads if settings.megatron.get("attention_output_gate") else 0
    return shape.hidden * settings.megatron["kv_channels"] * (2 * (shape.heads + shape.kv_heads) + gates)


def _mlp(settings: Settings, ffn: int) -> int:
    return (3 if settings.megatron["gated_linear_unit"] else 2) * settings.shape.hidden * ffn


def _experts(settings: Settings) -> int:
    shape, megatron = settings.shape, settings.megatron
    router = shape.hidden * ((shape.experts or 0) + bool(megatron.get("moe_shared_expert_gate")))
    chosen = megatron["moe_router_topk"] * _mlp(settings, shape.expert_ffn or 0)
    return router + chosen + _mlp(settings, shape.shared_ffn or 0)
