"""Gated delta net (Yang et al. 2024, arXiv:2412.06464) in place of a layer's attention, as in Qwen3-Next.

Everything belongs to one key head: its query and key; values, gates and rates of its value heads; and their channels of the convolution.
So each tensor rank has some key heads, every projection is column- or row-parallel, and ranks do not communicate inside. Megatron's own
module cannot be built without flash-linear-attention, and before 0.19 it refuses rows of many examples. Only its linears are used here.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import checkpoint, copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
from torch import Tensor

from swift_mega.models.edits import Edit, Parts
from swift_mega.models.modules.attention import Segments
from swift_mega.ops.causal_conv import CAUSAL_CONV, causal_conv
from swift_mega.ops.gated_delta import GATED_DELTA, gated_delta_rule
from swift_mega.ops.kernels import AUTO, Kernels, Use
from swift_mega.parallel.layout import ModelShape

CUT = {"A_log": 0, "dt_bias": 0, "conv": 0}
"""The module's own parameters that are sharded over tensor ranks, and the sharded dim."""


@dataclass(frozen=True, kw_only=True)
class DeltaNet(Edit):
    """A gated delta net replaces attention. A key head serves value_heads / key_heads value heads."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int
    """Width of the convolution in tokens: each token and the taps - 1 before it."""
    no_memory_formula = "a gated delta net"
    replaces_attention = True

    @property
    def channels(self) -> tuple[int, int, int]:
        """Query, key and value channels of one key head."""
        return self.key_dim, self.key_dim, self.value_heads // self.key_heads * self.value_dim

    def ops(self) -> Sequence[Use]:
        return Use(CAUSAL_CONV), Use(GATED_DELTA)

    def edit(self, spec: Any, parts: Parts) -> None:
        """Replaces the attention in a layer's spec; the input norm is not fused into a linear."""
        spec.submodules.input_layernorm = parts.norm
        spec.submodules.self_attention = ModuleSpec(
            module=GatedDeltaNet,
            params={"delta": self, "column": parts.column, "row": parts.row, "kernels": parts.kernels},
        )

    def limits(self, shape: ModelShape) -> ModelShape:
        return replace(
            shape,
            shared_counts=(*shape.shared_counts, ("key heads of linear attention", self.key_heads)),
            no_context_parallel="has gated delta nets, whose state goes from token to token",
        )

    def attention_linears(self) -> Collection[str]:
        return "linear_delta_qkvz", "linear_delta_ba", "linear_delta_out"

    def attention_weights(self, shape: ModelShape) -> int:
        """Queries, keys, values, gates, two rates per value head, convolution, output."""
        channels, values = self.key_heads * sum(self.channels), self.value_heads * self.value_dim
        return shape.hidden * (channels + values + 2 * self.value_heads) + channels * self.taps + values * shape.hidden


class GatedDeltaNet(MegatronModule):
    """hidden states [tokens / s, 1, hidden] -> (the same shape, no bias), like Megatron's attention."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        delta: DeltaNet,
        column: Any,
        row: Any,
        kernels: Kernels = AUTO,
        **given: Any,
    ) -> None:
        """column, row: Megatron's column- and row-parallel linear; `given` is what Megatron passes to any attention."""
        super().__init__(config)
        self.delta, self.ranks, self.kernels = delta, config.tensor_model_parallel_size, kernels
        self.key_heads, self.per_key = delta.key_heads // self.ranks, delta.value_heads // delta.key_heads
        self.value_heads = self.key_heads * self.per_key
        self.parts = (delta.key_dim, delta.key_dim, self.per_key * delta.value_dim)  # of one key head
        more: dict[str, Any] = dict(
            config=config, init_method=config.init_method, bias=False, is_expert=False, skip_bias_add=True
        )
        width, hidden = sum(self.parts) + self.parts[2], config.hidden_size
        self.linear_delta_qkvz = column(hidden, delta.key_heads * width, gather_output=False, **more)
        self.linear_delta_ba = column(hidden, 2 * delta.value_heads, gather_output=False, **more)
        self.linear_delta_out = row(delta.value_heads * delta.value_dim, hidden, input_is_parallel=True, **more)
        channels = self.key_heads * sum(self.parts)
        self.conv = _parameter(config, channels, 1, delta.taps)
        self.A_log, self.dt_bias = _parameter(config, self.value_heads), _parameter(config, self.value_heads)
        self.gated_norm = _parameter(config, delta.value_dim)
        modules = config.recompute_modules or [] if config.recompute_granularity == "selective" else []
        self.recompute = "core_attn" in modules

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, packed_seq_params: Segments, **given: Any
    ) -> tuple[Tensor, None]:
        """hidden_states [tokens / s, 1, hidden]; the row's examples are those of packed_seq_params."""
        qkvz, ba = self.linear_delta_qkvz(hidden_states)[0], self.linear_delta_ba(hidden_states)[0]

        def core(qkvz: Tensor, ba: Tensor) -> Tensor:
            return self._core(qkvz[:, 0], ba[:, 0], packed_seq_params)

        out = checkpoint(core, False, qkvz, ba) if self.recompute and self.training else core(qkvz, ba)
        return self.linear_delta_out(out[:, None])[0], None

    def _core(self, qkvz: Tensor, ba: Tensor, row: Segments) -> Tensor:
        """Projections [tokens, of this rank's heads] -> [tokens, value_heads * value_dim]."""
        tokens, value_dim = len(qkvz), self.delta.value_dim
        mixed, gate = qkvz.view(tokens, self.key_heads, -1).split((sum(self.parts), self.parts[2]), -1)
        mixed = causal_conv(mixed.reshape(tokens, -1), self.conv, cu_seqlens=row.starts, kernels=self.kernels)
        mixed = F.silu(mixed)
        query, key, value = mixed.view(tokens, self.key_heads, -1).split(self.parts, -1)
        b, a = ba.view(tokens, self.key_heads, 2, self.per_key).unbind(2)
        wide = torch.float64 if a.dtype == torch.float64 else torch.float32
        decay = -self.A_log.to(wide).exp() * F.softplus(a.reshape(tokens, -1).to(wide) + self.dt_bias)
        query, key = (x.repeat_interleave(self.per_key, 1) for x in (query, key))
        out = gated_delta_rule(
            query,
            key,
            value.reshape(tokens, -1, value_dim),
            decay,
            b.reshape(tokens, -1).sigmoid(),
            bounds=row.bounds,
            cu_seqlens=row.starts,
            kernels=self.kernels,
        )
        return self._gated(out, gate.reshape(tokens, -1, value_dim)).flatten(1)

    def _gated(self, x: Tensor, gate: Tensor) -> Tensor:
        """RMSNorm of every head, times silu of its gate; [tokens, value_heads, value_dim]."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        # One weight for all heads. Each rank has some of the heads, so the gradient is summed over tensor ranks.
        weight = copy_to_tensor_model_parallel_region(self.gated_norm) if self.ranks > 1 else self.gated_norm
        normed = F.rms_norm(x.to(wide), x.shape[-1:], None, self.config.layernorm_epsilon).to(x.dtype)
        return (weight * normed * F.silu(gate.to(wide))).to(x.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Its parameters for Megatron's checkpoints. Without this method Megatron assumes that all ranks have the same values."""
        own: dict[str, Any] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        group = parallel_state.get_tensor_model_parallel_group()
        found: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            own, prefix, CUT, sharded_offsets, tp_group=group, dp_cp_group=(metadata or {})["dp_cp_group"]
        )
        for name, module in self.named_children():
            found.update(sharded_state_dict_default(module, f"{prefix}{name}.", sharded_offsets, metadata))
        return found


def _parameter(config: TransformerConfig, *shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
