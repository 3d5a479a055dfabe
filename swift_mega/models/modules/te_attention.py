"""Transformer Engine's own attention over context ranks, in place of ours (parallel/context.py): `parallel.cp=te:...`, on CUDA.

It splits every example over the ranks on its own, so every example is padded (data/pack.py). Padding is not declared to Transformer
Engine: it counts as more tokens at the end of the example, and causal attention hides it from real tokens. With declared padding
Transformer Engine would have fewer kernels to choose from.
"""

import copy
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from swift_mega.device.backends import transformer_engine
from swift_mega.device.device import Device
from swift_mega.errors import UserError
from swift_mega.parallel.mesh import Mesh

SINCE = {"p2p": (2, 0), "a2a": (2, 11), "all_gather": (2, 18), "a2a+p2p": (2, 19)}
"""Per communication type: the first Transformer Engine that takes rows of many examples, and windows if it supports windows at all."""


def check_te_runs(mesh: Mesh, device: Device, dtype: torch.dtype) -> None:
    """UserError where this machine cannot run what `mesh` asks of Transformer Engine. dtype: of the model."""
    if not mesh.te:
        return
    asked, ours = f"parallel.cp={mesh.name}", "parallel.cp=auto does the same on any device"
    if device.kind != "cuda":
        raise UserError(
            f"{asked} needs CUDA and Transformer Engine, and ranks run on the {device.kind.upper()} here; {ours}"
        )
    te = transformer_engine()
    if te.version is None:
        raise UserError(f"{asked} needs Transformer Engine, which {te.problem}; {ours}")
    since = SINCE[mesh.communication]
    if tuple(int(number) for number in te.version.split(".")[:2]) < since:
        raise UserError(
            f"{asked} needs Transformer Engine {since[0]}.{since[1]} for rows of many examples, and {te.version} is installed; upgrade it, "
            f"or choose another way: {ours}"
        )
    if not device.uses_transformer_engine(dtype):
        name = str(dtype).removeprefix("torch.")
        raise UserError(
            f"{asked} computes in bfloat16 or float16, and the model is in {name}; set model.dtype=bfloat16, or choose another way: {ours}"
        )


def make_te_attention(
    attention: Any,
    config: TransformerConfig,
    layer_number: int,
    *,
    communication: str,
    scale: float,
    window: int | None,
) -> torch.nn.Module:
    """A layer's Transformer Engine attention. attention: TEDotProductAttention; window: tokens that a token attends to, itself included."""
    # Megatron's window fields are for the whole model, with a pattern over layers; the copy has this layer's window.
    mine = copy.copy(config)
    mine.window_size, mine.window_attn_skip_freq = None if window is None else (window - 1, 0), None
    return attention(  # type: ignore[no-any-return]
        config=mine,
        layer_number=layer_number,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        attention_dropout=0.0,
        softmax_scale=scale,
        cp_comm_type=communication,
    )


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *, bounds: tuple[int, ...], cu_seqlens: Tensor
) -> Tensor:
    """query [tokens, heads, head_dim], key and value [tokens, kv_heads, head_dim] of this rank -> [tokens, heads * head_dim]. Collective.

    bounds: start of each example and the end of the last one, in the whole row, on the host; cu_seqlens: the same as int32 on the device.
    """
    longest = max(stop - start for start, stop in zip(bounds, bounds[1:], strict=False))
    # One tensor object four times: newer versions see by its identity that there is no padding, without reading its values.
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    query, key, value = (x.contiguous() for x in (query, key, value))
    return module(query, key, value, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=packed)  # type: ignore[no-any-return]
