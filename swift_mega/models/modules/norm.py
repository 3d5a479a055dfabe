"""The norms of the families: whole on every tensor rank, or sharded with the heads that they normalise; and the edits that use them.

A whole weight has the mark `sequence_parallel`, which Megatron's finalize_model_grads looks for: with sequence parallelism it sums the
gradient over the tensor ranks. Megatron's own local norm refuses sequence parallelism.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from swift_mega.models.edits import Edit, Parts, attention_of, bound
from swift_mega.models.settings import NormKind
from swift_mega.ops.kernels import AUTO, Kernels
from swift_mega.ops.rmsnorm import rms_norm
from swift_mega.parallel.layout import ModelShape


class Norm(torch.nn.Module):
    """RMSNorm or LayerNorm over the last dim."""

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        kind: NormKind,
        kernels: Kernels = AUTO,
        **given: Any,
    ) -> None:
        super().__init__()
        self.kind, self.eps, self.size, self.kernels = kind, eps, hidden_size, kernels
        self.weight = _parameter(config, hidden_size) if kind.weight else None
        self.bias = _parameter(config, hidden_size) if kind.bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> the same."""
        weight: Tensor | None = self.weight
        if self.kind.one_plus and weight is not None:
            weight = weight + 1
        if self.kind.kind == "layer":
            return F.layer_norm(x, (self.size,), weight, self.bias, self.eps)
        if weight is None:
            return F.rms_norm(x, (self.size,), None, self.eps)
        return rms_norm(x, weight, self.eps, self.kernels)


def _parameter(config: TransformerConfig, size: int) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.empty(size, dtype=config.params_dtype))
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter


class WholeNorm(torch.nn.Module):
    """RMSNorm over all heads of a token together. Each tensor rank has some of the heads, so the squares are summed over tensor ranks.

    With more ranks than heads, several ranks have the same head, and each keeps a part of its weight.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, *, heads: int, **given: Any
    ) -> None:
        """heads: of the whole model; hidden_size: features of one head, which is what Megatron passes."""
        super().__init__()
        ranks = config.tensor_model_parallel_size
        self.whole, self.eps, self.sharded = heads * hidden_size, eps, ranks > 1
        self.size, self.copies = hidden_size, max(1, ranks // heads)
        self.weight = torch.nn.Parameter(torch.empty(self.whole // ranks, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, 1, heads of this rank, head_dim] -> the same."""
        flat = x.flatten(-2)
        wide = flat.float() if flat.dtype != torch.float64 else flat
        squares = wide.square().sum(-1, keepdim=True)
        if self.sharded:
            squares = _SumOverRanks.apply(squares) / self.copies
        normed = (wide * torch.rsqrt(squares / self.whole + self.eps)).to(x.dtype)
        return (normed * self._weight()).view_as(x)

    def _weight(self) -> Tensor:
        """The weight of this rank's heads. The gradient of a gathered weight is summed over the ranks that use it."""
        if self.copies == 1:
            return self.weight
        whole = all_gather_last_dim_from_tensor_parallel_region(self.weight)
        first = parallel_state.get_tensor_model_parallel_rank() // self.copies * self.size
        return whole[first : first + self.size]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """The weight for Megatron's checkpoints."""
        return _cut_weight(self, prefix, sharded_offsets, metadata)


class HeadNorm(torch.nn.Module):
    """LayerNorm of each head, with its own weight for each; a tensor rank has the weights of its heads."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, *, heads: int, **given: Any
    ) -> None:
        """heads: of the whole model; hidden_size: features of one head."""
        super().__init__()
        self.size, self.eps = hidden_size, eps
        mine = heads // config.tensor_model_parallel_size
        self.weight = torch.nn.Parameter(torch.empty(mine, hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, 1, heads / ranks, head_dim] -> the same."""
        wide = x.float() if x.dtype != torch.float64 else x
        return (F.layer_norm(wide, (self.size,), None, None, self.eps) * self.weight).to(x.dtype)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """The weight for Megatron's checkpoints."""
        return _cut_weight(self, prefix, sharded_offsets, metadata)


def _cut_weight(module: torch.nn.Module, prefix: str, offsets: Any, metadata: Any) -> dict[str, Any]:
    """A weight sharded over tensor ranks. Megatron assumes that all ranks have the same values in a module without sharded_state_dict."""
    return make_sharded_tensors_for_checkpoint(
        module.state_dict(keep_vars=True),
        prefix,
        {"weight": 0},
        offsets,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        dp_cp_group=metadata["dp_cp_group"],
    )


class _SumOverRanks(torch.autograd.Function):
    """Sum over tensor ranks. Every rank uses the sum, so the gradient is summed too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        torch.distributed.all_reduce(x, group=parallel_state.get_tensor_model_parallel_group())
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.clone()
        torch.distributed.all_reduce(grad, group=parallel_state.get_tensor_model_parallel_group())
        return grad


@dataclass(frozen=True, kw_only=True)
class WholeQKNorm(Edit):
    """Queries and keys are normalised over all heads together, not per head."""

    no_memory_formula = None
    normalises_queries = True

    def edit(self, spec: Any, parts: Parts) -> None:
        """A WholeNorm of the queries and one of the keys."""
        _norm_heads(spec, WholeNorm, parts.shape)

    def megatron_fields(self) -> Mapping[str, Any]:
        return TAKES_OUR_NORMS

    def more_parameters(self, shape: ModelShape, tensor: int) -> int:
        return _numbers_of_heads(shape, tensor)


@dataclass(frozen=True, kw_only=True)
class HeadQKNorm(Edit):
    """The LayerNorms of queries and keys have a weight for every head, not one that all heads share."""

    no_memory_formula = None
    normalises_queries = True

    def edit(self, spec: Any, parts: Parts) -> None:
        """A HeadNorm of the queries and one of the keys."""
        _norm_heads(spec, HeadNorm, parts.shape)

    def limits(self, shape: ModelShape) -> ModelShape:
        return replace(shape, no_key_head_sharing="has its own norm, which cannot be split over tensor ranks")

    def megatron_fields(self) -> Mapping[str, Any]:
        return TAKES_OUR_NORMS

    def more_parameters(self, shape: ModelShape, tensor: int) -> int:
        return _numbers_of_heads(shape, tensor)


TAKES_OUR_NORMS = {"qk_l2_norm": True}
"""Makes newer Megatron versions take the spec's norms. qk_layernorm would also sum the gradients of weights sharded by heads."""


def _norm_heads(spec: Any, norm: type, shape: ModelShape) -> None:
    attention = attention_of(spec)
    attention.q_layernorm = bound(norm, heads=shape.heads)
    attention.k_layernorm = bound(norm, heads=shape.kv_heads)


def _numbers_of_heads(shape: ModelShape, tensor: int) -> int:
    assert shape.head_dim is not None
    return (shape.heads + shape.kv_heads) * shape.head_dim // tensor


@dataclass(frozen=True, kw_only=True)
class EmbeddingNorm(Edit):
    """The output of the embedding is normalised, on each rank for its own tokens."""

    no_memory_formula = "a norm after the embedding"

    def built(self, chunk: Any, norm: Any) -> None:
        """Adds the norm to the chunk that has the embedding."""
        if chunk.pre_process:
            config = chunk.config
            chunk.embedding.norm = norm(config, config.hidden_size, eps=config.layernorm_epsilon)
            chunk.embedding.register_forward_hook(_normalise)


def _normalise(module: Any, given: tuple[Any, ...], result: Tensor) -> Tensor:
    """Forward hook of an embedding: normalises its output."""
    return module.norm(result)  # type: ignore[no-any-return]
