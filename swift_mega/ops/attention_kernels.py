"""CUDA attention kernels for packed rows behind one signature, and the choice between them.

Every kernel is a pair of functions. forward returns the output and its log-sum-exp; backward computes the gradients from those two.
Because the log-sum-exp is returned, one autograd function (ops/flash.py) can add sinks, and the parts of a softmax that come from other
ranks can be merged (ops/blocks.py).

| kernel | dtypes | head_dim | soft-cap | ALiBi | grouped keys | needs |
|---|---|---|---|---|---|---|
| flash-attn 3 | bf16, fp16 | to 256 | yes | by features | yes | Hopper, `flash_attn_interface` of 2025-11 or newer |
| flash-attn 2 | bf16, fp16 | to 256 | yes | yes | yes | Ampere or newer, `flash_attn` 2.7 or newer |
| torch flash | bf16, fp16 | to 256 | no | by features | yes | Ampere or newer |
| torch memory-efficient | bf16, fp16, fp32 | any | no | by features | expanded | bf16: Ampere or newer |

`choose` takes the first that fits, from the top. Where none fits: flex_attention for soft-capped scores in bf16 and fp16 (ops/flex.py),
else tiles in torch (ops/blocks.py). float64 always gets tiles. torch's `scaled_dot_product_attention` is not used on CUDA: with one call
per example, cuDNN builds a graph for each new length; with one call per row, it needs a [tokens, tokens] mask.
"""

import functools
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swift_mega.ops import alibi as features
from swift_mega.ops import flex

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Call:
    """The arguments of one kernel call on a packed row.

    Queries and keys of an example are aligned at their ends: query i with key i + keys - queries.
    """

    starts_q: Tensor
    """[examples + 1] int32 on the device: first query of each example, and the end of the last."""
    starts_k: Tensor
    """The same for keys."""
    longest_q: int
    """Queries of the longest example."""
    longest_k: int
    scale: float
    causal: bool
    """A query sees no key after the one it is aligned with."""
    left: int | None
    """A query sees no key more than this many places before the one it is aligned with (None: no limit)."""
    softcap: float | None = None
    alibi: Tensor | None = None
    """[heads] float32 slopes."""
    bounds: Sequence[int] | None = None
    """starts_q on the host. Only set where starts_k is the same."""

    def of_heads(self, heads: slice) -> "Call":
        """The same call for some of the query heads."""
        return self if self.alibi is None else Call(**{**vars(self), "alibi": self.alibi[heads]})


Forward = Callable[[Tensor, Tensor, Tensor, Call], tuple[Tensor, Tensor]]
"""(query, key, value, call) -> out [queries, heads, value_dim] and the log-sum-exp [heads, queries] in float32."""
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Call], tuple[Tensor, Tensor, Tensor]]
"""(gradient of out, query, key, value, out, log-sum-exp, call) -> gradients of query, key and value."""


@dataclass(frozen=True)
class Kernel:
    """A kernel and what it can do beyond causal attention within examples.

    query: [queries, heads, head_dim]; key: [keys, kv_heads, head_dim]; value: [keys, kv_heads, value_dim].
    """

    name: str
    forward: Forward
    backward: Backward
    softcap: bool = False
    alibi: bool = False
    """Takes slopes. For other kernels, positions become features of queries and keys (ops/alibi.py)."""
    value_dim: bool = False
    """Takes values whose head_dim differs from that of the keys. For other kernels the smaller one is padded."""
    blocks: bool = True
    """Takes calls in which keys and queries are different tokens, as ring attention needs."""


@dataclass(frozen=True)
class Choice:
    """What computes attention: a kernel, flex_attention, or tiles in torch (neither field set)."""

    name: str
    """Shown in the header of a run."""
    kernel: Kernel | None = None
    flex: bool = False


def choose(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    softcap: bool = False,
    alibi: bool = False,
    sinks: bool = False,
    longest: int = 0,
) -> Choice:
    """What computes attention on this CUDA device. head_dim: of queries and keys.

    longest: tokens of the longest example. It limits ALiBi as features.
    """
    for kernel in _kernels(_capability(device), dtype, torch.are_deterministic_algorithms_enabled()):
        own = alibi and not kernel.alibi
        wide = head_dim + (features.FEATURES if own else 0)
        if (softcap and not kernel.softcap) or (kernel.name != EFFICIENT and wide > 256):
            continue
        if own and longest > features.LONGEST.get(dtype, longest):
            continue
        return Choice(kernel.name + (", ALiBi as features" if own else ""), kernel)
    if softcap and not sinks and dtype in HALF:
        refused = flex.refusal(device, dtype, head_dim)
        if refused is None:
            return Choice("flex_attention", flex=True)
        return Choice(f"tiles in torch ({refused})")
    return Choice("tiles in torch")


def kernel_for_blocks(device: torch.device, dtype: torch.dtype, head_dim: int, *, softcap: bool) -> Kernel | None:
    """The kernel for attention to parts of the keys on this CUDA device (ops/blocks.py). None: tiles in torch."""
    kernel = choose(device, dtype, head_dim, softcap=softcap, sinks=True).kernel
    return kernel if kernel is not None and kernel.blocks else None


def attention_kernel_name(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    softcap: bool = False,
    alibi: bool = False,
    sinks: bool = False,
) -> str:
    """What computes attention in such a layer, in words for the header of a run, for example "torch flash"."""
    if device.type == "cuda":
        return choose(device, dtype, head_dim, softcap=softcap, alibi=alibi, sinks=sinks).name
    if softcap or (dtype in HALF and sinks):
        return "tiles in torch"
    return "torch's CPU kernel" + ("" if dtype in HALF else ", gradient by blocks of queries")


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Compute capability. Without a GPU, where only shapes are traced: that of Hopper."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (9, 0)


@functools.cache
def _kernels(capability: tuple[int, int], dtype: torch.dtype, deterministic: bool) -> tuple[Kernel, ...]:
    """The available kernels for a dtype, best first."""
    found: list[Kernel | None] = []
    if dtype in HALF and capability >= (8, 0):
        # flash-attn 3 has a deterministic gradient only up to head_dim 192, so deterministic runs use other kernels.
        if capability[0] == 9 and not deterministic:
            found.append(_installed_flash_attn_3())
        found += [_installed_flash_attn_2(), TORCH_FLASH]
    if dtype in (*HALF, torch.float32) and (dtype != torch.bfloat16 or capability >= (8, 0)):
        found.append(TORCH_EFFICIENT)
    return tuple(kernel for kernel in found if kernel is not None)


# ------------------------------------------------------------------------------------------------ flash-attn


def _installed_flash_attn_3() -> Kernel | None:
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
            **_window(call),
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


def _installed_flash_attn_2() -> Kernel | None:
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
            **_window(call),
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


def _window(call: Call) -> dict[str, int]:
    """The window of all three flash kernels: how many keys a query sees before and after the one it is aligned with; -1: all."""
    return {
        "window_size_left": -1 if call.left is None else call.left,
        "window_size_right": 0 if call.causal and call.left is not None else -1,
    }


def _results(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    return dq, dk, dv


# ------------------------------------------------------------------------------------------------ torch


def _torch_flash_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        call.starts_q,
        call.starts_k,
        call.longest_q,
        call.longest_k,
        0.0,
        call.causal,
        False,
        scale=call.scale,
        **_window(call),
    )
    return out, lse


def _torch_flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Deterministic under torch.use_deterministic_algorithms(True), which torch's op checks itself."""
    # The random state is read only with dropout.
    state, unused = (q.new_empty(size, dtype=torch.uint64) for size in (2, ()))
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad,
        q,
        k,
        v,
        out,
        lse,
        call.starts_q,
        call.starts_k,
        call.longest_q,
        call.longest_k,
        0.0,
        call.causal,
        state,
        unused,
        scale=call.scale,
        **_window(call),
    )
    return dq, dk, dv


TORCH_FLASH = Kernel("torch flash", _torch_flash_forward, _torch_flash_backward)

EFFICIENT = "torch memory-efficient"
CAUSAL_FROM_TOP_LEFT = 1  # CustomMaskType in torch's sdp_utils_cpp.h
LSE_WASTE = 4
"""Upper limit of numbers in a padded log-sum-exp per number that is needed."""


def efficient_runs(bounds: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first example, end) of each call of the memory-efficient kernel.

    Its log-sum-exp is [examples, heads, longest]. One example of 32k tokens beside 1,000 short ones would make that 500 times the row.
    """
    first, longest = 0, 0
    for number in range(len(bounds) - 1):
        longer = max(longest, bounds[number + 1] - bounds[number])
        if number > first and longer * (number + 1 - first) > LSE_WASTE * (bounds[number + 1] - bounds[first]):
            yield first, number
            first, longer = number, bounds[number + 1] - bounds[number]
        longest = longer
    yield first, len(bounds) - 1


@dataclass(frozen=True)
class _Run:
    """One call of the memory-efficient kernel: its tokens and its arguments."""

    tokens: slice
    starts: Tensor
    longest: int
    options: dict[str, Any]

    def places(self) -> tuple[Tensor, Tensor]:
        """The example of each token, and its place in that example, as [tokens] int64. They index the padded log-sum-exp."""
        token = torch.arange(self.tokens.stop - self.tokens.start, device=self.starts.device)
        example = torch.bucketize(token, self.starts[1:], right=True)
        return example, token - self.starts[example]


def _runs(call: Call) -> Iterator[_Run]:
    assert call.causal and call.softcap is None and call.alibi is None and call.bounds is not None
    bounds = call.bounds
    options: dict[str, Any] = {"scale": call.scale}
    if call.left is not None:  # the window of this kernel includes the query's own key
        options["window_size"] = call.left + 1
    for first, last in efficient_runs(bounds):
        starts = call.starts_q[first : last + 1] - bounds[first]
        longest = max(bounds[example + 1] - bounds[example] for example in range(first, last))
        yield _Run(slice(bounds[first], bounds[last]), starts, longest, options)


def _batched(x: Tensor, tokens: slice, copies: int) -> Tensor:
    """[1, tokens, heads, dim]. Key heads are repeated `copies` times, because the kernel wants as many as query heads."""
    x = x[tokens]
    return (x if copies == 1 else x.repeat_interleave(copies, dim=1))[None]


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    copies, outs, lses = q.shape[1] // k.shape[1], [], []
    for run in _runs(call):
        out, lse, *_ = torch.ops.aten._efficient_attention_forward(
            q[run.tokens][None],
            _batched(k, run.tokens, copies),
            _batched(v, run.tokens, copies),
            None,
            run.starts,
            run.starts,
            run.longest,
            run.longest,
            0.0,
            CAUSAL_FROM_TOP_LEFT,
            True,
            **run.options,
        )
        example, place = run.places()
        outs.append(out[0])
        lses.append(lse[example, :, place].t())
    if len(outs) == 1:
        return outs[0], lses[0]
    return torch.cat(outs), torch.cat(lses, 1)


def _efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Deterministic under torch.use_deterministic_algorithms(True): torch then uses one split of the keys."""
    copies, found = q.shape[1] // k.shape[1], []
    unused = q.new_empty((), dtype=torch.long)  # the random state, read only with dropout
    for run in _runs(call):
        example, place = run.places()
        # Padding is +inf, as the forward kernel leaves it, so that its weights are 0.
        padded = lse.new_full((len(run.starts) - 1, q.shape[1], -(-run.longest // 32) * 32), torch.inf)
        padded[example, :, place] = lse[:, run.tokens].t()
        dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
            grad[run.tokens][None],
            q[run.tokens][None],
            _batched(k, run.tokens, copies),
            _batched(v, run.tokens, copies),
            None,
            out[run.tokens][None],
            run.starts,
            run.starts,
            run.longest,
            run.longest,
            padded,
            0.0,
            unused,
            unused,
            CAUSAL_FROM_TOP_LEFT,
            False,
            **run.options,
        )
        found.append((dq[0], _summed(dk[0], copies), _summed(dv[0], copies)))
    if len(found) == 1:
        return found[0]
    dq, dk, dv = (torch.cat(parts) for parts in zip(*found, strict=True))
    return dq, dk, dv


def _summed(x: Tensor, copies: int) -> Tensor:
    """[tokens, kv_heads * copies, dim] -> [tokens, kv_heads, dim]: sums the gradients of repeated key heads."""
    return x if copies == 1 else x.unflatten(1, (-1, copies)).sum(2)


TORCH_EFFICIENT = Kernel(EFFICIENT, _efficient_forward, _efficient_backward, value_dim=True, blocks=False)
