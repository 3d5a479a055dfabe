"""Our core attention, in place of Megatron's: positions are data, and a packed row holds many examples.

Megatron passes queries and keys to `core_attention` before the rotation. `Segments` travels with them and describes the row: where
examples start, cosine and sine of every token. It passes through the pipeline and recomputation in every supported version of Megatron.
So rotary frequencies are computed once per microbatch, and Megatron's own packed RoPE and its [s, s] mask are never used.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from swift_mega.device.device import send
from swift_mega.models.modules.norm import Norm
from swift_mega.models.modules.te_attention import attend, make_te_attention
from swift_mega.models.settings import Rope, Settings
from swift_mega.ops.attention import attention
from swift_mega.ops.kernels import AUTO, Kernels
from swift_mega.ops.rope import rotate, tables
from swift_mega.parallel.context import Context, context_attention
from swift_mega.parallel.sequence import local_tokens


@dataclass
class Segments(PackedSeqParams):
    """Description of a packed row. `qkv_format` stays "sbhd", so that Megatron leaves the row as [tokens, 1, ...]."""

    qkv_format: str = "sbhd"
    bounds: tuple[int, ...] = ()
    """Start of each example, and the end of the last one, in tokens; on the host."""
    starts: Tensor = None  # type: ignore[assignment]  # needs a default because the parent's fields have one; it is always given
    """cu_seqlens: the same as int32 on the device."""
    rope_tables: tuple[tuple[Tensor, Tensor], ...] = ()
    """(cosine, sine), each [tokens, 1, rotary_dim / 2], of every different rotation of the model."""
    growth: Tensor | None = None
    """[tokens, 1, 1]: factor on the queries of each token."""
    context: Context | None = None
    """The ranks that share the row; `bounds` and `starts` are of the whole row. None: this rank has all of it."""


def segments(
    settings: Settings, positions: Tensor, cu_seqlens: Tensor, dtype: torch.dtype, context: Context | None = None
) -> Segments:
    """Describes a packed row with tokens at `positions`, [tokens] or [axes, tokens]; cu_seqlens: [examples + 1] int32 on the host.

    context: the ranks that share the row; positions are then those of this rank's tokens, cu_seqlens is of the whole row.

    The frequencies of an example depend on its own length, not on the longest example in its row. So they are the same as without packing.
    """
    rope_tables = tuple(
        tables(
            positions,
            _frequencies(rope, cu_seqlens, context, positions.device),
            rope.scale,
            dtype,
            _axes(rope, positions),
        )
        for rope in settings.distinct_ropes
    )
    growth = None
    if settings.scales.query_growth is not None:
        slope, length = settings.scales.query_growth
        assert positions.dim() == 1, "no model has both several axes and queries that grow with the position"
        growth = (1 + slope * (1 + (positions / length).floor()).log()).to(dtype)[:, None, None]
    return Segments(
        bounds=tuple(cu_seqlens.tolist()),
        starts=send(cu_seqlens.to(torch.int32), positions.device),
        rope_tables=rope_tables,
        growth=growth,
        context=context,
    )


@functools.lru_cache(maxsize=64)
def _on_device(frequencies: tuple[float, ...], device: torch.device) -> Tensor:
    """[rotary_dim / 2], copied once and not for every microbatch; a model has few different rotations."""
    return torch.tensor(frequencies, device=device)


@functools.lru_cache(maxsize=64)
def _axes_on_device(axes: tuple[int, ...], device: torch.device) -> Tensor:
    """[rotary_dim / 2] int64, copied once like the frequencies."""
    return torch.tensor(axes, device=device)


def _axes(rope: Rope, positions: Tensor) -> Tensor | None:
    """[rotary_dim / 2]: the axis of each rotated pair; None where tokens have one position each."""
    if positions.dim() == 1:
        return None
    assert rope.sections is not None and len(rope.sections) == len(positions), (rope.sections, positions.shape)
    return _axes_on_device(rope.axes, positions.device)


def _frequencies(rope: Rope, cu_seqlens: Tensor, context: Context | None, device: torch.device) -> Tensor:
    """[rotary_dim / 2] for all tokens, or [tokens, 1, rotary_dim / 2]."""
    usual = _on_device(rope.inverse_frequencies, device)
    if rope.long is None:
        return usual
    lengths = cu_seqlens.diff()
    in_long = (lengths > rope.long_beyond).repeat_interleave(lengths)
    if context is not None:
        in_long = in_long[local_tokens(cu_seqlens.tolist(), context.mesh, context.rank)]
    return torch.where(send(in_long, device)[:, None, None], _on_device(rope.long, device), usual)


class CoreAttention(MegatronModule):
    """Attention within each example of a packed row, after the rotation of queries and keys by their positions."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        settings: Settings,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        te_attention: Any = None,
        alibi: tuple[float, ...] | None = None,
        late_norm: bool = False,
        sinks: bool = False,
        kernels: Kernels = AUTO,
        **given: Any,
    ) -> None:
        """`layer_number` counts from 1 over the whole model; `given` is what Megatron passes to any core attention.

        cp_comm_type: how context ranks communicate, where Transformer Engine does it; None: it does not.
        te_attention: its attention class for this case, TEDotProductAttention.
        alibi, late_norm, sinks: of modules/core_edits.py.
        """
        super().__init__(config=config)
        self.kernels = kernels
        rope = settings.ropes[layer_number - 1]
        self.rope_index = None if rope is None else settings.distinct_ropes.index(rope)
        self.interleaved = rope is not None and rope.interleaved
        self.window = settings.windows[layer_number - 1]
        self.clip = settings.scales.clip
        self.softcap = settings.scales.attention_softcap
        self.alibi: Tensor | None
        self.register_buffer("alibi", _mine(alibi), persistent=False)
        self.scale = softmax_scale or config.kv_channels**-0.5
        if settings.scales.attention_by_layer:
            self.scale /= layer_number
        self.late_norm = late_norm
        # Megatron sums gradients over tensor ranks by the names of its own norms, so ours have the same names.
        if self.late_norm:
            self.q_layernorm = Norm(
                config, config.kv_channels, config.layernorm_epsilon, kind=settings.norm, kernels=kernels
            )
            self.k_layernorm = Norm(
                config, config.kv_channels, config.layernorm_epsilon, kind=settings.norm, kernels=kernels
            )
        self.softmax_offset = None  # Megatron's name for attention sinks
        if sinks:
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            self.softmax_offset = torch.nn.Parameter(torch.empty(heads, dtype=config.params_dtype))
        self.te_attention = None
        if cp_comm_type is not None:
            assert te_attention is not None, "refused before ranks start"
            self.te_attention = make_te_attention(
                te_attention, config, layer_number, communication=cp_comm_type, scale=self.scale, window=self.window
            )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: Segments,
        **given: Any,
    ) -> Tensor:
        """query [tokens, 1, heads, head_dim], key and value [tokens, 1, kv_heads, head_dim] -> [tokens, 1, heads * head_dim]."""
        row = packed_seq_params
        query, key, value = query[:, 0], key[:, 0], value[:, 0]
        if self.clip is not None:
            query, key, value = (x.clamp(-self.clip, self.clip) for x in (query, key, value))
        if self.rope_index is not None:
            cos, sin = row.rope_tables[self.rope_index]
            query, key = (rotate(x, cos, sin, self.interleaved, self.kernels) for x in (query, key))
            # The backward pass keeps value, and a view would keep all of linear_qkv's output in memory.
            value = value.clone(memory_format=torch.contiguous_format)
        if row.growth is not None:
            query = query * row.growth
        if self.late_norm:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        if self.te_attention is not None:
            out = attend(self.te_attention, query, key, value, bounds=row.bounds, cu_seqlens=row.starts)
            return out.reshape(out.shape[0], 1, -1)
        if row.context is not None:
            assert self.alibi is None, "refused before ranks start"
            out = context_attention(
                query,
                key,
                value,
                context=row.context,
                cu_seqlens=row.bounds,
                starts=row.starts,
                scale=self.scale,
                window=self.window,
                softcap=self.softcap,
                sinks=self.softmax_offset,
                kernels=self.kernels,
            )
            return out.reshape(out.shape[0], 1, -1)
        out = attention(
            query,
            key,
            value,
            bounds=row.bounds,
            cu_seqlens=row.starts,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            alibi=self.alibi,
            sinks=self.softmax_offset,
            kernels=self.kernels,
        )
        return out.reshape(out.shape[0], 1, -1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The sinks as one tensor over all heads. Without this method Megatron assumes that all ranks have the same values."""
        own = {
            name: value
            for name, value in self.state_dict(keep_vars=True).items()
            if not name.startswith("te_attention.")
        }
        return make_sharded_tensors_for_checkpoint(own, prefix, {"softmax_offset": 0}, sharded_offsets)  # type: ignore[no-any-return]


def _mine(alibi: tuple[float, ...] | None) -> Tensor | None:
    """This tensor rank's part of the slopes of all heads."""
    if alibi is None:
        return None
    rank, ranks = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    return torch.tensor(alibi).chunk(ranks)[rank]
