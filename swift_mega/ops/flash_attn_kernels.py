"""flash-attn's kernels, versions 2 and 3, in the call shape of ops/kernel.py. The package is optional."""

import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swift_mega.ops.kernel import Call, Kernel


def installed_flash_attn_3() -> Kernel | None:
    try:
        from flash_attn_interface import _flash_attn_backward, _flash_attn_forward
    except ImportError:
        return None
    # In 2025-11 its two functions became torch operators with the argument names used here. Older versions use other names.
    if not hasattr(torch.ops.flash_attn_3, "_flash_attn_backward"):
        return None
    return flash_attn_3(_flash_attn_forward, _flash_attn_backward)


def flash_attn_3(forward: Callable[..., Any], backward: Callable[..., Any]) -> Kernel:
    """flash-attn 3 (hopper/flash_attn_interface.py), given its `_flash_attn_forward` and `_flash_attn_backward`."""

    def settings(call: Call) -> dict[str, Any]:
        return {
            "cu_seqlens_q": call.starts_q,
            "cu_seqlens_k": call.starts_k,
            "max_seqlen_q": call.longest_q,
            "max_seqlen_k": call.longest_k,
            "softmax_scale": call.scale,
            **call.window(),
            "softcap": call.softcap or 0.0,
        }

    def run(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        out, lse, *_ = forward(q, k, v, causal=call.causal, **settings(call))
        return out, lse

    def differentiate(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = _results(q, k, v)
        deterministic = torch.are_deterministic_algorithms_enabled()
        backward(
            grad,
            q,
            k,
            v,
            out,
            lse,
            dq=dq,
            dk=dk,
            dv=dv,
            is_causal=call.causal,
            deterministic=deterministic,
            **settings(call),
        )
        return dq, dk, dv

    return Kernel("flash-attn 3", run, differentiate, softcap=True)


def installed_flash_attn_2() -> Kernel | None:
    try:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward, _flash_attn_varlen_forward

        version = importlib.metadata.version("flash_attn")
    except ImportError:  # PackageNotFoundError is a subclass
        return None
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 7):  # older versions take the window as a pair
        return None
    return flash_attn_2(_flash_attn_varlen_forward, _flash_attn_varlen_backward, version)


def flash_attn_2(forward: Callable[..., Any], backward: Callable[..., Any], version: str) -> Kernel:
    """flash-attn 2.7 and newer, given its `_flash_attn_varlen_forward` and `_flash_attn_varlen_backward`."""

    def settings(call: Call) -> dict[str, Any]:
        return {
            "cu_seqlens_q": call.starts_q,
            "cu_seqlens_k": call.starts_k,
            "max_seqlen_q": call.longest_q,
            "max_seqlen_k": call.longest_k,
            "dropout_p": 0.0,
            "softmax_scale": call.scale,
            "causal": call.causal,
            **call.window(),
            "softcap": call.softcap or 0.0,
            "alibi_slopes": call.alibi,
        }

    def run(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        out, lse, *_ = forward(q, k, v, **settings(call), return_softmax=False)
        return out, lse

    def differentiate(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = _results(q, k, v)
        deterministic = torch.are_deterministic_algorithms_enabled()
        backward(grad, q, k, v, out, lse, *found, **settings(call), deterministic=deterministic)
        return found

    return Kernel(f"flash-attn {version}", run, differentiate, softcap=True, alibi=True)


def _results(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    return dq, dk, dv
