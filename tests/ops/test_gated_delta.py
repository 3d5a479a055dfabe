"""The gated delta rule and the convolution before it, against the definition, token by token in float64: value and gradients."""

import inspect
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from swift_mega.ops import gated_delta as module
from swift_mega.ops.causal_conv import causal_conv
from swift_mega.ops.gated_delta import gated_delta_reference, gated_delta_rule, places
from tests.ops.test_attention import _OnCuda

BOUNDS = [
    (0, 1),
    (0, 3, 4, 11, 20),
    (0, module.CHUNK, 2 * module.CHUNK),
    (0, 2 * module.CHUNK + 1, 2 * module.CHUNK + 2, 3 * module.CHUNK + 1),
]
HEADS, KEY_DIM, VALUE_DIM = 3, 5, 4


def starts(bounds: tuple[int, ...]) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


def by_token(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, *, bounds: tuple[int, ...]
) -> Tensor:
    """One state per example and head; examples share no state."""
    rows = []
    for start, end in pairwise(bounds):
        state = [torch.zeros(key.shape[2], value.shape[2], dtype=torch.float64) for _ in range(query.shape[1])]
        for i in range(start, end):
            heads = []
            for head in range(query.shape[1]):
                q, k = (x[i, head] / (x[i, head] @ x[i, head] + 1e-6).sqrt() for x in (query, key))
                kept = state[head] * decay[i, head].exp()
                state[head] = kept + torch.outer(k, beta[i, head] * (value[i, head] - k @ kept))
                heads.append(q @ state[head] / query.shape[2] ** 0.5)
            rows.append(torch.stack(heads))
    return torch.stack(rows)


def problem(tokens: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """query, key, value, decay, beta, and the gradient of the output."""
    torch.manual_seed(tokens)
    wide = (torch.randn(tokens, HEADS, size, dtype=torch.float64) for size in (KEY_DIM, KEY_DIM, VALUE_DIM))
    decay = -torch.rand(tokens, HEADS, dtype=torch.float64) * 2
    beta = torch.rand(tokens, HEADS, dtype=torch.float64)
    above = torch.randn(tokens, HEADS, VALUE_DIM, dtype=torch.float64)
    narrow = [x.to(dtype) for x in (*wide, beta, above)]
    return [*narrow[:3], decay.to(torch.promote_types(dtype, torch.float32)), *narrow[3:]]


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_value_and_gradients_equal_the_definition(bounds, dtype, tolerance):
    *inputs, above = problem(bounds[-1], dtype)
    inputs = [x.requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    got = gated_delta_rule(*inputs, bounds=bounds, cu_seqlens=starts(bounds))
    want = by_token(*wide, bounds=bounds)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    found, expected = torch.autograd.grad(got, inputs, above), torch.autograd.grad(want, wide, above.double())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_narrow_dtypes_are_wide(dtype):
    """Only the result is rounded to the narrow dtype."""
    bounds = (0, 70, 150)
    *inputs, _ = problem(bounds[-1], dtype)
    got = gated_delta_rule(*inputs, bounds=bounds, cu_seqlens=starts(bounds))
    want = by_token(*(x.double() for x in inputs), bounds=bounds)
    assert got.dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=step, atol=step * 0.02)


def test_one_example_equals_transformers():
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule as theirs

    query, key, value, decay, beta, _ = problem(150, torch.float32)
    got = gated_delta_rule(query, key, value, decay, beta, bounds=(0, 150), cu_seqlens=starts((0, 150)))
    want, _ = theirs(*(x[None] for x in (query, key, value, decay, beta)), use_qk_l2norm_in_kernel=True)
    torch.testing.assert_close(got, want[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("strength", [0.0, -1e-9, -100.0, -1e4])
def test_a_state_that_is_kept_or_forgotten_at_once(strength):
    """Gradients are finite. Where the decay forgets the state, the output is what the token wrote itself: beta (q k) v."""
    query, key, value, decay, beta, above = problem(130, torch.float32)
    inputs = [x.requires_grad_() for x in (query, key, value, torch.full_like(decay, strength), beta)]
    out = gated_delta_rule(*inputs, bounds=(0, 130), cu_seqlens=starts((0, 130)))
    assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(out, inputs, above))
    if strength <= -100:
        cosine = torch.nn.functional.cosine_similarity(query, key, dim=-1)
        torch.testing.assert_close(out, (beta * cosine / KEY_DIM**0.5)[..., None] * value, rtol=1e-4, atol=1e-5)


def chunk_gated_delta_rule(
    q,
    k,
    v,
    g,
    beta,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    cu_seqlens=None,
    head_first=False,
):
    """flash-linear-attention's function of that name (0.4, ops/gated_delta_rule/chunk.py), after its docstring."""
    assert q.dtype == k.dtype == v.dtype != torch.float32 and beta.dim() == 3 and not head_first
    assert len(q) == 1 and cu_seqlens.dtype == torch.int64 and initial_state is None and use_qk_l2norm_in_kernel
    assert g.dtype == torch.float32 and scale == q.shape[-1] ** -0.5
    wide = (x[0].as_subclass(Tensor).double() for x in (q, k, v, g, beta))
    out = by_token(*wide, bounds=tuple(cu_seqlens.tolist())).to(q.dtype)[None]
    return out, None if not output_final_state else NotImplemented


def test_the_call_of_flash_linear_attention(monkeypatch):
    """With the documented meaning, the call computes what the reference does. It is not called with float32, which it refuses."""
    monkeypatch.setattr(module, "_kernel", lambda: chunk_gated_delta_rule)
    bounds = (0, 3, 4, 11, 20)
    settings: dict[str, Any] = {"bounds": bounds, "cu_seqlens": starts(bounds)}
    for dtype in (torch.bfloat16, torch.float32):
        query, *rest, _ = problem(20, dtype)
        got = gated_delta_rule(query.as_subclass(_OnCuda), *rest, **settings).as_subclass(Tensor)
        want = gated_delta_reference(query, *rest, **settings)
        torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-3)


def test_the_stand_in_has_the_signature_of_an_installed_one():
    fla = pytest.importorskip("fla.ops.gated_delta_rule")
    real = inspect.signature(fla.chunk_gated_delta_rule).parameters
    assert set(inspect.signature(chunk_gated_delta_rule).parameters) - {"head_first"} <= set(real)


def test_places_by_hand():
    """Examples of 3, 1 and 2 tokens occupy 4, 2 and 2 places."""
    found = places(starts((0, 3, 4, 6)), torch.tensor([4, 2, 2]), 6)
    assert found.tolist() == [0, 1, 2, 4, 6, 7]


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("bounds", [(0, 1), (0, 9), (0, 1, 3, 4, 12)], ids=str)
def test_a_convolution_stays_in_its_example(bounds, taps):
    torch.manual_seed(taps)
    x = torch.randn(bounds[-1], 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 1, taps, dtype=torch.float64, requires_grad=True)
    rows = []
    for start, end in pairwise(bounds):
        for i in range(start, end):
            seen = [x[i - back] * weight[:, 0, taps - 1 - back] for back in range(taps) if i - back >= start]
            rows.append(torch.stack(seen).sum(0))
    got, want = causal_conv(x, weight, cu_seqlens=starts(bounds)), torch.stack(rows)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    above = torch.randn_like(want)
    for one, other in zip(
        torch.autograd.grad(got, (x, weight), above), torch.autograd.grad(want, (x, weight), above), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
