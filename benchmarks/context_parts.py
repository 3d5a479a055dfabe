"""Context-parallel attention without a network; one process runs the work of all ranks. Parts of `python benchmarks/long_context.py`.

  b  balance   (query, key) pairs and CPU seconds of each rank's blocks: our split, zigzag of the whole row, and contiguous chunks
  c  overhead  blocks and merging of all ranks together, compared with attention on the whole row: the same work
  d  padding   tokens of padding in packed rows: padding of whole rows compared with padding of each example

Runs on one thread and measures CPU time, not wall time, so other processes have little effect. Jobs that are compared alternate.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from swift_mega.data.pack import pack_examples
from swift_mega.ops.attention import attention
from swift_mega.ops.blocks import Block, Gradients, Parts, backward, call_groups, forward
from swift_mega.parallel.layout import Layout
from swift_mega.parallel.mesh import Mesh
from swift_mega.parallel.sequence import Step, blocks, ring_steps, runs
from swift_mega.parallel.split import Range, split_row, zigzag

HEAD_DIM = 64
AIM = 1.15
"""Largest accepted ratio of the time of ring attention with merging to the time of plain attention."""
SPLITS = ("ours", "zigzag", "contiguous")
Steps = Sequence[Step]


def lengths(mean: float, spread: float, count: int, most: int) -> list[int]:
    """Log-normal lengths of examples, in tokens. spread: the standard deviation of their logarithm."""
    drawn = np.random.default_rng(0).lognormal(math.log(mean) - spread**2 / 2, spread, count)
    return np.clip(drawn, 2, most).astype(int).tolist()


def packed_rows(mean: float, tokens: int, count: int) -> list[tuple[int, ...]]:
    """cu_seqlens of packed rows, filled with examples in the order in which they are drawn; the rest of a row is one more example."""
    rows, ends = [], [0]
    for size in lengths(mean, 1.0, 4 * count * tokens // int(mean), tokens):
        if ends[-1] + size <= tokens:
            ends.append(ends[-1] + size)
            continue
        rows.append((*ends, tokens) if ends[-1] < tokens else tuple(ends))
        ends = [0, size]
    assert len(rows) >= count, (len(rows), count)
    return rows[:count]


# ------------------------------------------------------------------------------------------------ the ranks of a ring


def split_by(split: str, cu_seqlens: tuple[int, ...], ring: int) -> list[tuple[Range, ...]]:
    """Token ranges of each ring rank. split: "ours" (parallel/split.py), or "zigzag" or contiguous chunks of the whole row."""
    tokens, share = cu_seqlens[-1], cu_seqlens[-1] // ring
    if split == "ours":
        return list(split_row(cu_seqlens, ring).ranges)
    if split == "zigzag":
        return [zigzag(tokens, ring, position) for position in range(ring)]
    return [((share * each, share * (each + 1)),) for each in range(ring)]


def plan(split: str, cu_seqlens: tuple[int, ...], ring: int) -> list[Steps]:
    """The steps of each ring rank."""
    if split == "ours":
        return [ring_steps(cu_seqlens, ring, position) for position in range(ring)]
    ranges = [runs(pieces, cu_seqlens) for pieces in split_by(split, cu_seqlens, ring)]
    return [
        [
            Step(behind, blocks(ranges[position], ranges[(position - behind) % ring], causal=True, window=None))
            for behind in range(ring)
        ]
        for position in range(ring)
    ]


@dataclass(frozen=True)
class Ring:
    """All ring ranks for one packed row: the token indices of each rank, and its blocks in every step."""

    ranges: list[Tensor]
    steps: list[Steps]

    @classmethod
    def of(cls, cu_seqlens: tuple[int, ...], size: int, split: str = "ours") -> "Ring":
        pieces = split_by(split, cu_seqlens, size)
        ranges = [torch.cat([torch.arange(begin, end) for begin, end in mine]) for mine in pieces]
        return cls(ranges, plan(split, cu_seqlens, size))

    def run(self, row: Sequence[Tensor], *, gradients: bool) -> tuple[list[float], list[Tensor]]:
        """Computes as parallel/ring.py does, without the network. Returns the CPU seconds of each rank, and out, then dQ, dK, dV with
        `gradients`, all [tokens, ...] for the whole row.

        row: query, key, value and the gradient of out.
        """
        split = [tuple(x[mine] for x in row) for mine in self.ranges]
        # dK and dV of each rank's tokens
        of_keys: list[tuple[Tensor, ...]] = [()] * len(split)
        seconds, outs, of_queries = [], [], []
        for rank, steps in enumerate(self.steps):
            query, _, _, grad = split[rank]
            there = [(rank - step.behind) % len(self.ranges) for step in steps]
            begin = time.process_time()
            parts = Parts(query, row[2].shape[-1])
            for step, owner in zip(steps, there, strict=True):
                forward(parts, query, split[owner][1], split[owner][2], step.blocks, scale=HEAD_DIM**-0.5)
            out, lse = parts.finished(None)
            grad_query = torch.zeros_like(query) if gradients else query
            for step, owner in zip(steps, there, strict=True) if gradients else ():
                if step.behind and not step.blocks:
                    continue
                key, value = split[owner][1:3]
                grads = Gradients(grad_query, torch.zeros_like(key), torch.zeros_like(value))
                backward(grads, grad, query, key, value, out, lse, step.blocks, scale=HEAD_DIM**-0.5)
                sums = (grads.key, grads.value)
                for mine, others in zip(sums, of_keys[owner], strict=False):
                    # As in the ring, where the sums so far come from the rank before.
                    mine.add_(others)
                of_keys[owner] = sums
            seconds.append(time.process_time() - begin)
            outs.append(out)
            of_queries.append(grad_query)
        ranges: list[Sequence[Tensor]] = [outs]
        if gradients:
            ranges += [of_queries, *zip(*of_keys, strict=True)]
        results = [torch.empty(len(row[0]), *part[0].shape[1:]) for part in ranges]
        for whole, part in zip(results, ranges, strict=True):
            for mine, found in zip(self.ranges, part, strict=True):
                whole[mine] = found
        return seconds, results


def make_row(tokens: int, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    """Query, key, value and a gradient of the result: [tokens, heads, HEAD_DIM] float32."""
    torch.manual_seed(0)
    return tuple(torch.randn(tokens, count, HEAD_DIM) for count in (heads, kv_heads, kv_heads, heads))


# ------------------------------------------------------------------------------------------------ b: balance


@dataclass(frozen=True)
class Balance:
    """How evenly one way to split a row distributes the work of attention. Ratios: slowest rank / mean of all ranks."""

    row: str
    context: int
    split: str
    pairs_ratio: float
    """Ratio of the numbers of (query, key) pairs; the mean over rows."""
    seconds_ratio: float
    seconds: list[float]
    """CPU seconds of each rank for the first row, forward and backward; medians over rounds."""
    calls: int
    """Calls of a varlen kernel on CUDA in the forward pass of the first row, by the rank with the most calls."""
    blocks: int
    """Number of blocks of that rank."""


def pairs(steps: Steps) -> int:
    """Number of (query, key) pairs of a rank."""
    return sum(_pairs(one) for step in steps for one in step.blocks)


def _pairs(one: Block) -> int:
    return one.queries * one.keys - (one.queries * (one.queries - 1) // 2 if one.causal else 0)


def balance(tokens: int, contexts: Sequence[int], rounds: int) -> list[Balance]:
    """Runs part b."""
    row, found = make_row(tokens, 9, 3), []
    packed = {f"packed, mean {mean}": packed_rows(mean, tokens, 100) for mean in (100, 1000)}
    for name, rows in ({"one example": [(0, tokens)]} | packed).items():
        for size in contexts:
            rings = {split: [Ring.of(each, size, split) for each in rows] for split in SPLITS}
            taken: dict[str, list[list[float]]] = {split: [] for split in SPLITS}
            for _ in range(rounds):
                for split in SPLITS:
                    taken[split].append(rings[split][0].run(row, gradients=True)[0])
            for split in SPLITS:
                seconds = [statistics.median(each) for each in zip(*taken[split], strict=True)]
                uneven = statistics.mean(_ratio([pairs(steps) for steps in ring.steps]) for ring in rings[split])
                first = rings[split][0].steps
                calls = [sum(1 for step in steps for _ in call_groups(step.blocks)) for steps in first]
                most = calls.index(max(calls))
                made = sum(len(step.blocks) for step in first[most])
                label = f"{name} ({len(rows[0]) - 1})"
                found.append(Balance(label, size, split, uneven, _ratio(seconds), seconds, calls[most], made))
    return found


def _ratio(values: Sequence[float]) -> float:
    return max(values) / statistics.mean(values)


def balance_table(found: Sequence[Balance]) -> str:
    """The printed table of part b."""
    lines = [
        f"{'row (examples)':26} {'CP':>3} {'split':11} {'pairs, slowest/mean':>20} {'seconds, slowest/mean':>22} {'calls':>6} {'blocks':>7}"
    ]
    lines += [
        f"{one.row:26} {one.context:3} {one.split:11} {one.pairs_ratio:20.3f} {one.seconds_ratio:22.3f} {one.calls:6} {one.blocks:7}"
        for one in found
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ c: overhead


@dataclass
class Overhead:
    """Time and error of one way to compute attention for one row, on one thread."""

    row: str
    heads: str
    way: str
    passes: str
    seconds: list[float] = field(default_factory=list)
    """CPU seconds of all ranks together, one value per round."""
    difference: float = 0.0
    """Largest difference of the result or a gradient from torch's kernel, divided by the largest element of torch's."""
    ratios: dict[str, float] = field(default_factory=dict)
    """Median over rounds of seconds / PEER's seconds and seconds / PLAIN's seconds, both of the same round."""


PEER, PLAIN = "torch's kernel", "plain"


def torch_kernel(row: Sequence[Tensor], cu_seqlens: Sequence[int], gradients: bool) -> list[Tensor]:
    """torch's flash kernel for the CPU and its backward kernel: out, then dQ, dK, dV with `gradients`."""
    found = []
    for begin, end in zip(cu_seqlens, cu_seqlens[1:], strict=False):
        query, key, value, grad = (x[begin:end].transpose(0, 1)[None] for x in row)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, True, scale=HEAD_DIM**-0.5
        )
        results = (out,)
        if gradients:
            results += torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, query, key, value, out, lse, 0.0, True, scale=HEAD_DIM**-0.5
            )
        found.append([x[0].transpose(0, 1) for x in results])
    return [torch.cat(each) for each in zip(*found, strict=True)]


def plain_attention(row: Sequence[Tensor], cu_seqlens: Sequence[int], gradients: bool) -> list[Tensor]:
    """ops/attention.py: out, then dQ, dK, dV with `gradients`."""
    given = [x.detach().requires_grad_(gradients) for x in row[:3]]
    out = attention(
        *given,
        bounds=cu_seqlens,
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
        scale=HEAD_DIM**-0.5,
        window=None,
    )
    return [out.detach(), *(torch.autograd.grad(out, given, row[3]) if gradients else ())]


def overhead(tokens: int, contexts: Sequence[int], rounds: int) -> list[Overhead]:
    """Runs part c. Rows of short examples are measured with grouped key heads only."""
    found, packed = [], {mean: packed_rows(mean, tokens, 1)[0] for mean in (1000, 100)}
    for heads, kv_heads, name, cu_seqlens in (
        (9, 3, "one example", (0, tokens)),
        (8, 8, "one example", (0, tokens)),
        *((9, 3, f"packed, mean {mean}", row) for mean, row in packed.items()),
    ):
        row = make_row(tokens, heads, kv_heads)
        for gradients in (False, True):
            found += _overhead(row, cu_seqlens, contexts, rounds, gradients, (name, f"{heads}/{kv_heads}"))
    return found


def _overhead(
    row: Sequence[Tensor],
    cu_seqlens: tuple[int, ...],
    contexts: Sequence[int],
    rounds: int,
    gradients: bool,
    said: tuple[str, str],
) -> list[Overhead]:
    def timed(way: Callable[..., list[Tensor]]) -> tuple[float, list[Tensor]]:
        begin = time.process_time()
        results = way(row, cu_seqlens, gradients)
        return time.process_time() - begin, results

    def ring(ranks: Ring) -> tuple[float, list[Tensor]]:
        seconds, results = ranks.run(row, gradients=gradients)
        return sum(seconds), results

    ways: dict[str, Callable[[], tuple[float, list[Tensor]]]] = {
        PEER: lambda: timed(torch_kernel),
        PLAIN: lambda: timed(plain_attention),
    }
    for size in contexts:
        ways[f"CP {size}"] = partial(ring, Ring.of(cu_seqlens, size))
    passes = "forward + backward" if gradients else "forward"
    found = {way: Overhead(*said, way, passes) for way in ways}
    # Also a warm-up: the first call of each in a process takes longer.
    expected, *_ = [job()[1] for job in ways.values()]
    for _ in range(rounds):
        for way, job in ways.items():
            seconds, results = job()
            found[way].seconds.append(seconds)
            found[way].difference = max(
                float((ours - theirs).abs().max() / theirs.abs().max())
                for ours, theirs in zip(results, expected, strict=False)
            )
            assert found[way].difference < 1e-4, f"{way} computes something else: {found[way].difference}"
    for one in found.values():
        for base in (PEER, PLAIN):
            rates = [mine / theirs for mine, theirs in zip(one.seconds, found[base].seconds, strict=True)]
            one.ratios[base] = statistics.median(rates)
    return list(found.values())


def overhead_table(found: Sequence[Overhead]) -> str:
    """The printed table of part c."""
    lines = [
        f"{'row':18} {'heads':>5} {'passes':18} {'way':14} {'seconds':>8} {'x torch':>8} {'x plain':>8} {'difference':>11}"
    ]
    for one in found:
        beyond = f"  above {AIM}" if one.way.startswith("CP") and one.ratios[PLAIN] > AIM else ""
        lines.append(
            f"{one.row:18} {one.heads:>5} {one.passes:18} {one.way:14} {statistics.median(one.seconds):8.3f} {one.ratios[PEER]:8.2f} "
            f"{one.ratios[PLAIN]:8.2f} {one.difference:11.1e}{beyond}"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ d: padding


@dataclass(frozen=True)
class Padding:
    """Padding tokens / all tokens of the padded rows, in per cent, for one layout and one set of examples."""

    layout: str
    mean: int
    """Mean number of tokens of an example."""
    by_row: float
    """Ours: only the row is padded."""
    by_example: float
    """Each example is padded to a multiple of 2 · CP, and the row as ours. Kernels that split each example need this."""


def layouts() -> Iterator[Layout]:
    """Rings of 2 to 64 ranks, alone and with sequence parallelism over 2 to 8 tensor ranks."""
    for size in (2, 4, 8, 16, 32, 64):
        for tensor in (1, 2, 4, 8):
            yield Layout(
                world=size * tensor,
                layers=(1,),
                tensor=tensor,
                expert_tensor=tensor,
                context=size,
                mesh=Mesh(1, size),
                sequence=tensor > 1,
            )


def padding(max_length: int, means: Sequence[int], count: int) -> list[Padding]:
    """Runs part d: packs `count` examples of log-normal lengths."""
    found = []
    for mean in means:
        sizes = lengths(mean, 1.0, count, max_length)
        rows = [sum(sizes[i] for i in row) for row in pack_examples(sizes, max_length)]
        for layout in layouts():
            ours = [-row % layout.row_multiple for row in rows]
            padded = [size + -size % (2 * layout.context) for size in sizes]
            theirs = [sum(padded[i] for i in row) for row in pack_examples(padded, max_length)]
            total = sum(row + -row % layout.row_multiple for row in theirs)
            found.append(
                Padding(
                    layout.name, mean, 100 * sum(ours) / (sum(rows) + sum(ours)), 100 * (total - sum(sizes)) / total
                )
            )
    return found


def padding_table(found: Sequence[Padding]) -> str:
    """The printed table of part d."""
    means = list(dict.fromkeys(one.mean for one in found))
    lines = [f"{'layout':18}" + "".join(f" {f'mean {mean}: by row':>20} {'by example':>11}" for mean in means)]
    for name in dict.fromkeys(one.layout for one in found):
        cells = [f" {one.by_row:18.3f} % {one.by_example:9.2f} %" for one in found if one.layout == name]
        lines.append(f"{name:18}" + "".join(cells))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ the run


def part(
    name: str, tokens: int, rounds: int, examples: int = 20000
) -> tuple[list[Balance] | list[Overhead] | list[Padding], str]:
    """The results of one part, and its table. examples: number of examples in part d."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if name == "b":
            balanced = balance(tokens, (2, 4, 8), rounds)
            return balanced, balance_table(balanced)
        if name == "c":
            measured = overhead(tokens, (1, 2, 4, 8), rounds)
            return measured, overhead_table(measured)
        padded = padding(8192, (100, 1000), examples)
        return padded, padding_table(padded)
    finally:
        torch.set_num_threads(threads)
