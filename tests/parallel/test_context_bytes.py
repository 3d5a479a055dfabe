"""The bytes that context ranks send, counted where torch passes them to the process group, against the formulas in the modules'
docstrings."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from swift_mega.parallel.context import context_attention, make_context
from swift_mega.parallel.mesh import Mesh

TOKENS, HEADS, KV_HEADS, DIM, VALUE_DIM = 24, 8, 4, 6, 4  # tokens: of one rank


class Sent(TorchDispatchMode):
    """Counts the bytes that this rank sends to others, by c10d operator."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            self.bytes[name] += self._size(name, args)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _size(name: str, args: Any) -> int:
        if name == "send":
            return sum(x.nbytes for x in args[0])
        if name == "recv_":
            return 0
        result, given, group = args[0], args[1], args[2]
        ranks = dist.ProcessGroup.unbox(group).size()
        if name == "alltoall_base_":
            return int(given.nbytes * (ranks - 1) // ranks)
        if name == "_allgather_base_":
            return int(given.nbytes * (ranks - 1))
        assert name == "_reduce_scatter_base_", f"{name} is hidden traffic"
        return int(result.nbytes * (ranks - 1))


def _measured(mesh: Mesh, dtype: torch.dtype, window: int | None = None) -> tuple[dict[str, int], dict[str, int]]:
    context = make_context([list(range(mesh.size))], mesh)
    torch.manual_seed(dist.get_rank())
    given = [
        torch.randn(TOKENS, n, d, dtype=dtype, requires_grad=True)
        for n, d in ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM))
    ]
    with Sent() as forward:
        row = (0, TOKENS * mesh.size)
        starts = torch.tensor(row, dtype=torch.int32)
        out: Tensor = context_attention(
            *given, context=context, cu_seqlens=row, starts=starts, scale=0.4, window=window
        )
    with Sent() as backward:
        out.backward(torch.ones_like(out))
    return dict(forward.bytes), dict(backward.bytes)


def expected(mesh: Mesh, dtype: torch.dtype, steps: int | None = None) -> tuple[dict[str, int], dict[str, int]]:
    """Per rank. steps: the ring steps, where they are fewer than its size.

    After the Ulysses exchange a rank has u times the tokens and 1 / u of the heads, so the same number of values.
    """
    size = dtype.itemsize
    keys, ring, inner = TOKENS * KV_HEADS * (DIM + VALUE_DIM), mesh.ring, mesh.ulysses
    exchanged = TOKENS * HEADS * (DIM + VALUE_DIM) + keys
    forward, backward = Counter[str](), Counter[str]()
    if inner > 1:
        forward["alltoall_base_"] = backward["alltoall_base_"] = exchanged * size * (inner - 1) // inner
    if mesh.gather:
        forward["_allgather_base_"] = backward["_allgather_base_"] = (ring - 1) * keys * size
        backward["_reduce_scatter_base_"] = (ring - 1) * keys * 4
    elif ring > 1:
        steps = steps or ring
        forward["send"] = (steps - 1) * keys * size
        # dK and dV in float32, with one more step back to their rank.
        backward["send"] = (steps - 1) * keys * size + steps * keys * 4
    return dict(forward), dict(backward)


def sent(ranks: Any, mesh: Mesh, dtype: torch.dtype, window: int | None = None) -> tuple[dict[str, int], ...]:
    """By operator, forward and backward, of one rank."""
    found = ranks(mesh.size, _measured, mesh, dtype, window)
    return tuple({name: size for name, size in measured.items() if size} for measured in found)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("mesh", (Mesh(2, 1), Mesh(1, 2), Mesh(1, 4), Mesh(2, 2), Mesh(1, 4, gather=True)), ids=str)
def test_no_byte_is_sent_that_the_formula_does_not_have(ranks, mesh, dtype):
    assert sent(ranks, mesh, dtype) == expected(mesh, dtype)


def test_a_window_passes_over_the_keys_that_nobody_sees(ranks):
    """In a ring of 4, the chunk before a rank's own is on the rank 1 or 3 steps before; no query sees the keys 2 steps before."""
    found = sent(ranks, Mesh(1, 4), torch.float32, window=TOKENS // 2)
    assert found == expected(Mesh(1, 4), torch.float32, steps=3)
