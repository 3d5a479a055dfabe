"""A logit without a value in every softmax: one dense float64 softmax with one more column, value and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from swift_mega.ops import attention as module
from swift_mega.ops import flash as flash_module
from swift_mega.ops.attention import attention, attention_reference
from swift_mega.ops.flash import flash

BOUNDS = [(0, 1), (0, 3, 4, 11, 20), (0, module.SHORT), (0, 7, 7 + module.SHORT + 1, 180), (0, 1, 2 + 2 * module.QUERY_BLOCK)]  # fmt: skip
HEADS, KV_HEADS = 6, 2


def dense(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, *, bounds: tuple[int, ...], scale: float, window: int | None,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Row by row: softmax of the seen scores and the sink, of which the sink's share is dropped."""
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
    """query, key, value, sinks, the gradient from above."""
    torch.manual_seed(tokens)
    sizes = [(tokens, HEADS, 8), (tokens, KV_HEADS, 8), (tokens, KV_HEADS, v_head_dim), (HEADS,), (tokens, HEADS, v_head_dim)]  # fmt: skip
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
    compare(attention_reference, given, 1e-12, bounds=bounds, window=window)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 6e-2)])
def test_narrow_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    bounds = (0, 3, 20)
    compare(attention, problem(20, dtype), tolerance, bounds=bounds, cu_seqlens=torch.tensor(bounds), window=9)


def test_with_capped_scores_and_with_narrow_values() -> None:
    """A cap bends the scores, not the sink; values may be narrower than keys."""
    bounds = (0, 3, 20)
    compare(attention, problem(20), 1e-12, bounds=bounds, cu_seqlens=torch.tensor(bounds), window=None, softcap=1.5)
    compare(attention, problem(20, v_head_dim=5), 1e-12, bounds=bounds, cu_seqlens=torch.tensor(bounds), window=4)


def test_sinks_far_from_the_scores_stay_finite() -> None:
    """A sink far below all scores changes nothing, one far above them takes everything, and neither overflows."""
    query, key, value, _, above = problem(30, torch.float32)
    settings: dict[str, Any] = dict(bounds=(0, 30), cu_seqlens=torch.tensor([0, 30]), scale=0.4, window=None)
    plain = attention(query, key, value, **settings)
    for level in (-1e4, 1e4):
        inputs = [x.clone().requires_grad_() for x in (query, key, value, torch.full((HEADS,), level))]
        out = attention(*inputs[:3], sinks=inputs[3], **settings)
        torch.testing.assert_close(out, plain if level < 0 else torch.zeros_like(plain))
        assert all(bool(x.isfinite().all()) for x in torch.autograd.grad(out, inputs, above))


# --- flash-attn's rule, with stand-ins for its two kernels


def _seen(cu_seqlens: Tensor, settings: dict[str, Any]) -> Tensor:
    """[tokens, tokens] bool, from what flash-attn's docstring says of causal and window_size."""
    assert (
        settings["causal"]
        and settings["dropout_p"] == 0
        and settings["softcap"] == 0
        and settings["alibi_slopes"] is None
    )
    tokens = int(cu_seqlens[-1])
    assert settings["max_seqlen_q"] == settings["max_seqlen_k"] == int(cu_seqlens.diff().max())
    place = torch.arange(tokens)
    example = torch.bucketize(place, cu_seqlens[1:], right=True)
    seen = (example[:, None] == example[None]) & (place[None] <= place[:, None])
    left, right = settings["window_size_left"], settings["window_size_right"]
    if left >= 0:
        seen &= place[None] >= place[:, None] - left
    if right >= 0:
        seen &= place[None] <= place[:, None] + right
    return seen


def kernel_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1,
    softcap: float = 0.0, alibi_slopes: Any = None, return_softmax: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    """Like _flash_attn_varlen_forward: (out, softmax_lse [heads, tokens], …)."""
    seen = _seen(cu_seqlens_q, locals())
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (torch.einsum("qhd,khd->hqk", q, k) * softmax_scale).masked_fill(~seen, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1), None, None


def kernel_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float,
    causal: bool, window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Any, deterministic: bool,
    rng_state: Any = None,
) -> None:  # fmt: skip
    """Like _flash_attn_varlen_backward (algorithm 2 of arXiv:2307.08691): only out and softmax_lse say what the softmax was."""
    seen, groups = _seen(cu_seqlens_q, locals()), k.shape[1]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * softmax_scale
    weights = torch.exp(scores - softmax_lse[..., None]).masked_fill(~seen, 0)
    mean = (dout * out).sum(-1).t()[..., None]
    towards = weights * (torch.einsum("qhd,khd->hqk", dout, v) - mean) * softmax_scale
    dq.copy_(torch.einsum("hqk,khd->qhd", towards, k))
    for target, found in (
        (dk, torch.einsum("hqk,qhd->khd", towards, q)),
        (dv, torch.einsum("hqk,qhd->khd", weights, dout)),
    ):
        target.copy_(found.view(len(found), groups, -1, found.shape[-1]).sum(2))


@pytest.mark.parametrize("window", [None, 1, 4])
def test_the_rule_for_flash_attn(window: int | None) -> None:
    def by_kernels(
        query: Tensor, key: Tensor, value: Tensor, *, sinks: Tensor, bounds: tuple[int, ...], **settings: Any
    ) -> Tensor:
        return flash(
            query, key, value, sinks, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), longest=9, softcap=None, forward=kernel_forward,
            backward=kernel_backward, **settings,
        )  # fmt: skip

    compare(by_kernels, problem(20), 1e-12, bounds=(0, 3, 4, 11, 20), window=window)


class _OnCuda(Tensor):
    """A tensor that says it is on CUDA, so that the call which a GPU would get is made here."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    device = property(lambda self: torch.device("cuda"))  # type: ignore[assignment]


@pytest.mark.parametrize("at_once", [None, 10000])
@pytest.mark.parametrize("with_sinks", [True, False])
def test_on_cuda_the_kernels_are_called(with_sinks: bool, at_once: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All heads in one call, or those that `at_once` bytes are enough for: 9600 for each key head here."""
    called: list[int] = []

    def counted(dout: Tensor, *given: Any, **settings: Any) -> None:
        called.append(dout.shape[1])
        kernel_backward(dout, *given, **settings)

    monkeypatch.setattr(module, "_flash_kernels", lambda: (kernel_forward, counted))
    monkeypatch.setattr(module, "suits", lambda query: query.is_cuda)
    if at_once is not None:
        monkeypatch.setattr(flash_module, "AT_ONCE", at_once)
    elif not with_sinks:
        monkeypatch.setattr(module, "_one_by_one", lambda *given: True)
    query, key, value, sinks, above = problem(20)
    settings: dict[str, Any] = dict(bounds=(0, 3, 4, 11, 20), scale=0.4, window=4)
    starts = torch.tensor(settings["bounds"], dtype=torch.int32)
    inputs = [x.detach().clone().requires_grad_() for x in (query, key, value, *([sinks] if with_sinks else []))]
    given = [x.as_subclass(_OnCuda) for x in inputs[:3]]
    got = attention(*given, cu_seqlens=starts, sinks=inputs[3] if with_sinks else None, **settings)
    never = torch.full_like(sinks, -1e9)
    want = dense(*inputs[:3], inputs[3] if with_sinks else never, **settings)
    torch.testing.assert_close(got.as_subclass(Tensor), want, rtol=0, atol=1e-12)
    found = torch.autograd.grad(got, inputs, above.as_subclass(_OnCuda))
    for ours, theirs in zip(found, torch.autograd.grad(want, inputs, above), strict=True):
        torch.testing.assert_close(ours.as_subclass(Tensor), theirs, rtol=0, atol=1e-11)
    assert sum(called) == query.shape[1]
    assert len(called) == (1 if at_once is None else KV_HEADS)


def test_the_stand_ins_have_the_parameters_of_an_installed_flash_attn() -> None:
    import inspect

    flash = pytest.importorskip("flash_attn.flash_attn_interface")
    for real, ours in (
        (flash._flash_attn_varlen_forward, kernel_forward),
        (flash._flash_attn_varlen_backward, kernel_backward),
    ):
        names = list(inspect.signature(ours).parameters)
        assert set(names) <= set(inspect.signature(real).parameters)
