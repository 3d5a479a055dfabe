"""Outputs for records of numbers: logging.jsonl, TensorBoard, wandb, plots and the progress bar.

A sink gets every record and uses the numbers that it can show. A heavy package is imported only by the sink that needs it, when the sink
is opened or first draws.
"""

import contextlib
import importlib
import importlib.util
import io
import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from swift_mega.config import schema
from swift_mega.errors import UserError

Record = dict[str, Any]

# Keys of a record whose values are text about progress, so they are not drawn as curves.
NOT_CURVES = frozenset({"iteration", "elapsed_time", "remaining_time"})
NOT_DRAWN = NOT_CURVES | {
    "tokens",
    "trained_tokens",
    "tflops",
    "mfu",
    "train_speed(s/it)",
    "memory(GiB)",
    "memory_allocated(GiB)",
}
"""Keys of a record that get no picture; all others do, an objective's metrics among them."""
SMOOTHING = 0.9
SECONDS_BETWEEN_DRAWINGS = 60.0
# Drawing may take at most 1 / DRAWING_SHARE of the run's time.
DRAWING_SHARE = 50


def check(settings: schema.Monitor) -> None:
    """Raises UserError where `report_to` names a package that is not installed. Cheap, so it is called before a run."""
    if "wandb" in settings.report_to and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "monitor.report_to names wandb, which is not installed; run `pip install wandb`, "
            "or set monitor.report_to=[tensorboard]"
        )


def strict_json(record: Record) -> str:
    """One line of strict JSON: NaN and infinities, which JSON does not have, become null."""
    clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
    return json.dumps(clean, ensure_ascii=False, allow_nan=False)


def smooth(values: list[float], weight: float = SMOOTHING) -> list[float]:
    """Exponential moving average with Adam's bias correction, so that the first values are not pulled towards 0; as in TensorBoard."""
    total, seen, out = 0.0, 0.0, []
    for value in values:
        total = weight * total + (1 - weight) * value
        seen = weight * seen + (1 - weight)
        out.append(total / seen)
    return out


class Sink(Protocol):
    """An output that gets every record. group: "train" or "eval". step: the optimizer step."""

    def write(self, group: str, step: int, record: Record) -> None: ...

    def close(self) -> None: ...


def curves(group: str, record: Record) -> Iterator[tuple[str, float]]:
    """(tag, value) of the numbers in a record, such as train/loss and eval/loss; null values are left out."""
    for key, value in record.items():
        if key in NOT_CURVES or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        yield f"{group}/{key.removeprefix('eval_') if group == 'eval' else key}", float(value)


class Appended:
    """A file of whole records. If a write fails, for example on a full disk, the file is truncated to the last whole record. The record
    is written again before the next one.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._whole = self._file.tell()
        self._waiting = b""

    def add(self, record: bytes) -> None:
        """Appends a record; OSError where it cannot be written now."""
        self._waiting += record
        if not self._waiting:
            return
        try:
            written = 0
            while written < len(self._waiting):
                written += self._file.write(self._waiting[written:]) or 0
        except OSError:
            # A device file such as /dev/full cannot be truncated.
            with contextlib.suppress(OSError):
                self._file.truncate(self._whole)
            raise
        self._whole += written
        self._waiting = b""

    def close(self) -> None:
        try:
            self.add(b"")
        finally:
            self._file.close()


class JsonLines:
    """logging.jsonl: one JSON line per record, appended."""

    def __init__(self, path: Path) -> None:
        self._file = Appended(path)

    def write(self, group: str, step: int, record: Record) -> None:
        self._file.add((strict_json(record) + "\n").encode())

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files in runs/. Written directly: SummaryWriter writes in a thread, and its errors only print a traceback."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.0"
        self._file = Appended(folder / name)
        self._add(file_version="brain.Event:2")

    def write(self, group: str, step: int, record: Record) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        for tag, value in curves(group, record):
            self._add(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))

    def _add(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        framed = io.BytesIO()
        RecordWriter(framed).write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._file.add(framed.getvalue())

    def close(self) -> None:
        self._file.close()


class Wandb:
    """A wandb run, online or offline as configured in wandb; its files are in wandb/ of the run directory."""

    def __init__(self, directory: Path, settings: schema.Monitor, recorded: Mapping[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        name = settings.wandb_run_name or directory.name
        try:
            self._run = wandb.init(project=settings.wandb_project, name=name, dir=str(directory), config=dict(recorded))
        except wandb.errors.Error as error:
            raise UserError(
                f"wandb could not start run {name!r} of project {settings.wandb_project!r} ({error}); "
                "run `wandb login`, set WANDB_MODE=offline, or remove wandb from monitor.report_to"
            ) from None

    def write(self, group: str, step: int, record: Record) -> None:
        self._run.log(dict(curves(group, record)), step=step)

    def close(self) -> None:
        self._run.finish()


class Plots:
    """PNG files in images/, drawn from time to time and at the end.

    There is at least a minute between drawings, and more where drawing is slow, so drawing takes at most 2% of the run's time.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.perf_counter) -> None:
        self._folder, self._clock = folder, clock
        self._points: dict[str, tuple[list[int], list[float]]] = {}
        self._next = clock() + SECONDS_BETWEEN_DRAWINGS

    def write(self, group: str, step: int, record: Record) -> None:
        for key, value in record.items():
            if key not in NOT_DRAWN and isinstance(value, int | float) and math.isfinite(value):
                steps, values = self._points.setdefault(key, ([], []))
                steps.append(step)
                values.append(float(value))
        if self._clock() >= self._next:
            self.draw()

    def draw(self) -> None:
        """Draws every curve that has points."""
        begin = self._clock()
        self._folder.mkdir(exist_ok=True)
        for key, (steps, values) in self._points.items():
            name = key if key.startswith("eval_") else f"train_{key}"
            draw_curve(self._folder / f"{name.replace('/', '_')}.png", key, steps, values)
        end = self._clock()
        self._next = end + max(SECONDS_BETWEEN_DRAWINGS, DRAWING_SHARE * (end - begin))

    def close(self) -> None:
        self.draw()


def draw_curve(path: Path, key: str, steps: list[int], values: list[float]) -> None:
    """Draws one PNG: the raw curve, and for a loss also the smoothed curve."""
    # matplotlib.figure without pyplot needs no display, and keeps no global list of figures that have to be closed.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    axes = figure.subplots()
    smoothed = key == "loss" and len(values) > 2
    marker = "o" if len(values) <= 50 else None
    axes.plot(steps, values, color="tab:blue", alpha=0.35 if smoothed else 1.0, marker=marker, markersize=3, label=key)
    if smoothed:
        axes.plot(steps, smooth(values), color="tab:blue", linewidth=2, label=f"smoothed ({SMOOTHING})")
        axes.legend(frameon=False)
    axes.set(xlabel="optimizer step", ylabel=key, title=f"{key}: last {values[-1]:.4g} at step {steps[-1]}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    scratch = path.with_suffix(".part")
    try:
        scratch.write_bytes(drawn.getvalue())
        # Atomic: a reader never sees a partly written picture.
        scratch.replace(path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise


class Progress:
    """A bar with loss, tokens/s and remaining time, on standard error."""

    def __init__(self, steps: int, first_step: int) -> None:
        from tqdm import tqdm

        # In a log file the bar is printed every 15 seconds.
        interval = 0.2 if sys.stderr.isatty() else 15.0
        self._bar = tqdm(
            total=steps, initial=first_step, desc="train", unit="step", mininterval=interval, dynamic_ncols=True
        )
        self._text: dict[str, str] = {}

    def advance(self, step: int) -> None:
        self._bar.update(step - self._bar.n)

    def write(self, group: str, step: int, record: Record) -> None:
        for key in ("loss", "eval_loss", "tokens_per_s"):
            value = record.get(key)
            if value is not None:
                self._text[key] = f"{value:,.0f} tok/s" if key == "tokens_per_s" else f"{key} {value:.4f}"
        self._bar.set_postfix_str(", ".join(self._text.values()), refresh=False)

    def say(self, text: str) -> None:
        self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.refresh()
        self._bar.close()
