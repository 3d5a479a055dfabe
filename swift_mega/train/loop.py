"""The loop: steps, evaluations, checkpoints, and what the watcher sees of them."""

import dataclasses
import math
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist

from swift_mega.config import schema
from swift_mega.convert.files.resized import weights_of
from swift_mega.data.batches import Batches
from swift_mega.data.loader import Prepared
from swift_mega.device.deterministic import deterministic
from swift_mega.device.device import Device
from swift_mega.errors import AgreedError
from swift_mega.export.checkpoint import save_checkpoint
from swift_mega.export.companions import Trained
from swift_mega.export.merged import merge
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.agree import agree, attempt, gather, on_every_rank, on_first_rank
from swift_mega.parallel.layout import Layout, check_microbatches
from swift_mega.train.build import Training, build_training, parameter_dtype
from swift_mega.train.flops import flops_per_token
from swift_mega.train.header import header
from swift_mega.train.monitor import Monitor, RunDirectory
from swift_mega.train.step import StepResult, evaluate, train_step


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves."""

    directory: Path
    checkpoint: Path
    merged: Path | None
    losses: list[float]
    """Mean loss per trained token, of every step."""
    evaluations: list[tuple[int, float]]
    """(step, validation loss)."""
    tokens: int
    """Trained on, padding left out."""


def make_batches(
    run: schema.Run, layout: Layout, data_rank: int, prepared: Prepared, pad_token: int
) -> tuple[Batches, Batches | None]:
    """Batches of both splits for one data rank; UserError where sizes do not fit the layout."""

    epochs = None if run.train.steps is not None else run.train.epochs or 1.0

    def make(examples: list, once: bool) -> Batches:
        return Batches(
            examples,
            settings=run.data,
            micro_batch_size=run.train.micro_batch_size,
            global_batch_size=run.train.global_batch_size,
            data_rank=data_rank,
            data_size=layout.data,
            pad_to=layout.row_multiple,
            pad_each=layout.mesh.example_multiple,
            pad_token=pad_token,
            once=once,
            epochs=epochs,
            group=layout.pipeline if layout.virtual > 1 else 1,
        )

    train = make(prepared.train, False)
    check_microbatches(layout, train.microbatches)
    return train, make(prepared.validation, True) if prepared.validation else None


def total_steps(train: schema.Train, batches: Batches) -> int:
    """Optimizer steps of the run."""
    return train.steps if train.steps is not None else batches.steps


def train_rank(run: schema.Run, device: Device, layout: Layout, prepared: Prepared, pad_token: int) -> TrainResult:
    """One rank of a run, from groups to the last checkpoint."""
    with deterministic(run.train.deterministic):
        return _train(run, device, layout, prepared, pad_token)


def _train(run: schema.Run, device: Device, layout: Layout, prepared: Prepared, pad_token: int) -> TrainResult:
    groups = parallel_groups.init(layout, seed=run.train.seed, timeout_minutes=run.parallel.distributed_timeout_minutes)
    try:
        batches, validation = make_batches(run, layout, groups.coordinate.data, prepared, pad_token)
        steps = total_steps(run.train, batches)
        training = build_training(run, device, groups, steps=steps)
        if groups.rank == 0:
            print(*header(training), sep="\n", flush=True)
        directory = _directory(run, steps)
        with _monitor(training, directory, steps) or nullcontext() as monitor:
            if monitor is not None:
                for note in training.part.settings.notes:
                    monitor.say(note)
            return Loop(training, directory, monitor, steps, batches, validation, prepared.trained).run()
    finally:
        parallel_groups.close()


def _directory(run: schema.Run, steps: int) -> RunDirectory:
    """Rank 0 makes it, every rank learns its name; a refusal is everybody's."""
    made: list[RunDirectory] = []

    def make() -> None:
        made.append(RunDirectory(run.train.output_dir, run.train.add_version))
        _put_aside(run, made[0], steps)

    agree(on_first_rank(make))
    path = gather(str(made[0].path) if made else "")[0]
    return on_every_rank(lambda: made[0] if made else RunDirectory(path, False))


def _put_aside(run: schema.Run, directory: RunDirectory, steps: int) -> None:
    """Makes room for this run's files in a folder that another run wrote to (train.add_version=false), and says so."""
    written = [
        directory.checkpoint(step).name for step in range(1, steps + 1) if is_due(step, steps, run.train.save_steps)
    ]
    if run.export.merge_lora:
        written.append(merged_beside(directory.checkpoint(steps)).name)
    assert run.model.path is not None
    earlier = directory.put_aside(written, [Path(path) for path in (run.model.path, *run.model.adapters)])
    if earlier is not None:
        print(
            f"earlier run         {directory.path} holds another run's files: those of the same names are now in {earlier.name}/"
        )


def is_due(step: int, steps: int, every: int | None) -> bool:
    """Whether something that is done every so many steps, and at the end, is done after `step` of `steps`."""
    return step == steps or (every is not None and step % every == 0)


def merged_beside(checkpoint: Path) -> Path:
    """Where the weights of a checkpoint's model with its adapter merged go."""
    return checkpoint.with_name(f"{checkpoint.name}-merged")


def _monitor(training: Training, directory: RunDirectory, steps: int) -> Monitor | None:
    """Rank 0's; a file that it cannot open is everybody's error."""
    opened: list[Monitor] = []
    agree(on_first_rank(lambda: opened.append(_open_monitor(training, directory, steps)), directory.path))
    return opened[0] if opened else None


def _open_monitor(training: Training, directory: RunDirectory, steps: int) -> Monitor:
    run = training.run
    assert run.model.path is not None
    model = {**dataclasses.asdict(run.model), "path": weights_of(run.model.path)}
    recorded = {
        **dataclasses.asdict(run),
        "model": model,
        "layout": training.groups.layout.name,
        "world": training.groups.layout.world,
    }
    directory.write_args(recorded)
    return Monitor(
        directory,
        steps=steps,
        settings=run.monitor,
        device=training.device,
        world=training.groups.layout.world,
        flops_per_token=flops_per_token(training.part.settings, trained=not training.tuner.adapters),
        logging_steps=run.train.logging_steps,
        recorded=recorded,
    )


@dataclass
class Loop:
    """The steps of one rank; every method is collective."""

    training: Training
    directory: RunDirectory
    monitor: Monitor | None
    steps: int
    batches: Batches
    validation: Batches | None
    trained: Trained
    saved: list[Path] = dataclasses.field(default_factory=list)
    """Checkpoints that this run wrote and has not removed, oldest first."""
    unwritten: str | None = None
    """What went wrong on rank 0 while it wrote about the run, until the other ranks are told."""

    def run(self) -> TrainResult:
        losses, evaluations, tokens = [], [], 0
        train = self.training.run.train
        for step in range(1, self.steps + 1):
            result = train_step(self.training, self.batches.batch(step - 1))
            losses.append(result.loss)
            tokens += result.tokens
            self._report(step, result)
            if is_due(step, self.steps, train.eval_steps) and self.validation is not None:
                evaluations.append((step, self._evaluate(step)))
            if is_due(step, self.steps, train.save_steps):
                self._save(step)
        checkpoint = self.directory.checkpoint(self.steps)
        return TrainResult(self.directory.path, checkpoint, self._merge(checkpoint), losses, evaluations, tokens)

    def _report(self, step: int, result: StepResult) -> None:
        self._record(
            lambda monitor: monitor.step(
                step,
                loss=result.loss,
                grad_norm=result.grad_norm,
                learning_rate=result.learning_rate,
                tokens=result.tokens,
                trained_tokens=result.trained_tokens,
                extra=result.router_losses,
            )
        )
        if step == 1 or is_due(step, self.steps, self.training.run.train.logging_steps):  # when the monitor writes
            agree(self.unwritten)
        if not math.isfinite(result.loss) or not result.applied:
            raise AgreedError(
                f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: not a finite number, so nothing that follows "
                "would be; "
                f"lower optim.lr={self.training.run.optim.lr:g}, or look for damaged rows in the data of this step"
            )

    def _evaluate(self, step: int) -> float:
        assert self.validation is not None
        with self._paused():
            loss = evaluate(self.training, [self.validation.batch(n) for n in range(self.validation.steps)])
        self._record(lambda monitor: monitor.evaluation(step, loss))
        agree(self.unwritten)
        return loss

    def _record(self, write: Callable[[Monitor], object]) -> None:
        """Rank 0 writes; what goes wrong is kept until all ranks ask for it."""
        monitor = self.monitor
        if monitor is not None:
            problem = attempt(lambda: write(monitor), self.directory.path)[1]
            self.unwritten = self.unwritten or problem

    def _save(self, step: int) -> None:
        run = self.training.run
        assert run.model.path is not None
        with self._paused():
            for chunk in self.training.chunks:
                if run.parallel.overlap_param_gather:
                    chunk.start_param_sync(force_sync=True)  # gathered lazily otherwise: by the next forward pass
            save_checkpoint(
                self.training.tuner,
                self.training.part,
                self.training.groups,
                self.directory.checkpoint(step),
                source=run.model.path,
                max_shard_size=run.export.max_shard_size,
                dtype=parameter_dtype(run.model, self.training.device),
                trained=self.trained,
            )
            self.saved.append(self.directory.checkpoint(step))
            if dist.get_rank() == 0:
                self._forget_old()

    def _forget_old(self) -> None:
        """Keeps the last save_total_limit of this run's own checkpoints: known by what it wrote, since names tell of no owner."""
        limit = self.training.run.train.save_total_limit
        while limit and len(self.saved) > limit:
            path = self.saved.pop(0)
            try:
                shutil.rmtree(path)
            except FileNotFoundError:  # somebody else was faster
                continue
            except OSError as error:
                self._say(f"{path} is beyond train.save_total_limit={limit} and cannot be removed: {error.strerror}")

    def _say(self, text: str) -> None:
        if self.monitor is not None:
            self.monitor.say(text)

    def _merge(self, checkpoint: Path) -> Path | None:
        run = self.training.run
        if not (run.export.merge_lora and self.training.tuner.adapters):
            return None
        merged = merged_beside(checkpoint)
        assert run.model.path is not None
        source = run.model.path
        write = partial(
            merge,
            source,
            checkpoint,
            merged,
            max_shard_size=run.export.max_shard_size,
            overwrite=True,
            dequantize=run.model.dequantize,
        )
        agree(on_first_rank(write, merged))
        return merged

    def _paused(self) -> AbstractContextManager[None]:
        return self.monitor.paused() if self.monitor is not None else nullcontext()
