"""Logs of a run, in SWIFT's directory structure: the run's directory, and the monitor that writes to it.

`Monitor.step` makes one flat record of a step, and every sink gets this same record. So the file, the plots and the progress bar show the
same numbers. One rank constructs the monitor; the others write nothing. logging.jsonl is written first, one unbuffered write per line,
because it is what remains of a run that crashes.
"""

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from swift_mega.config import schema
from swift_mega.device.device import Device
from swift_mega.errors import UserError
from swift_mega.train.sinks import JsonLines, Plots, Progress, Record, Sink, TensorBoard, Wandb, check

ABOUT_A_RUN = ("args.json", "logging.jsonl", "runs", "images")
"""Logs of a run. Lines of two runs in one file, or curves of two runs in one folder, would look like one run."""
SINKS = {"JsonLines": "logging.jsonl", "TensorBoard": "runs/ (TensorBoard)", "Plots": "images/ (plots)"}
EARLIER = re.compile(r"earlier-(\d+)")


def new_version(output_dir: Path, now: datetime) -> str:
    """The name vN-YYYYMMDD-HHMMSS of the next run in `output_dir`: N is the largest existing number + 1, or 0."""
    names = [entry.name for entry in output_dir.iterdir()] if output_dir.is_dir() else []
    numbers = [int(found[1]) for name in names if (found := re.match(r"v(\d+)-\d{8}-\d{6}$", name))]
    return f"v{max(numbers, default=-1) + 1}-{now:%Y%m%d-%H%M%S}"


class RunDirectory:
    """The directory of one run. Rank 0 creates it with a version; other ranks open it by `RunDirectory(path, False)`."""

    def __init__(self, output_dir: str | Path, add_version: bool = True, *, now: datetime | None = None) -> None:
        """Creates the directory; UserError where that is not possible."""
        root = Path(output_dir).expanduser().absolute()
        try:
            root.mkdir(parents=True, exist_ok=True)
            self.path = self._claim(root, now or datetime.now()) if add_version else root
            if not os.access(self.path, os.W_OK | os.X_OK):
                raise PermissionError(13, "Permission denied")
        except (FileExistsError, NotADirectoryError):
            raise UserError(
                f"train.output_dir {root} is a file, or a part of its path is a file; name another output_dir"
            ) from None
        except OSError as error:
            raise UserError(
                f"train.output_dir {root} cannot be written ({error.strerror}); name a directory that you may write to"
            ) from None

    @staticmethod
    def _claim(root: Path, now: datetime) -> Path:
        while True:
            path = root / new_version(root, now)
            # Two runs may start in the same second. mkdir succeeds for one of them; the other tries the next number.
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                return path

    @property
    def logging(self) -> Path:
        return self.path / "logging.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "runs"

    @property
    def images(self) -> Path:
        return self.path / "images"

    def checkpoint(self, step: int) -> Path:
        """The directory of the checkpoint after `step` optimizer steps; not created here."""
        return self.path / f"checkpoint-{step}"

    def put_aside(self, written: Iterable[str], inputs: Iterable[Path]) -> Path | None:
        """Moves files of an earlier run that this run would overwrite to earlier-N, and returns that path; None where there are none.

        written: names of the checkpoints that this run will write. inputs: paths that it reads. Logs (ABOUT_A_RUN) are moved where
        there is a logging.jsonl. Other checkpoints stay where they are. Raises UserError where an input would be moved.
        """
        names = [*(ABOUT_A_RUN if self.logging.exists() else ()), *written]
        there = [path for name in names if os.path.lexists(path := self.path / name)]
        for path in there:
            for source in inputs:
                if source.resolve().is_relative_to(path.resolve()):
                    raise UserError(
                        f"{source} is read by this run, which would write its own {path.name} there; name another train.output_dir, or "
                        "set train.add_version=true"
                    )
        if not there:
            return None
        numbers = [int(found[1]) for path in self.path.glob("earlier-*") if (found := EARLIER.fullmatch(path.name))]
        earlier = self.path / f"earlier-{max(numbers, default=0) + 1}"
        try:
            earlier.mkdir()
            for path in there:
                path.rename(earlier / path.name)
        except OSError as error:
            raise UserError(
                f"files of an earlier run in {self.path} cannot be moved to {earlier.name} ({error.strerror}); name another "
                "train.output_dir"
            ) from None
        return earlier

    def write_args(self, settings: Mapping[str, Any]) -> Path:
        """Writes args.json: the resolved settings (`dataclasses.asdict` of a Run, and what the caller adds)."""
        path = self.path / "args.json"
        scratch = path.with_suffix(".json.part")
        try:
            scratch.write_text(json.dumps(settings, indent=2, default=str) + "\n", encoding="utf-8")
            scratch.replace(path)
        except OSError as error:
            scratch.unlink(missing_ok=True)
            raise UserError(
                f"{path} cannot be written ({error.strerror}); free some space, or name another train.output_dir"
            ) from None
        return path


def format_time(seconds: float) -> str:
    """SWIFT's form: 3s, 1m 3s, 2h 0m 5s, 1d 0h 0m 0s; seconds are rounded down."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    parts = ((days, "d"), (hour, "h"), (minute, "m"), (second, "s"))
    first = next((i for i, (value, _) in enumerate(parts) if value), len(parts) - 1)
    return " ".join(f"{value}{unit}" for value, unit in parts[first:])


class Monitor:
    """Makes records of steps and gives them to the sinks. Constructed by one rank only.

    A line is written after the first step, the last step and every `logging_steps` steps. Its loss is the mean over the steps since the
    line before. Speeds are of training only: time inside `paused()` (evaluation, saving) does not count.
    """

    def __init__(
        self,
        directory: RunDirectory,
        *,
        steps: int,
        settings: schema.Monitor,
        flops_per_token: float,
        device: Device,
        world: int = 1,
        logging_steps: int = 1,
        first_step: int = 0,
        recorded: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """steps: of the whole run; `first_step` of them were done before a resume.

        flops_per_token: floating-point operations of one token's forward and backward pass in the whole model.
        world: number of ranks, because tflops and mfu are per device. recorded: settings that wandb shows beside the run.
        Raises UserError where report_to names a package that is not installed, or a file cannot be opened.
        """
        self.directory = directory
        self._steps, self._first, self._logging_steps = steps, first_step, logging_steps
        self._flops, self._device, self._world, self._clock = flops_per_token, device, world, clock
        self._progress: Progress | None = None
        self._sinks: list[Sink] = []
        self._failing: set[str] = set()
        self._open(settings, recorded or {})
        self._losses: list[float] = []
        self._tokens = self._trained = self._window_tokens = 0
        self._paused = self._window_paused = 0.0
        self._begin = self._window_begin = clock()

    def _open(self, settings: schema.Monitor, recorded: Mapping[str, Any]) -> None:
        check(settings)
        try:
            self._sinks.append(JsonLines(self.directory.logging))
            if "wandb" in settings.report_to:
                self._sinks.append(Wandb(self.directory.path, settings, recorded))
            if "tensorboard" in settings.report_to:
                self._sinks.append(TensorBoard(self.directory.tensorboard))
        except OSError as error:
            path = error.filename or self.directory.path
            raise UserError(f"{path} cannot be opened ({error.strerror}); name another train.output_dir") from None
        self._sinks.append(Plots(self.directory.images, self._clock))
        if settings.progress:
            self._progress = Progress(self._steps, self._first)
            self._sinks.append(self._progress)

    def step(
        self,
        iteration: int,
        *,
        loss: float,
        grad_norm: float | None,
        learning_rate: float,
        tokens: int,
        trained_tokens: int,
        extra: Mapping[str, float] | None = None,
    ) -> Record | None:
        """Records optimizer step `iteration` (the first is 1); returns the record where a line was written, else None.

        loss: mean per trained token of the global batch. tokens: of the global batch, without padding.
        trained_tokens: tokens with a loss. extra: more numbers of this step.
        """
        self._losses.append(loss)
        self._window_tokens += tokens
        self._tokens += tokens
        self._trained += trained_tokens
        record = None
        if iteration in (self._first + 1, self._steps) or iteration % self._logging_steps == 0:
            record = self._record(iteration, grad_norm, learning_rate, extra or {})
            self._write("train", iteration, record)
        if self._progress:
            self._progress.advance(iteration)
        return record

    def _record(
        self, iteration: int, grad_norm: float | None, learning_rate: float, extra: Mapping[str, float]
    ) -> Record:
        now = self._clock()
        busy = now - self._window_begin - self._window_paused
        tokens_per_s = self._window_tokens / busy if busy > 0 else None
        flops = tokens_per_s * self._flops / self._world if tokens_per_s and self._flops else None
        peak = self._device.peak_flops()
        record = {
            "loss": sum(self._losses) / len(self._losses),
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            **extra,
            **self._standing(iteration, now),
            "tokens_per_s": tokens_per_s,
            "tflops": flops / 1e12 if flops else None,
            "mfu": flops / peak if flops and peak else None,
            "tokens": self._tokens,
            "trained_tokens": self._trained,
        }
        self._losses, self._window_tokens, self._window_paused, self._window_begin = [], 0, 0.0, now
        return record

    def _standing(self, iteration: int, now: float) -> Record:
        """Progress, peak memory and speed of the run, and the remaining time at the speed so far."""
        elapsed, allocated = now - self._begin, self._device.peak_allocated_bytes()
        done = iteration - self._first
        speed = (elapsed - self._paused) / done if done > 0 else None
        return {
            "iteration": f"{iteration}/{self._steps}",
            "elapsed_time": format_time(elapsed),
            "remaining_time": None if speed is None else format_time(speed * (self._steps - iteration)),
            "memory(GiB)": round(self._device.peak_memory_bytes() / 2**30, 2),
            **({} if allocated is None else {"memory_allocated(GiB)": round(allocated / 2**30, 2)}),
            "train_speed(s/it)": speed,
        }

    def evaluation(self, iteration: int, loss: float, extra: Mapping[str, float] | None = None) -> Record:
        """Records the validation loss after optimizer step `iteration`; keys of `extra` get the prefix eval_."""
        others = {f"eval_{key.removeprefix('eval_')}": value for key, value in (extra or {}).items()}
        where = self._standing(iteration, self._clock())
        record = {"eval_loss": loss, **others, **{key: where[key] for key in ("iteration", "elapsed_time")}}
        self._write("eval", iteration, record)
        return record

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside this context is not training: it counts for elapsed_time, not for speeds."""
        begin = self._clock()
        try:
            yield
        finally:
            spent = self._clock() - begin
            self._paused += spent
            self._window_paused += spent

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self._progress:
            self._progress.say(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def _write(self, group: str, step: int, record: Record) -> None:
        for sink in self._sinks:
            self._try(sink, lambda sink=sink: sink.write(group, step, record))  # type: ignore[misc]

    def _try(self, sink: Sink, action: Callable[[], None]) -> None:
        """Runs `action`. A sink that fails never ends the run: one message is printed, and the next one only after the sink has worked."""
        name = type(sink).__name__
        try:
            action()
            self._failing.discard(name)
        except (OSError, ArithmeticError) as error:
            if name not in self._failing:
                reason = error.strerror if isinstance(error, OSError) and error.strerror else error
                self.say(
                    f"{SINKS.get(name, name)} of {self.directory.path} cannot be written ({reason}); training goes on without"
                )
            self._failing.add(name)

    def close(self) -> None:
        """Draws the plots and closes every file; a second call does nothing."""
        while self._sinks:
            sink = self._sinks.pop()
            self._try(sink, sink.close)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
