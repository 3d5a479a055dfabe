"""Attention sinks, a logit without a value in every softmax, against one dense float64 softmax with one more column: value and
gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from swift_mega.ops import cpu_attention as module
from swift_mega.ops.attention import attention, attention_by_blocks

BOUNDS = [(0, 1), (0, 3, 4, 11, 20), (0, module.SHORT), (0, 7, 7 + module.SHORT + 1, 180), (0, 1, 2 + 2 * module.QUERY_BLOCK)]  # fmt: skip
HEADS, KV_HEADS = 6, 2


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    *,
    bounds: tuple[int, ...],
    scale: float,
    window: int | None,
    softcap: float | None = None,
) -> Tensor:
    """Softmax of each query's visible scores and the sink; the sink's weight is dropped."""
    rows = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        for i in range(start, end):
            first = start if window is None else max(start, i - window + 1)
            heads = []
            for head in range(query.shape[1]):
                group = head * key.shape[1] // query.shape[1]
                scores = key[first : i + 1, group] @ query[i, head] * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = torch.cat((scores, sinks[head : head + 1])).softmax(0)[:-1]
                heads.append(weights @ value[first : i + 1, group])
            rows.append(torch.stack(heads))
    return torch.stack(rows)


def problem(tokens: int, dtype: torch.dtype = torch.float64, v_head_dim: int = 8) -> list[Tensor]:
    """query, key, value, sinks, and the gradient of the output."""
    torch.manual_seed(tokens)
    sizes = [
        (tokens, HEADS, 8),
        (tokens, KV_HEADS, 8),
        (tokens, KV_HEADS, v_head_dim),
        (HEADS,),
        (tokens, HEADS, v_head_dim),
    ]
    return [torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes]


def compare(function: Any, given: list[Tensor], tolerance: float, **settings: Any) -> None:
    *inputs, above = given
    inputs = [x.clone().requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    settings.setdefault("scale", 0.4)
    got = function(*inputs[:3], sinks=inputs[3], **settings)
    settings.pop("cu_seqlens", None)
    want = dense(*wide, **settings)
    close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    torch.testing.assert_close(got, want, **close)
    assert got.dtype == inputs[0].dtype
    found, expected = torch.autograd.grad(got, inputs, above), torch.autograd.grad(want, wide, above.double())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **close)


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("window", [None, 4])
def test_value_and_gradients_equal_dense_float64(bounds: tuple[int, ...], window: int | None) -> None:
    given = problem(bounds[-1])
    compare(attention, given, 1e-12, bounds=bounds, cu_seqlens=torch.tensor(bounds), window=window)
    compare(attention_by_blocks, given, 1e-12, bounds=bounds, window=window)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 6e-2)])
def test_narrow_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    bounds = (0, 3, 20)
    compare(attention, problem(20, dtype), tolerance, bounds=bounds, cu_seqlens=torch.tensor(bounds), window=9)


def test_with_capped_scores_and_with_narrow_values() -> None:
    """The cap applies to the scores, not to the sink; values may be narrower than keys."""
    bounds = (0, 3, 20)
    compare(attention, problem(20), 1e-12, bounds=bounds, cu_seqlens=torch.tensor(bounds), window=None, softcap=1.5)
    compare(attention, problem(20, v_head_dim=5), 1e-12, bounds=bounds, cu_seqlens=torch.tensor(bounds), window=4)


def test_sinks_far_from_the_scores_stay_finite() -> None:
    """A sink far below all scores changes nothing, and one far above them takes all weight. Neither overflows."""
    query, key, value, _, above = problem(30, torch.float32)
    settings: dict[str, Any] = dict(bounds=(0, 30), cu_seqlens=torch.tensor([0, 30]), scale=0.4, window=None)
    plain = attention(query, key, value, **settings)
    for level in (-1e4, 1e4):
        inputs = [x.clone().requires_grad_() for x in (query, key, value, torch.full((HEADS,), level))]
        out = attention(*inputs[:3], sinks=inputs[3], **settings)
        torch.testing.assert_close(out, plain if level < 0 else torch.zeros_like(plain))
        assert all(bool(x.isfinite().all()) for x in torch.autograd.grad(out, inputs, above))
