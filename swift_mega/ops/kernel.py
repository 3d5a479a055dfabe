"""One call shape for all attention kernels on CUDA: what a kernel is told of a packed row (`Call`), and what it can do (`Kernel`)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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

    def window(self) -> dict[str, int]:
        """What the flash kernels, all three, are told of it: keys seen before and after the aligned one; -1: all."""
        return {
            "window_size_left": -1 if self.left is None else self.left,
            "window_size_right": 0 if self.causal and self.left is not None else -1,
        }

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
