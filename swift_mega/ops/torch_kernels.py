"""torch's own kernels for packed rows, in the call shape of ops/kernel.py: the flash op and the memory-efficient op."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swift_mega.ops.kernel import Call, Kernel


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
        **call.window(),
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
        **call.window(),
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
