"""The difference of two models at each point (see `states`), and the first point where it is too large.

The first model writes its hidden states to a folder, one file per point and prompt. The second model is compared with them while it
runs. So the two models are never in memory together, and only one state of each is.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from swift_mega.device.device import Device
from swift_mega.parallel.agree import agree, gather, on_first_rank
from swift_mega.verify.states import Rows, Side, Take, point_names, run_side

BLOCK = 1 << 22
"""Number of elements of a state that are compared at once, in float64."""
TINY = 1e-30
VALUE = "value"
TOLERANCES = {"float64": 1e-5, "float32": 1e-4, "bfloat16": 0.2}
"""Default tolerance of the relative difference, by dtype.

Measured between Megatron-core and transformers, on tiny models of every family and on SmolLM2-135M: up to 1.6e-5 in float32; up to 1.9e-6
in float64 (transformers computes norms and rotary angles in float32 even then); up to 0.14 in bfloat16. With experts it is up to 0.9 in
bfloat16, because rounded router scores choose other experts; compare such models in float32.
"""


@dataclass
class Distance:
    """The difference of the second model from the first (the reference) at one point, over all tokens of all prompts."""

    point: str
    max_abs: float = 0.0
    """Largest absolute difference of two elements."""
    relative: float = 0.0
    """‖difference‖ / ‖reference‖ (Euclidean norms) of the worst token.

    The largest difference is no good measure: states of most models have a few very large elements, and their rounding error alone is
    larger than all other elements."""
    cosine: float = 1.0
    """Cosine similarity of the two states of a token; of the worst token."""
    prompt: int = 0
    """Prompt of the token with the largest relative difference."""
    token: int = 0

    def add(self, prompt: int, first: int, want: Tensor, have: Tensor) -> None:
        """Adds tokens. want, have: [tokens, width] float64 of `prompt`, from its token `first` on."""
        off = (have - want).abs().amax(dim=-1)
        relative = (have - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(TINY)
        off, relative = (torch.nan_to_num(value, nan=math.inf, posinf=math.inf) for value in (off, relative))
        worst = int(relative.argmax())
        if float(relative[worst]) > self.relative:
            self.relative, self.prompt, self.token = float(relative[worst]), prompt, first + worst
        self.max_abs = max(self.max_abs, float(off.max()))
        lengths = want.norm(dim=-1) * have.norm(dim=-1)
        cosine = (want * have).sum(dim=-1) / lengths.clamp_min(TINY)
        cosine = torch.where(off == 0, torch.ones_like(off), torch.nan_to_num(cosine, nan=-1.0))
        self.cosine = min(self.cosine, float(cosine.min()))


@dataclass(frozen=True)
class Disagreement:
    """The first position where the most likely next tokens of the two models differ."""

    prompt: int
    position: int
    a: int
    b: int
    text_a: str | None = None
    text_b: str | None = None

    def __str__(self) -> str:
        a, b = (
            f"{number}" if text is None else f"{text!r}"
            for number, text in ((self.a, self.text_a), (self.b, self.text_b))
        )
        return f"prompt {self.prompt}, position {self.position}: {a} in A, {b} in B"


@dataclass
class Agreement:
    """How often the two models predict the same next token, over all positions of all prompts."""

    k: int
    positions: int = 0
    top_1: int = 0
    """Number of positions with the same most likely token."""
    top_k: int = 0
    """Number of tokens that are among the k most likely ones of both models, summed over positions."""
    divergence: float = 0.0
    """Sum over positions of KL(A, B), in nats."""
    first: Disagreement | None = None

    def add(self, prompt: int, first: int, want: Tensor, have: Tensor) -> None:
        """Adds logits. want, have: [tokens, vocabulary] float64 of `prompt`, from its token `first` on. Call it with prompts in order."""
        a, b = want.topk(self.k).indices, have.topk(self.k).indices
        # In bfloat16 the most likely tokens often have equal logits. A's token agrees if no token has a larger logit in B.
        same = have.gather(1, a[:, :1])[:, 0] >= have.gather(1, b[:, :1])[:, 0]
        self.positions += len(want)
        self.top_1 += int(same.sum())
        self.top_k += int((a[:, :, None] == b[:, None, :]).sum())
        log_a, log_b = want.log_softmax(dim=-1), have.log_softmax(dim=-1)
        self.divergence += float((log_a.exp() * (log_a - log_b)).sum())
        if self.first is None and not bool(same.all()):
            place = int((~same).nonzero()[0])
            self.first = Disagreement(prompt, first + place, int(a[place, 0]), int(b[place, 0]))


@dataclass(frozen=True)
class Comparison:
    """The comparison of model B with model A, the reference."""

    a: str
    b: str
    dtype: str
    tolerance: float
    prompts: int
    distances: tuple[Distance, ...]
    agreement: Agreement
    notes: tuple[str, ...] = ()

    @property
    def first_difference(self) -> Distance | None:
        """The first point whose relative difference is larger than the tolerance, or is NaN."""
        return next((found for found in self.distances if not found.relative <= self.tolerance), None)

    @property
    def passed(self) -> bool:
        """Whether the relative difference is within the tolerance at every point."""
        return self.first_difference is None

    def table(self) -> str:
        """A line for each point, the agreement of next tokens, and the result."""
        agreed, first = self.agreement, self.first_difference
        lines = [*self.notes, f"A  {self.a}", f"B  {self.b}", ""]
        lines.append(f"{'point':12} {'max abs':>9} {'relative':>9} {'cosine':>10}  {'':4} worst at")
        for found in self.distances:
            ok = "ok" if found.relative <= self.tolerance else "FAIL"
            place = f"prompt {found.prompt}, token {found.token}" if found.relative else ""
            lines.append(
                f"{found.point:12} {found.max_abs:9.1e} {found.relative:9.1e} {found.cosine:10.7f}  {ok:4} {place}".rstrip()
            )
        lines += ["", f"top-1   {agreed.top_1} of {agreed.positions} positions agree"]
        if agreed.first is not None:
            lines.append(f"        first different token at {agreed.first}")
        lines.append(
            f"top-{agreed.k:<3} {100 * agreed.top_k / (agreed.k * agreed.positions):.2f}% of the tokens are in both"
        )
        lines.append(f"KL      {agreed.divergence / agreed.positions:.1e} nats per position")
        of = f"({self.dtype}, {self.prompts} prompts; relative: rms(B - A) / rms(A) of a token)"
        if first is None:
            return "\n".join([*lines, f"A and B are equal within {self.tolerance:g} at every point {of}"])
        return "\n".join(
            [
                *lines,
                f"first difference at {first.point}: {first.relative:.1e}, beyond the tolerance of {self.tolerance:g} {of}",
            ]
        )

    def record(self) -> dict[str, Any]:
        """The object that `write_json` writes. NaN and infinities become None (null), because JSON does not have them."""
        agreed = self.agreement
        return {
            "a": self.a,
            "b": self.b,
            "dtype": self.dtype,
            "tolerance": self.tolerance,
            "prompts": self.prompts,
            "passed": self.passed,
            "first_difference": None if self.first_difference is None else self.first_difference.point,
            "points": [{key: _finite(value) for key, value in asdict(found).items()} for found in self.distances],
            "positions": agreed.positions,
            "k": agreed.k,
            "top_1": agreed.top_1 / agreed.positions,
            "top_k": agreed.top_k / (agreed.k * agreed.positions),
            "kl": _finite(agreed.divergence / agreed.positions),
            "first_disagreement": None if agreed.first is None else asdict(agreed.first),
            "notes": list(self.notes),
        }

    def write_json(self, path: Path) -> None:
        """Writes `record` as a JSON file, atomically."""
        text = json.dumps(self.record(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        _write_whole(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))

    def plot(self, path: Path) -> None:
        """Writes a PNG: relative difference at each point on a logarithmic axis, with the tolerance."""
        from matplotlib.figure import Figure

        names = [found.point.removeprefix("layer ") for found in self.distances]
        values = [found.relative if 0 < found.relative < math.inf else math.nan for found in self.distances]
        figure = Figure(figsize=(max(8, 0.22 * len(names)), 5), dpi=100, layout="constrained")
        axes = figure.subplots()
        axes.semilogy(
            range(len(names)), values, color="tab:blue", marker="o", markersize=3, label="relative difference"
        )
        axes.axhline(self.tolerance, color="tab:gray", linestyle="--", label=f"tolerance {self.tolerance:g}")
        if self.first_difference is not None:
            place = self.distances.index(self.first_difference)
            axes.axvline(place, color="tab:red", alpha=0.5, label=f"first difference at {self.first_difference.point}")
        axes.set_xticks(range(len(names)), names, rotation=90 if len(names) > 12 else 30, fontsize=8)
        verdict = (
            "equal within the tolerance"
            if self.passed
            else f"first difference at {self.first_difference and self.first_difference.point}"
        )
        axes.set(xlabel="point", ylabel="rms(B - A) / rms(A), worst token", title=f"A and B: {verdict} ({self.dtype})")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        _write_whole(path, lambda scratch: figure.savefig(scratch, format="png"))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    scratch = path.with_name(path.name + ".part")
    write(scratch)
    scratch.replace(path)


# ------------------------------------------------------------------------------------------------ in ranks


class _Kept:
    """Calls `take` until it fails, and keeps the error. A rank that cannot read or write still takes part in the pipeline."""

    def __init__(self, take: Take, folder: Path) -> None:
        self.take, self.folder = take, folder
        self.problem: str | None = None

    def __call__(self, prompt: int, point: int, value: Tensor) -> None:
        if self.problem is None:
            try:
                self.take(prompt, point, value)
            except (OSError, SafetensorError) as error:
                self.problem = f"{self.folder}: {error}; free the space, or name another folder with --scratch"


def record(side: Side, device: Device, rows: Rows, dtype: torch.dtype, folder: Path) -> None:
    """Runs the reference and writes its states to `folder`, which exists and is visible to all ranks. Collective."""

    def take(prompt: int, point: int, value: Tensor) -> None:
        path = _place(folder, prompt, point)
        path.parent.mkdir(exist_ok=True)
        save_file({VALUE: value.detach().cpu().contiguous()}, path)

    kept = _Kept(take, folder)
    run_side(side, device, rows, dtype, kept, folder)
    agree(kept.problem)


def measure(
    side: Side, device: Device, rows: Rows, dtype: torch.dtype, folder: Path, k: int
) -> tuple[tuple[Distance, ...], Agreement]:
    """Runs the other side and compares it with the states that `record` wrote. k: of top-k. Collective; returns the same on every rank."""
    names = point_names(side.layers)
    distances: dict[int, Distance] = {}
    agreement = Agreement(k)

    def take(prompt: int, point: int, value: Tensor) -> None:
        distance = distances.setdefault(point, Distance(names[point]))
        with safe_open(_place(folder, prompt, point), framework="pt") as file:
            kept = file.get_slice(VALUE)
            tokens, width = kept.get_shape()
            assert (tokens, width) == tuple(value.shape), f"{names[point]}: {[tokens, width]} and {list(value.shape)}"
            step = max(1, BLOCK // width)
            for first in range(0, tokens, step):
                want, have = kept[first : first + step].double(), value[first : first + step].cpu().double()
                distance.add(prompt, first, want, have)
                if point == len(names) - 1:
                    agreement.add(prompt, first, want, have)

    scratch = folder / "other"
    agree(on_first_rank(scratch.mkdir))
    kept = _Kept(take, folder)
    run_side(side, device, rows, dtype, kept, scratch)
    agree(kept.problem)
    every = gather((distances, agreement))
    merged = {point: distance for found, _ in every for point, distance in found.items()}
    assert len(merged) == sum(len(found) for found, _ in every) == len(names), sorted(merged)
    spoke = next(found for _, found in every if found.positions)
    return tuple(merged[point] for point in range(len(names))), spoke


def _place(folder: Path, prompt: int, point: int) -> Path:
    return folder / f"prompt{prompt}" / f"{point}.safetensors"


def texts(found: Agreement, decode: Callable[[Sequence[int]], str]) -> Disagreement | None:
    """The first disagreement, with the text of its tokens."""
    first = found.first
    return first and Disagreement(first.prompt, first.position, first.a, first.b, decode([first.a]), decode([first.b]))
