"""Attention over the context axis against one rank's softmax over all keys, in float64."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from swift_mega.parallel.context import context_attention, make_context
from swift_mega.parallel.mesh import Mesh
from swift_mega.parallel.sequence import pieces

HEADS = {"8/8": (8, 8, 8, 8), "8/2": (8, 2, 8, 8), "9/3": (9, 3, 8, 8), "mqa": (8, 1, 8, 8), "mla": (8, 8, 12, 8)}
KINDS = {
    "full": {},
    "window": {"window": 11},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "all": {"causal": False},
}
ROWS = {"dense": (0, 96), "packed": (0, 5, 6, 41, 70, 96)}


def whole(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, cu: tuple[int, ...], kind: dict) -> Tensor:
    """One softmax over all keys, by the definition."""
    tokens, group = len(q), q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    if "softcap" in kind:
        scores = kind["softcap"] * torch.tanh(scores / kind["softcap"])
    position = torch.arange(tokens)
    example = torch.bucketize(position, torch.tensor(cu[1:-1]), right=True)
    distance = position[:, None] - position[None]
    seen = example[:, None] == example[None]
    if kind.get("causal", True):
        seen &= distance >= 0
    if "window" in kind:
        seen &= distance < kind["window"]
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(-1, tokens, 1)), -1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :tokens], v)


def _differences(ulysses: int, ring: int, gather: bool, dtype: torch.dtype, shapes: list[str]) -> dict[str, float]:
    """The largest difference of output and gradients from one rank's, by case, over all ranks."""
    mesh, rank = Mesh(ulysses, ring, gather), dist.get_rank()
    context, found = make_context([list(range(mesh.size))], mesh), {}
    for shape in shapes:
        heads, kv_heads, dim, value_dim = HEADS[shape]
        if heads % ulysses:
            continue
        for row, cu in ROWS.items():
            for name, kind in KINDS.items():
                torch.manual_seed(0)
                q = torch.randn(cu[-1], heads, dim, dtype=torch.float64)
                k = torch.randn(cu[-1], kv_heads, dim, dtype=torch.float64)
                v = torch.randn(cu[-1], kv_heads, value_dim, dtype=torch.float64)
                sinks = torch.randn(heads, dtype=torch.float64) if "sinks" in kind else None
                grad = torch.randn(cu[-1], heads, value_dim, dtype=torch.float64)
                given = [x for x in (q, k, v, sinks) if x is not None]
                for x in given:
                    x.requires_grad_()
                expected = whole(q, k, v, sinks, cu, kind)
                wanted = [expected, *torch.autograd.grad(expected, given, grad)]

                mine = [x.detach().to(dtype).requires_grad_() for x in given]
                held = [torch.cat([x[begin:end] for begin, end in pieces(cu, mesh, rank)]) for x in mine[:3]]
                options = {key: value for key, value in kind.items() if key != "sinks"}
                out = context_attention(
                    *held,
                    context=context,
                    cu_seqlens=cu,
                    starts=torch.tensor(cu, dtype=torch.int32),
                    scale=dim**-0.5,
                    sinks=mine[3] if sinks is not None else None,
                    **options,
                )
                gradients = torch.autograd.grad(
                    out, mine, torch.cat([grad[begin:end] for begin, end in pieces(cu, mesh, rank)]).to(dtype)
                )
                together = [torch.zeros_like(expected, dtype=dtype)]
                at = 0
                for begin, end in pieces(cu, mesh, rank):
                    together[0][begin:end] = out.detach()[at : at + end - begin]
                    at += end - begin
                together += [x.clone() for x in gradients]
                for x in together:
                    dist.all_reduce(x)
                found[f"{shape} {row} {name}"] = max(
                    float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(together, wanted, strict=True)
                )
    return found


LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}


MESHES = (
    (2, 1, False), (1, 2, False), (4, 1, False), (1, 4, False), (2, 2, False), (1, 2, True), (1, 4, True), (2, 2, True),
)  # fmt: skip
BY_DEFAULT = [(*mesh, dtype) for dtype in LIMITS for mesh in MESHES if dtype == torch.float64 or mesh[0] * mesh[1] == 2]
"""Every mesh in float64, where rounding cannot hide a fault; other dtypes on two ranks, because they use the same code."""
IN_FULL = [(*mesh, dtype) for dtype in LIMITS for mesh in MESHES if (*mesh, dtype) not in BY_DEFAULT]


@pytest.mark.parametrize(
    ("ulysses", "ring", "gather", "dtype"),
    [*BY_DEFAULT, *(pytest.param(*case, marks=pytest.mark.full) for case in IN_FULL)],
    ids=str,
)
def test_every_mesh_computes_what_one_rank_does(ranks, ulysses, ring, gather, dtype):
    found = ranks(ulysses * ring, _differences, ulysses, ring, gather, dtype, list(HEADS))
    assert len(found) >= 40
    assert {case: value for case, value in found.items() if value > LIMITS[dtype]} == {}


def test_eight_ranks_as_a_mesh(ranks):
    found = ranks(8, _differences, 4, 2, False, torch.float64, ["8/2"])
    assert len(found) == 10 and max(found.values()) < 1e-10
