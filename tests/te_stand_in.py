"""A stand-in for Megatron's TEDotProductAttention: what Transformer Engine computes over context ranks, written as a definition, over
gloo.

Examples are split here after Transformer Engine's own documentation (attn_forward_func_with_cp, "thd"): each sequence is divided into 2 *
cp chunks. Rank p has chunks p and 2 * cp - 1 - p of every sequence.
"""

import inspect
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor


def local(starts: list[int], ranks: int) -> list[list[int]]:
    """The indices in the row of each rank's tokens, in the rank's order, token by token."""
    found: list[list[int]] = [[] for _ in range(ranks)]
    for start, stop in zip(starts, starts[1:], strict=False):
        assert (stop - start) % (2 * ranks) == 0, "Transformer Engine cuts an example in 2 * cp chunks of one size"
        chunk = (stop - start) // (2 * ranks)
        for place in range(start, stop):
            number = (place - start) // chunk
            found[number if number < ranks else 2 * ranks - 1 - number].append(place)
    return found


class StandIn(torch.nn.Module):
    """Its parameters and their defaults are those of TEDotProductAttention."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        num_splits: int | None = None,
        cp_comm_type: str | None = "p2p",
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal and attention_type == "self" and attention_dropout == 0
        assert k_channels is v_channels is num_splits is None, "a head's size is the config's kv_channels"
        assert pg_collection is None, "groups are those of Megatron's parallel state"
        assert config.cp_comm_type == cp_comm_type and layer_number >= 1 and softmax_scale is not None
        self.scale, self.ranks = softmax_scale, config.context_parallel_size
        self.window = None if config.window_size is None else config.window_size[0] + 1
        if self.window is not None:
            assert config.window_size[1] == 0 and config.window_attn_skip_freq is None
            assert cp_comm_type in ("a2a", "all_gather"), "Transformer Engine's assertion"
        if cp_comm_type == "a2a+p2p":
            inner, outer = parallel_state.get_hierarchical_context_parallel_groups()
            mine = dist.get_process_group_ranks(parallel_state.get_context_parallel_group())
            assert inner.size() * outer.size() == self.ranks
            assert (
                dist.get_process_group_ranks(inner) == sorted(dist.get_process_group_ranks(inner))
                and dist.get_rank() in mine
            )
            place = mine.index(dist.get_rank())
            first = place - place % inner.size()
            assert dist.get_process_group_ranks(inner) == mine[first : first + inner.size()]

    def get_extra_state(self) -> Tensor:
        """Transformer Engine's modules have an extra state; it must not get into checkpoints."""
        return torch.zeros(1)

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError("nothing is to be read into this")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        num_splits: int | None = None,
    ) -> Tensor:
        """[tokens, heads, dim] each, of this rank -> [tokens, heads * dim]."""
        assert attention_mask is attention_bias is num_splits is None and attn_mask_type == AttnMaskType.causal
        row = packed_seq_params
        assert row is not None and row.qkv_format == "thd"
        starts = row.cu_seqlens_q
        assert row.cu_seqlens_kv is row.cu_seqlens_q_padded is row.cu_seqlens_kv_padded is starts, "one tensor"
        assert starts.dtype == torch.int32
        assert row.max_seqlen_q == row.max_seqlen_kv == int(starts.diff().max())
        assert all(x.is_contiguous() and x.ndim == 3 for x in (query, key, value))
        assert len(query) == len(key) == len(value) == int(starts[-1]) // self.ranks
        group = parallel_state.get_context_parallel_group()
        places = local(starts.tolist(), self.ranks)
        order = torch.tensor([place for rank in places for place in rank]).argsort()
        query, key, value = (_Gathered.apply(x, group)[order] for x in (query, key, value))
        out = attention(query, key, value, starts.tolist(), self.scale, self.window)
        return out[torch.tensor(places[group.rank()])].flatten(1)


def attention(query: Tensor, key: Tensor, value: Tensor, starts: list[int], scale: float, window: int | None) -> Tensor:
    """One softmax over all keys, by the definition."""
    tokens, group = len(query), query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    place = torch.arange(tokens)
    example = torch.bucketize(place, torch.tensor(starts[1:-1]), right=True)
    distance = place[:, None] - place[None]
    seen = (example[:, None] == example[None]) & (distance >= 0) & (distance < (window or tokens))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        found = x.new_empty(group.size() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(found, x, group=group)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total.chunk(ctx.group.size())[ctx.group.rank()], None


def parameters(function: Any) -> list[tuple[str, Any]]:
    """Names and defaults, for a comparison with those of the original."""
    return [(name, each.default) for name, each in inspect.signature(function).parameters.items()]
