"""Megatron's layer specs with what a family varies.

Only this file knows whether layers consist of Transformer Engine's modules or of Megatron's local ones. te: Transformer Engine's, as
Device.uses_transformer_engine says.
"""

import functools
from collections.abc import Sequence
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
)
from megatron.core.transformer.spec_utils import ModuleSpec

from swift_mega.models.modules.attention import CoreAttention
from swift_mega.models.modules.experts import BiasedRow, GroupedExperts
from swift_mega.models.modules.gated_delta import delta_net
from swift_mega.models.modules.layer import Layer, NoNorm
from swift_mega.models.modules.mla import is_latent, latent
from swift_mega.models.modules.norm import HeadNorm, Norm, WholeNorm
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
    again: Sequence[str] = (),
    kernels: Kernels = AUTO,
) -> list[ModuleSpec]:
    """One Megatron layer spec per layer of the whole model.

    reads_inputs: hooks need the real input of linears. tile: of modules/tiles.py. again: modules that the backward pass recomputes.
    Megatron's own layer cannot recompute norms without Transformer Engine (NameError in CheckpointWithoutOutput), nor MLPs with a bias (the
    backward pass does not end), in 0.16.1 and 0.19.2; then ours (`Layer`) takes its place.
    """
    norm, made, te_core = norm_class(settings, te=te, tile=tile, kernels=kernels), {}, te_attention(te)
    spec = functools.partial(_te_spec if te else _local_spec, settings, norm, reads_inputs=reads_inputs)
    for moe, delta in set(settings.layer_kinds):
        made[moe, delta] = _joined(spec(moe=moe), settings, norm, te_core, moe=moe, kernels=kernels)
        if ("layernorm" in again and not te) or ("mlp" in again and settings.biases.mlp):
            made[moe, delta].module = bound(Layer, block=settings.block, norm=norm)
        if tile is not None:
            _tile(made[moe, delta], tile, moe=moe)
        if delta:
            column, row = _linears(te)
            delta_net(made[moe, delta], settings, norm=norm, column=column, row=row, kernels=kernels)
    return [made[kind] for kind in settings.layer_kinds]


def _linears(te: bool) -> tuple[type, type]:
    """The column-parallel and the row-parallel linear, without a fused norm."""
    if not te:
        return ColumnParallelLinear, RowParallelLinear
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    return TEColumnParallelLinear, TERowParallelLinear


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


def bound(module: Any, **fixed: Any) -> type:
    """A class that builds `module` with `fixed` arguments: every place of a Megatron spec takes a class."""

    def start(self: Any, *args: Any, **given: Any) -> None:
        module.__init__(self, *args, **{**given, **fixed})

    return type(module.__name__, (module,), {"__init__": start})


def _local_spec(settings: Settings, norm: type, *, moe: bool, reads_inputs: bool) -> ModuleSpec:
    """Megatron's own modules, with our experts (models/modules/experts.py): its grouped ones need Transformer Engine."""
    spec = get_gpt_layer_local_spec(
        num_experts=settings.shape.experts if moe else None,
        moe_grouped_gemm=False,
        qk_layernorm=settings.megatron.get("qk_layernorm", False),
        normalization="RMSNorm",
        multi_latent_attention=is_latent(settings),
    )
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
    if settings.megatron.get("qk_layernorm", False):
        attention = spec.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = norm
    if is_latent(settings):
        latent(spec.submodules.self_attention, settings, norm=norm, linear=ColumnParallelLinear)
    if moe:
        experts = _mlp(spec)
        if settings.biases.mlp:
            _submodules(experts.experts).linear_fc2 = BiasedRow
        experts.experts = bound(GroupedExperts, submodules=_submodules(experts.experts))
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
        multi_latent_attention=is_latent(settings),
    )
    if reads_inputs or settings.block != Block() or settings.norm not in (NormKind(), NormKind(one_plus=True)):
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
        spec.submodules.self_attention.submodules.linear_qkv = TEColumnParallelLinear
        if not moe:
            _mlp(spec).linear_fc1 = TEColumnParallelLinear
    if settings.megatron.get("qk_layernorm", False):
        attention = spec.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = norm
    if is_latent(settings):
        latent(spec.submodules.self_attention, settings, norm=norm, linear=TEColumnParallelLinear)
    return spec


def _joined(
    spec: ModuleSpec, settings: Settings, norm: type, te_core: type | None, *, moe: bool, kernels: Kernels
) -> ModuleSpec:
    """What a family varies, the same for both kinds of modules."""
    attention, block = spec.submodules.self_attention.submodules, settings.block
    attention.core_attention = bound(CoreAttention, settings=settings, engine=te_core, kernels=kernels)
    if moe:
        _mlp(spec).router = bound(Router, routing=settings.routing)
    if settings.whole_qk_norm:
        attention.q_layernorm = bound(WholeNorm, heads=settings.shape.heads)
        attention.k_layernorm = bound(WholeNorm, heads=settings.shape.kv_heads)
    if settings.head_qk_norm:
        attention.q_layernorm = bound(HeadNorm, heads=settings.shape.heads)
        attention.k_layernorm = bound(HeadNorm, heads=settings.shape.kv_heads)
    if settings.late_qk_norm:
        attention.q_layernorm = attention.k_layernorm = NoNorm
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
    spec.submodules.sharded_state_dict_keys_map = _names_in_checkpoints(settings, moe)
    return spec


def _tile(spec: ModuleSpec, tile: int, *, moe: bool) -> None:
    """Computes the MLP, or the shared experts, `tile` tokens at a time. Both are classes, which every Megatron takes in these places."""
    if not moe:
        spec.submodules.mlp = bound(TiledMLP, submodules=_mlp(spec), tile=tile)
        return
    experts = _mlp(spec)
    experts.shared_experts = bound(TiledSharedExperts, submodules=_submodules(experts.shared_experts), tile=tile)


def _names_in_checkpoints(settings: Settings, moe: bool) -> dict[str, str]:
    """Names of a layer's norms in Megatron's checkpoints, fused or not: those of Megatron's layer with Transformer Engine on CUDA.

    Megatron's local layers use them too, except with experts or latent attention, where no linear takes a fused norm.
    """
    names = {} if moe else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    if is_latent(settings):
        for latent_norm, up in (("q_layernorm", "linear_q_up_proj"), ("kv_layernorm", "linear_kv_up_proj")):
            names[f"self_attention.{latent_norm}."] = f"self_attention.{up}.layer_norm_"
        return names
    return {"input_layernorm.": "self_attention.linear_qkv.layer_norm_", **names}


def _mlp(spec: ModuleSpec) -> Any:
    """The submodules of a layer's MLP: its linears, or router and experts."""
    return _submodules(spec.submodules.mlp)


def _submodules(module: Any) -> Any:
    """Submodules of a module's spec; newer Megatron versions have a partial function in its place."""
    return module.keywords["submodules"] if isinstance(module, functools.partial) else module.submodules
