"""Megatron's core attention, replaced: positions are data, and a row holds many examples.

Megatron hands un-rotated queries and keys to `core_attention`; what lies in the row (where examples start, cosine and sine of
every token) travels with them in `Segments`, through pipeline, recomputation and both Megatron ends alike. So rotary
frequencies are computed once per microbatch, and Megatron's own packed RoPE and its [s, s] mask are never entered.
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
from swift_mega.models.modules.engine import attend, engine_attention
from swift_mega.models.modules.norm import Norm
from swift_mega.models.settings import Rope, Settings
from swift_mega.ops.attention import attention, attention_kernel_name
from swift_mega.ops.rope import rotate, tables
from swift_mega.parallel.context import Context, context_attention
from swift_mega.parallel.sequence import held_tokens


@dataclass
class Segments(PackedSeqParams):
    """What lies in a row of tokens. `qkv_format` stays "sbhd", so that Megatron leaves the row [tokens, 1, ...] alone."""

    qkv_format: str = "sbhd"
    bounds: tuple[int, ...] = ()
    """First token of each example, and the end of the last one; on the host."""
    starts: Tensor = None  # type: ignore[assignment]  # the parent's fields have defaults, so these must; it is never left out
    """The same as int32 on the device: cu_seqlens."""
    turns: tuple[tuple[Tensor, Tensor], ...] = ()
    """Cosine and sine, [tokens, 1, rotary_dim / 2] each, of every different rotation of the model."""
    growth: Tensor | None = None
    """[tokens, 1, 1]: factor on the queries of each token."""
    context: Context | None = None
    """The ranks that hold the other tokens of the row, of which `bounds` and `starts` speak; None: all are here."""


def segments(
    settings: Settings, positions: Tensor, cu_seqlens: Tensor, dtype: torch.dtype, context: Context | None = None
) -> Segments:
    """What lies in a row of tokens at `positions` [tokens]; cu_seqlens: [examples + 1] int32 on the host.

    context: the ranks that share the row; positions are then those of this rank's tokens, cu_seqlens is of the whole row.

    An example's frequencies follow from its own length, not from the longest of its row: those that it has alone.
    """
    turns = tuple(
        tables(positions, _frequencies(rope, cu_seqlens, context, positions.device), rope.scale, dtype)
        for rope in settings.distinct_ropes
    )
    growth = None
    if settings.scales.query_growth is not None:
        slope, length = settings.scales.query_growth
        growth = (1 + slope * (1 + (positions / length).floor()).log()).to(dtype)[:, None, None]
    return Segments(
        bounds=tuple(cu_seqlens.tolist()),
        starts=send(cu_seqlens.to(torch.int32), positions.device),
        turns=turns,
        growth=growth,
        context=context,
    )


@functools.lru_cache(maxsize=64)
def _on_device(frequencies: tuple[float, ...], device: torch.device) -> Tensor:
    """[rotary_dim / 2], copied once and not for every microbatch; a model has few different rotations."""
    return torch.tensor(frequencies, device=device)


def _frequencies(rope: Rope, cu_seqlens: Tensor, context: Context | None, device: torch.device) -> Tensor:
    """[rotary_dim / 2] for all tokens, or [tokens, 1, rotary_dim / 2]."""
    usual = _on_device(rope.inverse_frequencies, device)
    if rope.long is None:
        return usual
    lengths = cu_seqlens.diff()
    in_long = (lengths > rope.long_beyond).repeat_interleave(lengths)
    if context is not None:
        in_long = in_long[held_tokens(cu_seqlens.tolist(), context.mesh, context.rank)]
    return torch.where(send(in_long, device)[:, None, None], _on_device(rope.long, device), usual)


class CoreAttention(MegatronModule):
    """Attention within each example of a row, after rotating queries and keys by their positions."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        settings: Settings,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        engine: Any = None,
        **given: Any,
    ) -> None:
        """`layer_number` counts from 1 over the whole model; `given` is what Megatron passes to any core attention.

        cp_comm_type: how context ranks meet where Transformer Engine does it; engine: then its attention, TEDotProductAttention.
        """
        super().__init__(config=config)
        rope = settings.ropes[layer_number - 1]
        self.turn = None if rope is None else settings.distinct_ropes.index(rope)
        self.interleaved = rope is not None and rope.interleaved
        self.window = settings.windows[layer_number - 1]
        self.clip = settings.scales.clip
        self.softcap = settings.scales.attention_softcap
        self.alibi: Tensor | None
        self.register_buffer("alibi", _mine(settings.alibi), persistent=False)
        self.scale = softmax_scale or config.kv_channels**-0.5
        if settings.scales.attention_by_layer:
            self.scale /= layer_number
        self.late_norm = settings.late_qk_norm
        if self.late_norm:  # named like Megatron's own, whose gradients it sums over tensor ranks by these names
            self.q_layernorm = Norm(config, config.kv_channels, config.layernorm_epsilon, kind=settings.norm)
            self.k_layernorm = Norm(config, config.kv_channels, config.layernorm_epsilon, kind=settings.norm)
        self.softmax_offset = None  # Megatron's name for attention sinks
        if settings.sinks:
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            self.softmax_offset = torch.nn.Parameter(torch.empty(heads, dtype=config.params_dtype))
        self.engine = None
        if cp_comm_type is not None:
            assert engine is not None, "refused before ranks start"
            self.engine = engine_attention(
                engine, config, layer_number, communication=cp_comm_type, scale=self.scale, window=self.window
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
        if self.turn is not None:
            cos, sin = row.turns[self.turn]
            query, key = (rotate(x, cos, sin, self.interleaved) for x in (query, key))
            value = value.clone(
                memory_format=torch.contiguous_format
            )  # or it, kept for the gradient, holds on to all of linear_qkv's output
        if row.growth is not None:
            query = query * row.growth
        if self.late_norm:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        if self.engine is not None:
            out = attend(self.engine, query, key, value, bounds=row.bounds, cu_seqlens=row.starts)
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
        )
        return out.reshape(out.shape[0], 1, -1)

    def kernel(self, device: torch.device) -> str:
        """What attends in this layer on a device, in words; not where Transformer Engine does."""
        config = self.config
        latent = config.multi_latent_attention
        head_dim = config.qk_head_dim + config.qk_pos_emb_head_dim if latent else config.kv_channels
        return attention_kernel_name(
            device,
            config.params_dtype,
            head_dim,
            softcap=self.softcap is not None,
            alibi=self.alibi is not None,
            sinks=self.softmax_offset is not None,
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The sinks as one tensor of all heads; a Megatron module without its own says that ranks hold the same."""
        own = {name: value for name, value in self.state_dict(keep_vars=True).items() if not name.startswith("engine.")}
        return make_sharded_tensors_for_checkpoint(own, prefix, {"softmax_offset": 0}, sharded_offsets)  # type: ignore[no-any-return]


def _mine(alibi: tuple[float, ...] | None) -> Tensor | None:
    """This tensor rank's share of the slopes of all heads."""
    if alibi is None:
        return None
    rank, ranks = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    return torch.tensor(alibi).chunk(ranks)[rank]
