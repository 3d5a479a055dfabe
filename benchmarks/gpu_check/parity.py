"""One rank and transformers: logits, loss and all gradients of both, compared with transformers in float64.

bfloat16 and float32 round, so a fixed limit cannot tell rounding from a defect. The limit is a multiple of transformers' own error in the
same dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.bench import Bench, DtypeName, computed_by, network, relative, run_of, summed_loss
from benchmarks.gpu_check.record import Stage
from swift_mega.convert.files.hf_files import Checkpoint
from swift_mega.verify import parity

FACTOR = 1.5
"""The limit of our error is FACTOR · transformers' error in the same dtype."""
LEAST = {"bfloat16": 5e-3, "float32": 1e-5}
"""The smallest limit: the error of a mean loss may be almost 0 by chance."""
LENGTHS = (700, 5, 321, 1022)
SMALL_LENGTHS = (70, 5, 33, 20)


@dataclass(frozen=True)
class Found:
    """The results of one side in one dtype."""

    logits: Tensor
    """[tokens, vocab] of all examples."""
    loss: float
    gradients: dict[str, Tensor]
    """Hugging Face name -> gradient."""
    by: str = "transformers"
    """Backends."""


@dataclass(frozen=True)
class Errors:
    """Differences from float64; all relative, except for the loss."""

    logits: float
    loss: float
    gradients: float
    """Error of all gradients as one vector."""
    worst: float
    """The largest error of a single gradient tensor."""
    tensor: str
    by: str


def run(bench: Bench, stage: Stage) -> None:
    """Runs the stage."""
    size = bench.size("smol")
    lengths = SMALL_LENGTHS if bench.small else LENGTHS
    rows = [parity.example_rows(bench.vocab(size), examples=1, shortest=n, longest=n, seed=n)[0] for n in lengths]
    exact = theirs(bench, size, rows, torch.float64)
    for dtype in LEAST:
        judge(stage, dtype, *errors(bench, size, rows, dtype, exact))


def judge(stage: Stage, dtype: str, ours: Errors, theirs: Errors) -> None:
    """Writes the checks for one dtype to the record."""
    stage.fact(f"{dtype}: computed by", ours.by)
    for name in ("logits", "loss", "gradients", "worst"):
        mine, others = getattr(ours, name), getattr(theirs, name)
        of = f" ({ours.tensor})" if name == "worst" else ""
        stage.check(f"{dtype} {name}{of}; transformers {others:.1e}", mine, max(FACTOR * others, LEAST[dtype]))


def errors(
    bench: Bench, size: str, rows: Sequence[list[int]], dtype: DtypeName | str, exact: Found
) -> tuple[Errors, Errors]:
    """(our errors, transformers' errors)."""
    mine = errors_of(ours(bench, size, rows, dtype), exact)
    return mine, errors_of(theirs(bench, size, rows, getattr(torch, dtype)), exact)


def errors_of(found: Found, exact: Found) -> Errors:
    assert found.gradients.keys() == exact.gradients.keys(), found.gradients.keys() ^ exact.gradients.keys()
    by_tensor = {name: relative(found.gradients[name], grad) for name, grad in exact.gradients.items()}
    worst = max(by_tensor, key=lambda name: by_tensor[name])
    together = relative(_joined(found.gradients, exact.gradients), _joined(exact.gradients, exact.gradients))
    return Errors(
        relative(found.logits, exact.logits), abs(found.loss - exact.loss), together, by_tensor[worst], worst, found.by
    )


def _joined(gradients: dict[str, Tensor], order: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in order])


def theirs(bench: Bench, size: str, rows: Sequence[list[int]], dtype: torch.dtype) -> Found:
    """The results of transformers, one example at a time."""
    net = network(bench, bench.model(size), dtype)
    count, total, logits = sum(len(row) - 1 for row in rows), 0.0, []
    for row in rows:
        tokens = torch.tensor(row, device=bench.device.device)
        with torch.no_grad():
            logits.append(net(input_ids=tokens[None], use_cache=False).logits[0].double().cpu())
        loss = summed_loss(net, tokens) / count
        loss.backward()
        total += float(loss.detach())
    gradients = {name: x.grad.double().cpu() for name, x in net.named_parameters() if x.grad is not None}
    del net, loss
    bench.free()
    return Found(torch.cat(logits), total, gradients)


def ours(bench: Bench, size: str, rows: Sequence[list[int]], dtype: Any) -> Found:
    """Our results, with two examples in each packed row, by the code of `swift-mega verify`."""
    folder = bench.folder / f"parity-{size}-{dtype}"
    with bench.training(run_of(bench.model(size), dtype, "full")) as training:
        parity.write_measured(training, rows, folder)
        by = computed_by(training)
    return _read(folder, len(rows), by)


def _read(folder: Path, count: int, by: str) -> Found:
    from safetensors.torch import load_file

    logits, gradients = load_file(folder / "logits-0.safetensors"), Checkpoint(folder / "gradients")
    return Found(
        torch.cat([logits[f"logits.{number}"] for number in range(count)]).double(),
        float(logits["loss"]),
        {name: gradients.read(name).double() for name in gradients.entries},
        by,
    )
