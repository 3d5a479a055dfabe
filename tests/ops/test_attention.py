"""Attention over a packed row equals one dense masked softmax over all of its tokens in float64, value and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from swift_mega.ops import cpu_attention as module
from swift_mega.ops.alibi import slopes
from swift_mega.ops.attention import attention, attention_by_blocks
from tests.largest import Largest

BOUNDS = [
    (0, 1),
    (0, 5),
    (0, 3, 4, 11, 20),
    (0, module.SHORT),
    (0, 7, 7 + module.SHORT + 1, 180),
    (0, 2 * module.QUERY_BLOCK),
    (0, 1, 2 + 2 * module.QUERY_BLOCK),
]
"""Single tokens, lengths on both sides of the limit where the gradient uses other code, whole blocks of queries, and one more."""
HEADS = [(4, 4), (6, 2), (3, 1)]
"""Plain, grouped and multi-query."""


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: tuple[int, ...],
    scale: float,
    window: int | None,
    softcap: float | None = None,
    alibi: Tensor | None = None,
) -> Tensor:
    """One [heads, tokens, tokens] softmax with all hidden keys masked, and keys repeated per query head."""
    tokens, heads, _ = query.shape
    example, place = torch.empty(tokens, dtype=torch.long), torch.arange(tokens)
    for number, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        example[start:end] = number
    distance = place[:, None] - place[None]
    seen = (example[:, None] == example[None]) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi is not None:
        scores = scores - alibi.double()[:, None, None] * distance
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


def _problem(tokens: int, heads: tuple[int, int], dtype: torch.dtype, size: float = 1.0) -> list[Tensor]:
    """query, key, value, and the gradient of the output."""
    torch.manual_seed(tokens)
    counts = (heads[0], heads[1], heads[1], heads[0])
    return [size * torch.randn(tokens, count, 8, dtype=torch.float64).to(dtype) for count in counts]


def _compare(function: Any, given: list[Tensor], tolerance: float, **settings: Any) -> None:
    *inputs, above = given
    inputs = [x.clone().requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    got, want = (
        function(*inputs, **settings),
        _dense(
            *wide,
            *(settings[name] for name in ("bounds", "scale", "window")),
            settings.get("softcap"),
            settings.get("alibi"),
        ),
    )
    close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    torch.testing.assert_close(got, want, **close)
    assert got.dtype == inputs[0].dtype
    found, expected = torch.autograd.grad(got, inputs, above), torch.autograd.grad(want, wide, above.double())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **close)


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_value_and_gradients_equal_dense_float64(bounds, heads, window):
    given = _problem(bounds[-1], heads, torch.float64)
    _compare(attention, given, 1e-12, bounds=bounds, cu_seqlens=torch.tensor(bounds), scale=0.4, window=window)
    _compare(attention_by_blocks, given, 1e-12, bounds=bounds, scale=0.4, window=window)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("window", [None, 9])
def test_narrow_dtypes_equal_dense_float64(dtype, tolerance, window):
    bounds = (0, 3, 3 + 2 * module.QUERY_BLOCK)
    given = _problem(bounds[-1], (6, 2), dtype)
    _compare(attention, given, tolerance, bounds=bounds, cu_seqlens=torch.tensor(bounds), scale=0.35, window=window)


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_capped_scores_equal_dense_float64(bounds, window):
    """A cap of 1.5 changes most scores here; also in a narrow dtype, whose sums are in float32."""
    settings = {"bounds": bounds, "scale": 0.4, "window": window, "softcap": 1.5}
    given = _problem(bounds[-1], (6, 2), torch.float64)
    _compare(attention, given, 1e-12, cu_seqlens=torch.tensor(bounds), **settings)
    narrow = _problem(bounds[-1], (6, 2), torch.bfloat16)
    _compare(attention, narrow, 5e-2, cu_seqlens=torch.tensor(bounds), **settings)


ALIBI = torch.tensor([0.5, 0.25, 0.7, 0.35, 0.02, 0.1])
"""An ALiBi slope for each of six heads."""


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("heads", [(6, 6), (6, 2)], ids=str)
@pytest.mark.parametrize("window", [None, 4])
def test_linear_biases_equal_dense_float64(bounds, heads, window):
    """With one more feature; also in a narrow dtype, whose precision would be too low for positions."""
    settings = {"bounds": bounds, "scale": 0.4, "window": window, "alibi": ALIBI}
    given = _problem(bounds[-1], heads, torch.float64)
    _compare(attention, given, 1e-11, cu_seqlens=torch.tensor(bounds), **settings)
    narrow = _problem(bounds[-1], heads, torch.bfloat16)
    _compare(attention, narrow, 5e-2, cu_seqlens=torch.tensor(bounds), **settings)


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 71, 112])
def test_slopes_are_transformers(heads):
    """The formulas of BLOOM and of MPT, which are equal."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    found = torch.tensor(slopes(heads))
    bloom = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    mpt = build_mpt_alibi_tensor(heads, 2)[:, 0, 0].neg()
    torch.testing.assert_close(found, bloom, rtol=2e-6, atol=0)
    torch.testing.assert_close(found, mpt, rtol=2e-6, atol=0)


@pytest.mark.parametrize("window", [None, 50])
def test_scores_of_thousands_give_finite_gradients(window):
    """A key that is masked may have a score far above the row's maximum; its weight is zero all the same."""
    bounds = (0, 2 * module.QUERY_BLOCK)
    given = _problem(bounds[-1], (2, 1), torch.float32, size=40.0)
    wide = [x.double() for x in given]
    _compare(attention, wide, 1e-6, bounds=bounds, cu_seqlens=torch.tensor(bounds), scale=1.0, window=window)
    inputs = [x.requires_grad_() for x in given[:3]]
    out = attention(*inputs, bounds=bounds, cu_seqlens=torch.tensor(bounds), scale=1.0, window=window)
    assert all(bool(x.isfinite().all()) for x in torch.autograd.grad(out, inputs, given[3]))


def test_slices_of_a_fused_projection():
    """Megatron passes views of one tensor, and gradients may have any strides."""
    wide = torch.randn(150, 6, 8, dtype=torch.float64, requires_grad=True)
    above = torch.randn(4, 150, 8, dtype=torch.float64).transpose(0, 1)
    parts, settings = (wide[:, :4], wide[:, 4:5], wide[:, 5:]), {"bounds": (0, 150), "scale": 0.3, "window": None}
    (found,) = torch.autograd.grad(attention(*parts, cu_seqlens=torch.tensor([0, 150]), **settings), wide, above)
    (expected,) = torch.autograd.grad(_dense(*parts, **settings), wide, above)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_second_backward_gives_the_same_gradient():
    """No saved tensor is overwritten."""
    for tokens in (module.SHORT, module.SHORT + 50):
        query, key, value, above = _problem(tokens, (4, 2), torch.float32)
        query.requires_grad_()
        out = attention(
            query, key, value, bounds=(0, tokens), cu_seqlens=torch.tensor([0, tokens]), scale=0.3, window=None
        )
        first = torch.autograd.grad(out, query, above, retain_graph=True)
        assert torch.equal(first[0], torch.autograd.grad(out, query, above)[0])


@pytest.mark.parametrize(
    ("dtype", "given"),
    [
        (torch.float32, {"window": 300}),
        (torch.bfloat16, {"window": 300}),
        (torch.bfloat16, {"alibi": ALIBI[:2]}),
        (torch.float32, {"softcap": 1.5}),
    ],
)
def test_no_matrix_of_all_pairs(dtype, given):
    tokens = 2048
    inputs = [torch.randn(tokens, heads, 8).to(dtype).requires_grad_() for heads in (2, 1, 1)]
    with Largest() as largest:
        out = attention(
            *inputs, bounds=(0, tokens), cu_seqlens=torch.tensor([0, tokens]), scale=0.4, **{"window": None, **given}
        )
        out.sum().backward()
    assert largest.numbers < tokens**2 / 4


class _OnCuda(Tensor):
    """A tensor that says it is on CUDA, so that the call for a GPU is made here."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    device = property(lambda self: torch.device("cuda"))  # type: ignore[assignment]
