"""A plan as people read it: what becomes of every tensor, what each stage's ranks hold, and what they read."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from swift_mega.convert.blueprint import Blueprint, Share, byte_ranges, check_tiling, shares
from swift_mega.convert.check import Coverage, check_coverage
from swift_mega.convert.files.hf_files import some
from swift_mega.convert.files.quantised import Dequantised
from swift_mega.convert.files.tensors import TensorSource
from swift_mega.convert.files.which_files import unread
from swift_mega.parallel.layout import Coordinate, Layout


@dataclass(frozen=True)
class Stage:
    """One rank of a pipeline stage; its ranks differ only in which share they hold."""

    stage: int
    ranks: int
    layers: tuple[int, ...]
    parameters: int
    """Of one rank, a vocabulary's padding included."""
    bytes: int
    """Of these, in the dtype of the result."""
    reads: int | None
    """Bytes of the files that one rank asks for; None without weights."""
    ranges: int | None
    """In how many runs."""


@dataclass(frozen=True)
class Plan:
    """What a conversion would do."""

    model: str
    layout: str
    ranks: int
    dtype: str
    parameters: int
    """Of the model: every one of them is held once by the ranks of a replica."""
    tensors: int
    source_bytes: int | None
    carried: Mapping[str, str]
    left: Mapping[str, str]
    stages: tuple[Stage, ...]
    notes: tuple[str, ...] = ()
    """What config.json says and nothing does."""
    beside: str | None = None
    """What lies beside the weights and is not read."""

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def table(self) -> str:
        """Some lines of text."""
        weights = (
            "no weights, from config.json alone"
            if self.source_bytes is None
            else f"{_size(self.source_bytes)} in files"
        )
        lines = [
            f"model     {self.model}: {self.parameters:,} parameters in {self.tensors:,} tensors; {weights}",
            f"layout    {self.layout}: {self.ranks:,} rank{'s' * (self.ranks != 1)}, {self.dtype}",
        ]
        if self.source_bytes is not None:
            lines.append(
                f"coverage  all {self.tensors:,} tensors are there, none twice; {rest_of(self.carried, self.left)}"
            )
        lines += [f"note      {note}" for note in self.notes]
        if self.beside is not None:
            lines.append(f"beside    {self.beside}")
        lines.append("check     every number is held by exactly one rank of a replica")
        lines.append(
            f"{'stage':>5} {'ranks':>6} {'layers':>12} {'parameters/rank':>16} {'size/rank':>10} {'reads/rank':>11} {'runs':>7}"
        )
        for stage in self.stages:
            reads = "-" if stage.reads is None else _size(stage.reads)
            lines.append(
                f"{stage.stage:5} {stage.ranks:6,} {_ranges(stage.layers):>12} {stage.parameters:16,} {_size(stage.bytes):>10} "
                f"{reads:>11} {'-' if stage.ranges is None else format(stage.ranges, ','):>7}"
            )
        return "\n".join(lines)


def make(
    blueprint: Blueprint,
    layout: Layout,
    *,
    dtype: torch.dtype,
    directory: Path,
    checkpoint: TensorSource | None,
    vocab_divisible_by: int = 128,
) -> Plan:
    """The plan for a layout; UserError where the checkpoint (None: there is only a config) does not fit its config."""
    covered: Coverage | None = None
    if checkpoint is not None:
        covered = check_coverage(blueprint.family, blueprint.settings, checkpoint, blueprint.wanted)
    parameters = check_tiling(blueprint, layout, vocab_divisible_by=vocab_divisible_by)
    return Plan(
        model=str(directory),
        layout=layout.name,
        ranks=layout.world,
        dtype=str(dtype).removeprefix("torch."),
        parameters=parameters,
        tensors=len(covered.read) if covered else len(blueprint.wanted),
        source_bytes=sum(entry.bytes for entry in checkpoint.entries.values()) if checkpoint else None,
        carried=covered.carried if covered else {},
        left=covered.left if covered else {},
        stages=tuple(
            _stage(blueprint, layout, stage, dtype, checkpoint, vocab_divisible_by) for stage in range(layout.pipeline)
        ),
        notes=blueprint.settings.notes,
        beside=unread(directory) if checkpoint is not None else None,
    )


def _stage(
    blueprint: Blueprint,
    layout: Layout,
    stage: int,
    dtype: torch.dtype,
    checkpoint: TensorSource | None,
    divisible_by: int,
) -> Stage:
    where = Coordinate(tensor=0, pipeline=stage, context=0, data=0, expert=0, expert_tensor=0, expert_data=0)
    held = list(shares(blueprint, layout, where, vocab_divisible_by=divisible_by))
    numbers = sum(torch.Size(share.shape).numel() for share in held)
    layers = sorted({share.slot.numbers["i"] for share in held if "i" in share.slot.numbers})
    plain = (
        checkpoint if not isinstance(checkpoint, Dequantised) else None
    )  # of others, what a slice reads is the format's affair
    reads = _reads(plain, held) if plain else (None, None)
    return Stage(
        stage, layout.world // layout.pipeline, tuple(layers), numbers, numbers * dtype.itemsize, reads[0], reads[1]
    )


def _reads(checkpoint: TensorSource, held: Sequence[Share]) -> tuple[int, int]:
    spans = [span for share in held for _, span in byte_ranges(checkpoint, share)]
    return sum(span.bytes for span in spans), sum(span.runs for span in spans)


def rest_of(carried: Mapping[str, str], left: Mapping[str, str]) -> str:
    """What becomes of the tensors that the model does not compute with."""
    said = [
        f"{count} {word} ({why})"
        for found, word in ((carried, "kept as they are"), (left, "left out"))
        for why, count in Counter(found.values()).items()
    ]
    return "; ".join(said) or "nothing else is in the files"


def _ranges(numbers: Sequence[int]) -> str:
    """'0-7,16-23'."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return some([str(a) if a == b else f"{a}-{b}" for a, b in runs], 4).replace(", ", ",")


def _size(count: float) -> str:
    power = min(len(str(int(count))) - 1, 12) // 3
    return f"{count / 1000**power:.{2 if power else 0}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
