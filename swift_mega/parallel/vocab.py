"""Log-probabilities over a vocabulary that is sharded over the tensor ranks, without a [tokens, vocabulary] tensor.

Let E = exp(logits - maximum of the token's logits), p the probability of the target and g the incoming gradient. The gradient of a
token's hidden state is g ((1 - p) W[target] - expected_row), where expected_row is the sum of the other rows of W, weighted by the
softmax. The softmax is E times one factor per token. So expected_row is computed in the forward pass, while E of a chunk exists, and E
is dropped: a frozen head costs no recomputation at any chunk size. Only a trained head needs E again: it is kept where all of it fits
one chunk, else computed again. The target's column is removed from E, and 1 - p is computed from the float32 log-probability. This
keeps the gradient of a confident token exact where the products are in bfloat16.

The gradient of a trained head is summed in float32 over all tokens, one block of the vocabulary at a time, and rounded once. A sum in
bfloat16 would lose small summands where there are many chunks, or where a word is often the target.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from swift_mega.device.device import send
from swift_mega.ops.kernels import AUTO, Form, Kernels, Op
from swift_mega.parallel.vocab_reference import log_probabilities_reference

# Logits of one chunk by default: 128 MiB in float32.
CHUNK_NUMBERS = 1 << 25
# Fewest tokens of such a chunk, however large the vocabulary is.
FEWEST_TOKENS = 64
# On the CPU logits should fit the cache: 2 MiB at once are 1.15 times faster than all columns at once.
CPU_TOKENS, CPU_COLUMNS = 256, 2048
# Fewest columns of a trained head's gradient that are worth a pass over all hidden states.
WIDE = 1024


def token_log_probabilities(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: ProcessGroup | None,
    vocab_size: int,
    first_row: int,
    bias: Tensor | None = None,
    chunk: int | None = None,
    columns: int | None = None,
    softcap: float | None = None,
    kernels: Kernels = AUTO,
) -> Tensor:
    """log softmax(hidden @ weight.T + bias)[target] for every token, over the whole vocabulary; 0 where the target is negative.

    hidden: [tokens, hidden], the same on every tensor rank.
    weight: [vocabulary / tp, hidden], this rank's rows. The first of them is row `first_row` of the whole weight. Rows from `vocab_size`
    on are padding: they take no part and get no gradient.
    targets: [tokens] int64, global, the same on every rank. Best on the host: targets on a GPU are copied to the host, which waits for
    them.
    group: the tensor ranks; None for one rank.
    bias: [vocabulary / tp], sharded and padded like `weight`; None: none.
    chunk: tokens whose logits exist at once; None: as many as fit CHUNK_NUMBERS. Where `weight` or `bias` is trained and one chunk holds
    all tokens, their softmax is kept for the backward pass; the softmax of several chunks is computed twice.
    columns: columns of the vocabulary whose logits exist at once where they are not kept; None: all of them on CUDA, as many as fit the
    cache on the CPU (and as many tokens, where `chunk` is None).
    softcap: of the logits, by `soft_cap`; None: none.

    Returns [tokens], float32 (float64 for float64), the same on every rank, differentiable in hidden, weight and bias. The gradient of
    hidden is summed over the group, so it is complete on every rank. Tokens with a negative target cost nothing.
    """
    shard = _Shard(group, vocab_size, first_row, chunk, columns, softcap)
    run = kernels.form(CROSS_ENTROPY, hidden.device, hidden.dtype).run
    return run(hidden, weight, targets, bias, shard)  # type: ignore[no-any-return]


def _in_chunks(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, shard: "_Shard") -> Tensor:
    # Without this, needs_input_grad would be true for trained tensors also where no gradient is taken.
    if not torch.is_grad_enabled():
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    host = targets.cpu()
    kept = (host >= 0).nonzero()[:, 0]
    if len(kept) == len(host):
        return _LogProbabilities.apply(hidden, weight, bias, send(host, hidden.device), host, shard)
    host = host[kept]
    rows, targets = send(torch.stack([kept, host]), hidden.device)
    chosen = _LogProbabilities.apply(hidden.index_select(0, rows), weight, bias, targets, host, shard)
    return chosen.new_zeros(len(hidden)).index_copy(0, rows, chosen)


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, **shard: Any) -> Tensor:
    """The negative of `token_log_probabilities`, with the same arguments: [tokens], 0 where the label is negative."""
    return -token_log_probabilities(hidden, weight, labels, **shard)


def soft_cap(logits: Tensor, softcap: float | None) -> Tensor:
    """c tanh(logits / c), so that all lie within [-c, c] (Gemma 2, arXiv:2408.00118); None: unchanged."""
    return logits if softcap is None else (logits / softcap).tanh_().mul_(softcap)


@dataclass(frozen=True)
class _Shard:
    """This rank's share of the vocabulary, and how many tokens and columns are computed at once."""

    group: ProcessGroup | None
    vocab_size: int
    first_row: int
    chunk: int | None
    columns: int | None
    softcap: float | None

    def slope(self, capped: Tensor) -> Tensor | None:
        """The derivative of `soft_cap` where its result is `capped`; None: it is 1."""
        return None if self.softcap is None else 1 - (capped / self.softcap).square_()

    @property
    def ranks(self) -> int:
        return 1 if self.group is None else self.group.size()

    def real_rows(self, weight: Tensor) -> Tensor:
        """This rank's vocabulary rows (or entries of a bias) without padding; a view."""
        return weight[: max(0, min(len(weight), self.vocab_size - self.first_row))]

    def logits(self, hidden: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
        """[tokens, rows], after the soft-cap; float32, or float64 for float64."""
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        return soft_cap(F.linear(hidden, rows, bias).to(exact), self.softcap)

    def keeps(self, tokens: int, rows: Tensor) -> bool:
        """Whether the logits of all tokens may exist at once."""
        return tokens <= self.chunk if self.chunk else tokens * len(rows) <= CHUNK_NUMBERS

    def chunks(self, tokens: int, rows: Tensor) -> Iterator[slice]:
        """Slices of the tokens that are computed at once where logits are not kept."""
        fitting = CPU_TOKENS if rows.device.type == "cpu" else max(FEWEST_TOKENS, CHUNK_NUMBERS // max(len(rows), 1))
        return _slices(tokens, self.chunk or fitting)

    def blocks(self, rows: Tensor) -> Iterator[slice]:
        """Slices of the vocabulary rows that are computed at once where logits are not kept."""
        return _slices(len(rows), self.columns or (CPU_COLUMNS if rows.device.type == "cpu" else len(rows)))

    def backward_sizes(self, tokens: int, rows: Tensor) -> tuple[int, int]:
        """(tokens, vocabulary rows) whose softmax is computed again at once: as many numbers as in a chunk, for more tokens and fewer
        rows.
        """
        fitting = CPU_TOKENS * CPU_COLUMNS if rows.device.type == "cpu" else CHUNK_NUMBERS
        numbers = self.chunk * len(rows) if self.chunk else fitting
        columns = max(1, min(len(rows), self.columns or max(numbers // max(tokens, 1), WIDE)))
        return max(1, numbers // columns), columns

    def own_by_block(self, host: Tensor, rows: int, columns: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """For each block of `columns` vocabulary rows of this rank: the tokens whose target is in it, and each target's row counted from
        the block's first.

        host: targets on the host, because the number of tokens of each block must be known there. The result is on `device`.
        """
        local = host - self.first_row
        tokens = ((local >= 0) & (local < rows)).nonzero()[:, 0]
        places, order = local[tokens].sort(stable=True)
        starts = torch.arange(columns, rows, columns) if columns < rows else places.new_empty(0)
        cuts = torch.searchsorted(places, starts).tolist()
        tokens, places = send(torch.stack([tokens[order], places % columns]), device)
        return list(zip(tokens.tensor_split(cuts), places.tensor_split(cuts), strict=True))


def _found(local: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """The column in which to look for each token's target, [tokens, 1], and whether the target is there at all, bool [tokens, 1].

    local: [tokens], the target's row counted from the first of these `columns` columns. All shapes are fixed, so the host need not wait
    for the GPU to report a count, as it must after nonzero.
    """
    places = local.clamp(0, columns - 1)[:, None]
    return places, places == local[:, None]


def _slices(whole: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, whole)) for start in range(0, whole, max(size, 1)))


class _LogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, host: Tensor, shard: _Shard
    ) -> Tensor:
        """host: `targets` on the host."""
        rows, biases = shard.real_rows(weight), None if bias is None else shard.real_rows(bias)
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        local_lse = hidden.new_empty(len(targets), dtype=exact)
        target_logits = torch.zeros_like(local_lse)
        expected_row = hidden.new_empty(hidden.shape, dtype=exact) if ctx.needs_input_grad[0] else None
        softmax: Tensor | None = None
        if any(ctx.needs_input_grad[1:3]) and shard.keeps(len(targets), rows):
            softmax = _whole_chunk(hidden, rows, biases, targets, shard, local_lse, target_logits, expected_row)
        else:
            for part in shard.chunks(len(targets), rows):
                into = (local_lse[part], target_logits[part], None if expected_row is None else expected_row[part])
                _chunk_in_blocks(hidden[part], rows, biases, targets[part], shard, *into)
        lse, target_logits = _over_ranks(local_lse, target_logits, shard)
        result = target_logits - lse
        ctx.save_for_backward(hidden, weight, bias, targets, result, lse, local_lse, expected_row, softmax)
        ctx.shard, ctx.slope, ctx.host = shard, shard.slope(target_logits), host
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, result, lse, local_lse, expected_row, softmax = ctx.saved_tensors
        shard: _Shard = ctx.shard
        rows = shard.real_rows(weight)
        target_factor = gradients[0] * -result.expm1()  # g (1 - p), exact for a confident token
        if ctx.slope is not None:
            target_factor = target_factor * ctx.slope
        others_factor = -gradients[0] * (local_lse - lse).exp()
        hidden_gradient = weight_gradient = bias_gradient = None
        if expected_row is not None:
            whole = expected_row * others_factor[:, None]
            if len(rows):
                places, there = _found(targets - shard.first_row, len(rows))
                whole.addcmul_(rows.index_select(0, places[:, 0]).to(whole.dtype), target_factor[:, None] * there)
            if shard.ranks > 1 and len(targets):
                dist.all_reduce(whole, group=shard.group)
            hidden_gradient = whole.to(hidden.dtype)
        if any(ctx.needs_input_grad[1:3]):
            weight_gradient = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
            bias_gradient = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
            _fill_head_gradients(
                weight_gradient,
                bias_gradient,
                hidden,
                weight,
                bias,
                targets,
                ctx.host,
                local_lse,
                softmax,
                others_factor,
                target_factor,
                shard,
            )
        return hidden_gradient, weight_gradient, bias_gradient, None, None, None


def _fill_head_gradients(
    of_weight: Tensor | None,
    of_bias: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    host: Tensor,
    local_lse: Tensor,
    softmax: Tensor | None,
    others_factor: Tensor,
    target_factor: Tensor,
    shard: _Shard,
) -> None:
    """Fills the gradients of a trained head, which are zero before, one block of vocabulary rows at a time.

    softmax: from `_whole_chunk`; None: it is computed again.
    others_factor, target_factor: [tokens], for the incoming gradient g. others_factor is -g times this rank's share of the softmax over
    all ranks. target_factor is g (1 - p), with a soft-cap times its derivative at the target.
    """
    rows, biases = shard.real_rows(weight), None if bias is None else shard.real_rows(bias)
    size, columns = shard.backward_sizes(len(targets), rows) if softmax is None else (len(targets), len(rows))
    own = shard.own_by_block(host, len(rows), columns, rows.device)
    for number, block in enumerate(_slices(len(rows), columns)):
        tokens, places = own[number]
        weights, biased = _Sum.of(of_weight, block, others_factor.dtype), _Sum.of(of_bias, block, others_factor.dtype)
        for part in _slices(len(targets), size):
            spread = softmax
            if spread is None:
                given = (hidden[part], rows[block], None if biases is None else biases[block])
                spread = _softmax_of_others(
                    *given, targets[part] - shard.first_row - block.start, local_lse[part], shard
                )
            if weights is not None:
                scaled = (hidden[part] * others_factor[part, None]).to(hidden.dtype)
                _add_product(weights.total, spread.to(rows.dtype).t(), scaled)
            if biased is not None:
                biased.total.add_(others_factor[part] @ spread)
        if weights is not None:
            weights.total.index_add_(0, places, hidden[tokens] * target_factor[tokens, None])
            weights.write()
        if biased is not None:
            biased.total.index_add_(0, places, target_factor[tokens])
            biased.write()


@dataclass(frozen=True)
class _Sum:
    """A block of a gradient, and the tensor in which it is summed: the block itself, or a copy of a wider dtype."""

    into: Tensor
    total: Tensor

    @classmethod
    def of(cls, gradient: Tensor | None, block: slice, exact: torch.dtype) -> "_Sum | None":
        if gradient is None:
            return None
        into = gradient[block]
        return cls(into, into if into.dtype == exact else into.to(exact))

    def write(self) -> None:
        if self.total is not self.into:
            self.into.copy_(self.total)


def _whole_chunk(
    hidden: Tensor,
    rows: Tensor,
    biases: Tensor | None,
    targets: Tensor,
    shard: _Shard,
    lse: Tensor,
    target_logits: Tensor,
    expected_row: Tensor | None,
) -> Tensor:
    """Fills lse, target_logits and expected_row of one chunk of tokens. Returns the softmax over this rank's rows, with the target's
    column set to 0.

    With a soft-cap, each number of the softmax is multiplied by the derivative of the cap, both in the result and in expected_row.
    """
    logits = shard.logits(hidden, rows, biases)
    slope = shard.slope(logits)
    if len(rows):
        places, there = _found(targets - shard.first_row, len(rows))
        target_logits.copy_(logits.gather(1, places).masked_fill_(~there, 0)[:, 0])
    top, total = _exponentials(logits)
    lse.copy_(top + total.log())
    if len(rows):
        _take_out(logits, places, there)
    softmax = _by(logits.div_(total[:, None]), slope)
    if expected_row is not None:
        expected_row.copy_(softmax.to(rows.dtype) @ rows)
    return softmax


def _chunk_in_blocks(
    hidden: Tensor,
    rows: Tensor,
    biases: Tensor | None,
    targets: Tensor,
    shard: _Shard,
    lse: Tensor,
    target_logits: Tensor,
    expected_row: Tensor | None,
) -> None:
    """Fills lse, target_logits and expected_row of one chunk of tokens, one block of the vocabulary at a time.

    When a block has a larger logit, the sums so far are scaled down (arXiv:1805.02867).
    """
    local = targets - shard.first_row
    tops = lse.new_full(lse.shape, -torch.inf)
    totals = torch.zeros_like(lse)
    if expected_row is not None:
        expected_row.zero_()
    for block in shard.blocks(rows):
        logits = shard.logits(hidden, rows[block], None if biases is None else biases[block])
        slope = None if expected_row is None else shard.slope(logits)
        places, there = _found(local - block.start, logits.shape[1])
        target_logits.add_(logits.gather(1, places).masked_fill_(~there, 0)[:, 0])
        before, tops = tops, torch.maximum(tops, logits.amax(-1))
        logits.sub_(tops[:, None]).exp_()
        shrink = (before - tops).exp_()
        totals.mul_(shrink).add_(logits.sum(-1))
        if expected_row is not None:
            _take_out(logits, places, there)
            _add_product(expected_row.mul_(shrink[:, None]), _by(logits, slope).to(rows.dtype), rows[block])
    lse.copy_(tops + totals.log())
    if expected_row is not None and len(rows):
        expected_row.div_(totals[:, None])


def _take_out(numbers: Tensor, places: Tensor, there: Tensor) -> None:
    """Sets the target's column of [tokens, rows] to 0, in place, where the target is among these rows."""
    numbers.scatter_(1, places, numbers.gather(1, places).masked_fill_(there, 0))


def _by(softmax: Tensor, slope: Tensor | None) -> Tensor:
    return softmax if slope is None else softmax.mul_(slope)


def _add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """into += a @ b, where `into` may be wider than the two."""
    if into.dtype == a.dtype:
        into.addmm_(a, b)
    else:
        into.add_(a @ b)


def _softmax_of_others(
    hidden: Tensor, rows: Tensor, bias: Tensor | None, local: Tensor, lse: Tensor, shard: _Shard
) -> Tensor:
    """The softmax of tokens over some vocabulary rows, [tokens, rows], with the target's column set to 0.

    local: the target's row, counted from the first of `rows`; it may lie outside them. lse: over all rows of this rank.
    """
    logits = shard.logits(hidden, rows, bias)
    slope = shard.slope(logits)
    softmax = _by(logits.sub_(lse[:, None]).exp_(), slope)
    _take_out(softmax, *_found(local, len(rows)))
    return softmax


def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor]:
    """exp(logits - the token's maximum) in place; returns the maxima and the sums, [tokens] each."""
    if not logits.numel():  # a rank whose rows are all padding
        return logits.new_full((len(logits),), -torch.inf), logits.new_ones(len(logits))
    top = logits.amax(-1)
    return top, logits.sub_(top[:, None]).exp_().sum(-1)


def _over_ranks(local_lse: Tensor, target_logits: Tensor, shard: _Shard) -> tuple[Tensor, Tensor]:
    """The log-sum-exp over all ranks' rows, and the target's logit from the rank that has it, with one gather."""
    if shard.ranks == 1 or not len(local_lse):
        return local_lse, target_logits
    mine = torch.stack([local_lse, target_logits])
    parts = [torch.empty_like(mine) for _ in range(shard.ranks)]
    dist.all_gather(parts, mine, group=shard.group)
    every = torch.stack(parts)
    return every[:, 0].logsumexp(0), every[:, 1].sum(0)


CROSS_ENTROPY = Op(
    "cross_entropy",
    (
        Form("tuned", "in chunks, gradient of the hidden states in the forward pass", _in_chunks),
        Form("reference", "torch, all logits at once", log_probabilities_reference),
    ),
)
