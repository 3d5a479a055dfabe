"""Log-probabilities over a sharded vocabulary, and their gradients, equal dense float64 on 1, 2 and 3 ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from swift_mega.ops.kernels import AUTO, Kernels
from swift_mega.parallel import vocab
from swift_mega.parallel.vocab import cross_entropy, token_log_probabilities
from tests.largest import Largest

TOKENS, HIDDEN, VOCAB = 13, 8, 29


def _problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, targets (some ignored), and the gradient of the output."""
    torch.manual_seed(3)
    hidden, weight = torch.randn(TOKENS, HIDDEN, dtype=dtype), torch.randn(VOCAB, HIDDEN, dtype=dtype)
    targets = torch.randint(0, VOCAB, (TOKENS,))
    targets[[0, 5]] = -100
    targets[1], targets[2] = 0, VOCAB - 1
    return hidden, weight, targets, torch.randn(TOKENS, dtype=dtype)


def _dense(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    above: Tensor,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The value and the gradients of hidden and weight; the gradient of `bias` stays in it."""
    hidden, weight = (given.detach().double().clone().requires_grad_() for given in (hidden, weight))
    logits = hidden @ weight.t() if bias is None else hidden @ weight.t() + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    value = -F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    (value * above).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return value.detach(), hidden.grad, weight.grad


def _cut_equals_dense(
    padded: int,
    chunk: int | None,
    trained: bool,
    columns: int | None = None,
    softcap: float | None = None,
    *,
    biased: bool = False,
    bias_alone: bool = False,
    kernels: Kernels = AUTO,
) -> None:
    """padded: rows of the whole padded vocabulary, which the ranks share evenly. The padding has huge values, which must have no effect.

    bias_alone: the bias is trained and the weight is not.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    hidden, weight, targets, above = _problem()
    bias = torch.linspace(-2, 2, VOCAB, dtype=weight.dtype).requires_grad_() if biased else None
    value, hidden_gradient, weight_gradient = _dense(hidden, weight, targets, above, softcap, bias)
    whole = torch.cat([weight, torch.full((padded - VOCAB, HIDDEN), 50.0, dtype=weight.dtype)])
    rows = padded // ranks
    mine = whole[rank * rows : (rank + 1) * rows].clone().requires_grad_(trained and not bias_alone)
    my_bias = None
    if bias is not None:
        whole_bias = torch.cat([bias.detach(), bias.new_full((padded - VOCAB,), 50.0)])
        my_bias = whole_bias[rank * rows : (rank + 1) * rows].clone().requires_grad_(trained)
    hidden.requires_grad_()
    got = token_log_probabilities(
        hidden,
        mine,
        targets,
        group=dist.group.WORLD,
        vocab_size=VOCAB,
        first_row=rank * rows,
        chunk=chunk,
        columns=columns,
        softcap=softcap,
        bias=my_bias,
        kernels=kernels,
    )
    close = {"rtol": 0, "atol": 1e-13}
    torch.testing.assert_close(got.detach(), value, **close)
    (got * above).sum().backward()
    torch.testing.assert_close(hidden.grad, hidden_gradient, **close)
    if my_bias is not None and trained:
        wanted = torch.cat([bias.grad, torch.zeros(padded - VOCAB, dtype=weight.dtype)])
        torch.testing.assert_close(my_bias.grad, wanted[rank * rows : (rank + 1) * rows], **close)
    if trained and not bias_alone:
        wanted = torch.cat([weight_gradient, torch.zeros(padded - VOCAB, HIDDEN, dtype=weight.dtype)])
        torch.testing.assert_close(mine.grad, wanted[rank * rows : (rank + 1) * rows], **close)
    else:
        assert mine.grad is None


@pytest.mark.parametrize("size", [1, 2, 3])
def test_value_and_gradients_equal_dense(ranks, size):
    """Vocabulary 29 on 1, 2, 3 ranks (padded; with 3 ranks and 48 rows one is all padding), whole and in chunks."""
    ranks(size, _all_cases, size)


@pytest.mark.parametrize("size", [1, 3])
def test_the_reference_form_equals_dense(ranks, size):
    """In plain torch: the same values and gradients, with soft-cap and bias, also where a rank has padding only."""
    ranks(size, _reference_cases)


def _reference_cases() -> None:
    for given in ({}, {"softcap": 2.0}, {"biased": True}, {"biased": True, "bias_alone": True}):
        _cut_equals_dense(48, None, True, kernels=Kernels("reference"), **given)
    _cut_equals_dense(48, None, False, kernels=Kernels("reference"))


@pytest.mark.parametrize("size", [1, 2])
def test_capped_logits_equal_dense(ranks, size):
    """A cap of 2 changes most logits here; the gradient has its slope, also in the target's column."""
    ranks(size, _capped_cases, size)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_bias_equals_dense(ranks, size):
    """Value and gradients with a bias for each token, with and without a cap; trained with the weight, alone, or not at all."""
    ranks(size, _biased_cases, size)


def _biased_cases(size: int) -> None:
    for padded in {1: (29, 32), 2: (30, 64), 3: (30, 96)}[size]:
        for chunk in (None, 4):
            for softcap in (None, 2.0):
                for trained, alone in ((False, False), (True, False), (True, True)):
                    _cut_equals_dense(padded, chunk, trained, softcap=softcap, biased=True, bias_alone=alone)
                    _cut_equals_dense(padded, chunk, trained, columns=5, softcap=softcap, biased=True, bias_alone=alone)


def _capped_cases(size: int) -> None:
    for chunk in (None, 4):
        for trained in (False, True):
            _cut_equals_dense(32 * size, chunk, trained, softcap=2.0)
            for columns in (1, 5):
                _cut_equals_dense(32 * size, chunk, trained, columns=columns, softcap=2.0)


def _all_cases(size: int) -> None:
    for padded in {1: (29, 32), 2: (30, 64), 3: (30, 48, 96)}[size]:
        for chunk in (None, 1, 4, 100):
            for trained in (False, True):
                _cut_equals_dense(padded, chunk, trained)
                for columns in (1, 5, 100):
                    _cut_equals_dense(padded, chunk, trained, columns=columns)


def _ours(hidden: Tensor, weight: Tensor, targets: Tensor, **given: Any) -> Tensor:
    given = {"vocab_size": len(weight), "chunk": None} | given
    return token_log_probabilities(hidden, weight, targets, group=None, first_row=0, **given)


@pytest.mark.parametrize("chunk", [None, 4])
def test_bfloat16_is_as_good_as_its_inputs(chunk):
    """The softmax is in float32: the tiny gradient of a token with high probability survives products in bfloat16."""
    hidden, weight, targets, above = _problem()
    hidden[3], weight[7], targets[3] = 2.0, 2.0, 7  # its log-probability is about -1e-6 or less
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    value, hidden_gradient, weight_gradient = _dense(hidden, weight, targets, above)
    hidden.requires_grad_(), weight.requires_grad_()
    got = _ours(hidden, weight, targets, chunk=chunk)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), value, rtol=0.01, atol=0.03)
    (got * above).sum().backward()
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad.double(), hidden_gradient, rtol=0.05, atol=0.05)
    assert hidden_gradient[3].norm() < 1e-4
    torch.testing.assert_close(hidden.grad[3].double(), hidden_gradient[3], rtol=0.1, atol=1e-8)
    torch.testing.assert_close(weight.grad.double(), weight_gradient, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("chunk", [8, 4096])
def test_bfloat16_gradients_of_a_frequent_word_do_not_stop_growing(chunk):
    """4096 equal targets: a bfloat16 sum of their small gradients would stop growing long before the end."""
    torch.manual_seed(5)
    hidden, weight = (torch.rand(4096, HIDDEN) + 0.5).bfloat16(), torch.randn(VOCAB, HIDDEN).mul_(0.1).bfloat16()
    targets, above = torch.full((4096,), 7), torch.full((4096,), 1 / 4096)
    _, _, wanted = _dense(hidden, weight, targets, above)
    weight.requires_grad_()
    (_ours(hidden, weight, targets, chunk=chunk) * above).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad.double(), wanted, rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("chunk, limit", [(None, 1 << 19), (64, 64 * 8192), (1 << 20, None)])
def test_no_tensor_has_the_logits_of_all_tokens(trained, chunk, limit, monkeypatch):
    """The largest tensor of forward and backward is that of a chunk, and that of all tokens only where one chunk may contain all."""
    tokens, rows, width = 2048, 8192, 16
    monkeypatch.setattr(vocab, "CHUNK_NUMBERS", 1 << 20)
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(rows, width, requires_grad=trained)
    with Largest() as largest:
        _ours(hidden, weight, torch.randint(0, rows, (tokens,)), chunk=chunk).sum().backward()
    if limit is None:
        assert (largest.numbers == tokens * rows) == trained
    else:
        assert largest.numbers <= limit < tokens * rows


@pytest.mark.parametrize("chunk", [None, 4])
def test_without_gradients_nothing_of_them_is_computed(chunk):
    """In an evaluation of a trained head, the weight is used in one product only, for the logits."""
    hidden, weight, targets, _ = _problem()
    hidden.requires_grad_(), weight.requires_grad_()
    wanted = _ours(hidden, weight, targets, chunk=chunk)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        got = _ours(hidden, weight, targets, chunk=chunk)
    torch.testing.assert_close(got, wanted.detach(), rtol=0, atol=1e-13)
    assert flops.get_total_flops() == 2 * int((targets >= 0).sum()) * VOCAB * HIDDEN


def test_second_backward_gives_the_same_gradient():
    """No saved tensor is overwritten, so retain_graph works."""
    hidden, weight, targets, above = _problem()
    hidden.requires_grad_(), weight.requires_grad_()
    loss = (_ours(hidden, weight, targets) * above).sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(loss, (hidden, weight)), strict=True):
        assert torch.equal(one, other)


def test_extreme_logits_stay_finite():
    """A very improbable target has its true log-probability, not -inf, and a finite gradient."""
    hidden = torch.full((1, 1), 100.0, requires_grad=True)
    got = _ours(hidden, torch.tensor([[5.0], [-5.0]]), torch.tensor([1]))
    assert got.item() == -1000.0
    got.sum().backward()
    assert hidden.grad is not None and hidden.grad.item() == -10.0


def test_all_targets_ignored():
    """A row without targets gives zeros and zero gradients."""
    hidden, weight, _, _ = _problem()
    hidden.requires_grad_(), weight.requires_grad_()
    got = _ours(hidden, weight, torch.full((TOKENS,), -100))
    got.sum().backward()
    assert not got.any() and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("columns", [None, 1])
def test_logits_that_grow_or_fall_by_hundreds_over_the_vocabulary(columns):
    """Partial sums are scaled down before a larger logit is added, and never scaled up after a smaller one: nothing overflows."""
    weight = torch.tensor([[-300.0], [0.0], [300.0], [299.0], [-300.0]], dtype=torch.float64)
    hidden, targets, above = torch.ones(5, 1, dtype=torch.float64), torch.arange(5), torch.ones(5, dtype=torch.float64)
    value, gradient, _ = _dense(hidden, weight, targets, above)
    hidden.requires_grad_()
    got = _ours(hidden, weight, targets, columns=columns)
    got.sum().backward()
    torch.testing.assert_close(got.detach(), value, rtol=1e-13, atol=1e-11)
    torch.testing.assert_close(hidden.grad, gradient, rtol=1e-12, atol=1e-11)


def test_cross_entropy_is_the_negative():
    hidden, weight, targets, _ = _problem()
    loss = cross_entropy(hidden, weight, targets, group=None, vocab_size=VOCAB, first_row=0)
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.t(), targets, reduction="none"))
