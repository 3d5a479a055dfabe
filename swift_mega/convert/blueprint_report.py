"""The report on a conversion before it runs: what happens to each tensor, what the ranks of each stage hold, and how much they read."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from swift_mega.convert.blueprint import Blueprint, Shard, byte_ranges, check_tiling, shards_of
from swift_mega.convert.check import Coverage, check_coverage
from swift_mega.convert.files.hf_files import some
from swift_mega.convert.files.quantised import Dequantised
from swift_mega.convert.files.tensors import TensorSource
from swift_mega.convert.files.which_files import unread
from swift_mega.parallel.layout import Coordinate, Layout


@dataclass(frozen=True)
class Stage:
    """One rank of a pipeline stage; the ranks of a stage differ only in which shard they hold."""

    stage: int
    ranks: int
    layers: tuple[int, ...]
    parameters: int
    """Of one rank, including the padding of a vocabulary."""
    bytes: int
    """Size of these parameters in the output dtype."""
    reads: int | None
    """Bytes that one rank reads from the files; None without weights."""
    ranges: int | None
    """How many contiguous runs of bytes that is."""


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion will do."""

    model: str
    layout: str
    ranks: int
    dtype: str
    parameters: int
    """Of the model, each counted once; the ranks of a replica hold each of them exactly once."""
    tensors: int
    source_bytes: int | None
    carried: Mapping[str, str]
    left: Mapping[str, str]
    stages: tuple[Stage, ...]
    notes: tuple[str, ...] = ()
    """Fields of config.json that have no effect here."""
    beside: str | None = None
    """Files next to the weights that are not read."""

    def as_json(self) -> dict[str, Any]:
        """As a dict of JSON types."""
        return asdict(self)

    def table(self) -> str:
        """As lines of text for the terminal."""
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
                f"coverage  all {self.tensors:,} tensors are found, none twice; {rest_of(self.carried, self.left)}"
            )
        lines += [f"note      {note}" for note in self.notes]
        if self.beside is not None:
            lines.append(f"beside    {self.beside}")
        lines.append("check     every element is on exactly one rank of a replica")
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
) -> ConversionReport:
    """The report for a layout; UserError where the checkpoint does not fit its config. checkpoint: None where there is only a config."""
    covered: Coverage | None = None
    if checkpoint is not None:
        covered = check_coverage(blueprint.family, blueprint.settings, checkpoint, blueprint.wanted)
    parameters = check_tiling(blueprint, layout, vocab_divisible_by=vocab_divisible_by)
    return ConversionReport(
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
    shards = list(shards_of(blueprint, layout, where, vocab_divisible_by=divisible_by))
    numbers = sum(torch.Size(shard.shape).numel() for shard in shards)
    layers = sorted({shard.slot.numbers["i"] for shard in shards if "i" in shard.slot.numbers})
    # For a quantised checkpoint the format decides what a slice reads, so byte ranges are not known here.
    plain = checkpoint if not isinstance(checkpoint, Dequantised) else None
    reads = _reads(plain, shards) if plain else (None, None)
    return Stage(
        stage, layout.world // layout.pipeline, tuple(layers), numbers, numbers * dtype.itemsize, reads[0], reads[1]
    )


def _reads(checkpoint: TensorSource, shards: Sequence[Shard]) -> tuple[int, int]:
    spans = [span for shard in shards for _, span in byte_ranges(checkpoint, shard)]
    return sum(span.bytes for span in spans), sum(span.runs for span in spans)


def rest_of(carried: Mapping[str, str], left: Mapping[str, str]) -> str:
    """A phrase on the tensors that the model does not compute with: carried or left out, and why."""
    said = [
        f"{count} {word} ({why})"
        for found, word in ((carried, "kept unchanged"), (left, "not copied"))
        for why, count in Counter(found.values()).items()
    ]
    return "; ".join(said) or "the files have no other tensors"


def _ranges(numbers: Sequence[int]) -> str:
    """Layer numbers as ranges, such as '0-7,16-23'."""
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
