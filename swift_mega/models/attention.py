"""Megatron's core attention, replaced: positions are data, and a row holds many examples.

Megatron hands un-rotated queries and keys to `core_attention`; what lies in the row (where examples start, cosine and sine of
every token) travels with them in `Segments`, through pipeline, recomputation and both Megatron ends alike. So rotary
frequencies are computed once per microbatch, and Megatron's own packed RoPE and its [s, s] mask are never entered.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from swift_mega.models.family import Settings
from swift_mega.ops.attention import attention
from swift_mega.ops.rope import rotate


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


class CoreAttention(MegatronModule):
    """Attention within each example of a row, after rotating queries and keys by their positions."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, *, settings: Settings, softmax_scale: float | None = None, **given: Any
    ) -> None:  # fmt: skip
        """`layer_number` counts from 1 over the whole model; `given` is what Megatron passes to any core attention."""
        super().__init__(config=config)
        rope = settings.ropes[layer_number - 1]
        self.turn = None if rope is None else settings.distinct_ropes.index(rope)
        self.interleaved = rope is not None and rope.interleaved
        self.window = settings.windows[layer_number - 1]
        self.clip = settings.scales.clip
        self.softcap = settings.scales.attention_softcap
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.softmax_offset = None  # Megatron's name for attention sinks
        if settings.sinks:
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            self.softmax_offset = torch.nn.Parameter(torch.empty(heads, dtype=config.params_dtype))

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *,
        packed_seq_params: Segments, **given: Any,
    ) -> Tensor:  # fmt: skip
        """query [tokens, 1, heads, head_dim], key and value [tokens, 1, kv_heads, head_dim] -> [tokens, 1, heads * head_dim]."""
        row = packed_seq_params
        query, key, value = query[:, 0], key[:, 0], value[:, 0]
        if self.clip is not None:
            query, key, value = (x.clamp(-self.clip, self.clip) for x in (query, key, value))
        if self.turn is not None:
            cos, sin = row.turns[self.turn]
            query, key = (rotate(x, cos, sin, self.interleaved) for x in (query, key))
        out = attention(
            query, key, value, bounds=row.bounds, cu_seqlens=row.starts, scale=self.scale, window=self.window,
            softcap=self.softcap, sinks=self.softmax_offset,
        )  # fmt: skip
        return out.reshape(out.shape[0], 1, -1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The sinks as one tensor of all heads; a Megatron module without its own says that ranks hold the same."""
        own = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(own, prefix, {"softmax_offset": 0}, sharded_offsets)  # type: ignore[no-any-return]
