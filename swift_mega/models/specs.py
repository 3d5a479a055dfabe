"""Megatron's layer specs with what a family varies: the fields of its settings, then its edits, which this file does not know.

Only this file knows whether layers consist of Transformer Engine's modules or of Megatron's local ones. te: Transformer Engine's, as
Device.uses_transformer_engine says.
"""

import functools
from collections.abc import Sequence

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
)
from megatron.core.transformer.spec_utils import ModuleSpec

from swift_mega.models.edits import Parts, attention_of, bound, mlp_of, submodules_of
from swift_mega.models.modules.attention import CoreAttention
from swift_mega.models.modules.experts import BiasedRow, GroupedExperts
from swift_mega.models.modules.layer import Layer, NoNorm
from swift_mega.models.modules.norm import Norm
from swift_mega.models.modules.router import Router
from swift_mega.models.modules.tiles import TiledMLP, TiledNorm, TiledSharedExperts
from swift_mega.models.settings import Block, NormKind, Settings
from swift_mega.ops.kernels import AUTO, Kernels


def layer_specs(
    settings: Settings,
    *,
    te: bool,
    reads_inputs: bool,
    tile: int | None = None,
    recompute: Sequence[str] = (),
    kernels: Kernels = AUTO,
) -> list[ModuleSpec]:
    """One Megatron layer spec per layer of the whole model.

    reads_inputs: hooks need the real input of linears. tile: of modules/tiles.py. recompute: modules that the backward pass recomputes.
    Megatron's own layer cannot recompute norms without Transformer Engine (NameError in CheckpointWithoutOutput), nor MLPs with a bias (the
    backward pass does not end), in 0.16.1 and 0.19.2; then ours (`Layer`) takes its place.
    """
    parts, made, te_core = _parts(settings, te=te, tile=tile, kernels=kernels), {}, te_attention(te)
    spec = functools.partial(_te_spec if te else _local_spec, settings, parts.norm, reads_inputs=reads_inputs)
    for kind in set(settings.layer_kinds):
        made[kind] = _joined(spec(moe=kind.moe), settings, parts.norm, te_core, moe=kind.moe, kernels=kernels)
        if ("layernorm" in recompute and not te) or ("mlp" in recompute and settings.biases.mlp):
            made[kind].module = bound(Layer, block=settings.block, norm=parts.norm)
        if tile is not None:
            _tile(made[kind], tile, moe=kind.moe)
        for edit in kind.edits:
            edit.edit(made[kind], parts)
    return [made[kind] for kind in settings.layer_kinds]


def _parts(settings: Settings, *, te: bool, tile: int | None, kernels: Kernels) -> Parts:
    norm = norm_class(settings, te=te, tile=tile, kernels=kernels)
    if not te:
        linears: dict[str, type] = {"column": ColumnParallelLinear, "row": RowParallelLinear}
        return Parts(shape=settings.shape, norm=norm, kernels=kernels, **linears)
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    linears = {"column": TEColumnParallelLinear, "row": TERowParallelLinear}
    return Parts(shape=settings.shape, norm=norm, kernels=kernels, **linears)


def te_attention(te: bool) -> type | None:
    """Transformer Engine's attention, which context ranks can use to share a packed row; None: Megatron's local modules."""
    if not te:
        return None
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    return TEDotProductAttention  # type: ignore[no-any-return]


def norm_class(settings: Settings, *, te: bool, tile: int | None = None, kernels: Kernels = AUTO) -> type:
    """Transformer Engine's norm where it has this kind, else ours, which computes `tile` tokens at a time."""
    if te and has_te_norm(settings):
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    fixed = {"kind": settings.norm, "kernels": kernels}
    return bound(Norm, **fixed) if tile is None else bound(TiledNorm, **fixed, tile=tile)


def has_te_norm(settings: Settings) -> bool:
    """Whether Transformer Engine has the model's kind of norm."""
    return settings.norm.weight and settings.norm.bias == (settings.norm.kind == "layer")


def _local_spec(settings: Settings, norm: type, *, moe: bool, reads_inputs: bool) -> ModuleSpec:
    """Megatron's own modules, with our experts (models/modules/experts.py): its grouped ones need Transformer Engine."""
    spec = get_gpt_layer_local_spec(
        num_experts=settings.shape.experts if moe else None,
        moe_grouped_gemm=False,
        qk_layernorm=settings.megatron.get("qk_layernorm", False),
        normalization="RMSNorm",
        multi_latent_attention=settings.megatron.get("multi_latent_attention", False),
    )
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
    if settings.megatron.get("qk_layernorm", False):
        attention = attention_of(spec)
        attention.q_layernorm = attention.k_layernorm = norm
    if moe:
        experts = mlp_of(spec)
        if settings.biases.mlp:
            submodules_of(experts.experts).linear_fc2 = BiasedRow
        experts.experts = bound(GroupedExperts, submodules=submodules_of(experts.experts))
    return spec


def _te_spec(settings: Settings, norm: type, *, moe: bool, reads_inputs: bool) -> ModuleSpec:
    """Transformer Engine's modules.

    Norms are not fused into the linears where a hook needs the normalised input, which a fused module does not return, and where the
    layer's connections differ from Megatron's.
    """
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=settings.shape.experts if moe else None,
        moe_grouped_gemm=moe,
        qk_layernorm=settings.megatron.get("qk_layernorm", False),
        multi_latent_attention=settings.megatron.get("multi_latent_attention", False),
    )
    if reads_inputs or settings.block != Block() or settings.norm not in (NormKind(), NormKind(one_plus=True)):
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
        spec.submodules.self_attention.submodules.linear_qkv = TEColumnParallelLinear
        if not moe:
            mlp_of(spec).linear_fc1 = TEColumnParallelLinear
    if settings.megatron.get("qk_layernorm", False):
        attention = attention_of(spec)
        attention.q_layernorm = attention.k_layernorm = norm
    return spec


def _joined(
    spec: ModuleSpec, settings: Settings, norm: type, te_core: type | None, *, moe: bool, kernels: Kernels
) -> ModuleSpec:
    """What the fields of the settings say, the same for both kinds of modules."""
    attention, block = attention_of(spec), settings.block
    attention.core_attention = bound(CoreAttention, settings=settings, te_attention=te_core, kernels=kernels)
    if moe:
        mlp_of(spec).router = Router
    # Megatron's field is for all linears, and Megatron refuses it together with shared experts.
    mlp_bias = settings.megatron.get("add_bias_linear", False)
    if mlp_bias and not settings.megatron.get("add_qkv_bias"):
        attention.linear_qkv = bound(attention.linear_qkv, bias=False)
    if settings.biases.attention_output != mlp_bias:
        attention.linear_proj = bound(attention.linear_proj, bias=settings.biases.attention_output)
    if block != Block():
        spec.module = bound(Layer, block=block, norm=norm)
        if not block.pre_norms:
            spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = NoNorm
        elif block.parallel and block.shared_norm:
            spec.submodules.pre_mlp_layernorm = NoNorm
    spec.submodules.sharded_state_dict_keys_map = _names_in_checkpoints(moe)
    return spec


def _tile(spec: ModuleSpec, tile: int, *, moe: bool) -> None:
    """Computes the MLP, or the shared experts, `tile` tokens at a time. Both are classes, which every Megatron takes in these places."""
    if not moe:
        spec.submodules.mlp = bound(TiledMLP, submodules=mlp_of(spec), tile=tile)
        return
    experts = mlp_of(spec)
    experts.shared_experts = bound(TiledSharedExperts, submodules=submodules_of(experts.shared_experts), tile=tile)


def _names_in_checkpoints(moe: bool) -> dict[str, str]:
    """Names of a layer's norms in Megatron's checkpoints, fused or not: those of Megatron's layer with Transformer Engine on CUDA.

    Megatron's local layers use them too, except with experts or latent attention, where no linear takes a fused norm.
    """
    names = {} if moe else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    return {"input_layernorm.": "self_attention.linear_qkv.layer_norm_", **names}
