"""The training loop: steps, evaluations, checkpoints, and what is logged about them."""

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
from swift_mega.objectives.objective import find_objective
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.agree import agree, attempt, gather, on_every_rank, on_first_rank
from swift_mega.parallel.layout import Layout, check_microbatches
from swift_mega.train.build import parameter_dtype
from swift_mega.train.flops import flops_per_token
from swift_mega.train.header import header
from swift_mega.train.monitor import Monitor, RunDirectory
from swift_mega.train.step import StepResult, evaluate, train_step
from swift_mega.train.wire import Training, build_training, rewired


@dataclass(frozen=True)
class TrainResult:
    """The results of a run."""

    directory: Path
    checkpoint: Path
    merged: Path | None
    losses: list[float]
    """Mean loss per trained token, one value per step."""
    evaluations: list[tuple[int, float]]
    """(step, validation loss)."""
    tokens: int
    """Tokens of all steps, without padding."""


def make_batches(
    run: schema.Run, layout: Layout, data_rank: int, prepared: Prepared, pad_token: int
) -> tuple[Batches, Batches | None]:
    """Batches of both splits for one data rank; UserError where batch sizes do not fit the layout."""

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
            together=find_objective(run.objective).together,
        )

    train = make(prepared.train, False)
    check_microbatches(layout, train.microbatches)
    return train, make(prepared.validation, True) if prepared.validation else None


def total_steps(train: schema.Train, batches: Batches) -> int:
    """Optimizer steps of the run."""
    return train.steps if train.steps is not None else batches.steps


def train_rank(run: schema.Run, device: Device, layout: Layout, prepared: Prepared, pad_token: int) -> TrainResult:
    """The whole run on one rank, from process groups to the last checkpoint. Collective."""
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
    """The run's directory: rank 0 creates it and sends its path to all ranks. An error on rank 0 is raised on all ranks."""
    made: list[RunDirectory] = []

    def make() -> None:
        made.append(RunDirectory(run.train.output_dir, run.train.add_version))
        _put_aside(run, made[0], steps)

    agree(on_first_rank(make))
    path = gather(str(made[0].path) if made else "")[0]
    return on_every_rank(lambda: made[0] if made else RunDirectory(path, False))


def _put_aside(run: schema.Run, directory: RunDirectory, steps: int) -> None:
    """Moves files of an earlier run out of the way (train.add_version=false), and prints where they are."""
    written = [
        directory.checkpoint(step).name for step in range(1, steps + 1) if is_due(step, steps, run.train.save_steps)
    ]
    if run.export.merge_lora:
        written.append(merged_beside(directory.checkpoint(steps)).name)
    assert run.model.path is not None
    earlier = directory.put_aside(written, [Path(path) for path in (run.model.path, *run.model.adapters)])
    if earlier is not None:
        print(
            f"earlier run         {directory.path} holds another run's files: its files with the same names were moved to {earlier.name}/"
        )


def is_due(step: int, steps: int, every: int | None) -> bool:
    """Whether something that is done every `every` steps, and after the last step, is done after `step` of `steps`."""
    return step == steps or (every is not None and step % every == 0)


def merged_beside(checkpoint: Path) -> Path:
    """The directory for the merged weights of a checkpoint that is an adapter."""
    return checkpoint.with_name(f"{checkpoint.name}-merged")


def _monitor(training: Training, directory: RunDirectory, steps: int) -> Monitor | None:
    """The monitor, on rank 0 only. A file that it cannot open raises an error on all ranks."""
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
        flops_per_token=flops_per_token(training.part.settings, trained=training.tuner.trains_model),
        logging_steps=run.train.logging_steps,
        recorded=recorded,
    )


@dataclass
class Loop:
    """The training loop of one rank; every method is collective."""

    training: Training
    directory: RunDirectory
    monitor: Monitor | None
    steps: int
    batches: Batches
    validation: Batches | None
    trained: Trained
    saved: list[Path] = dataclasses.field(default_factory=list)
    """Checkpoints that this run wrote and did not remove, oldest first."""
    unwritten: str | None = None
    """The error of rank 0's monitor, kept until the ranks agree on it."""

    def run(self) -> TrainResult:
        losses, evaluations, tokens = [], [], 0
        train = self.training.run.train
        for step in range(1, self.steps + 1):
            self.training = rewired(self.training, step)
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
                extra={**result.router_losses, **result.metrics},
            )
        )
        # The same steps as those in which the monitor writes.
        if step == 1 or is_due(step, self.steps, self.training.run.train.logging_steps):
            agree(self.unwritten)
        if not math.isfinite(result.loss) or not result.applied:
            raise AgreedError(
                f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: not finite, so no later step "
                "can be; "
                f"lower optim.lr={self.training.run.optim.lr:g}, or check the data of this step for damaged rows"
            )

    def _evaluate(self, step: int) -> float:
        assert self.validation is not None
        with self._paused():
            limit = self.training.run.train.eval_batches or self.validation.steps
            batches = range(min(limit, self.validation.steps))
            means = evaluate(self.training, [self.validation.batch(number) for number in batches])
        self._record(lambda monitor: monitor.evaluation(step, means.loss, extra=means.metrics))
        agree(self.unwritten)
        return means.loss

    def _record(self, write: Callable[[Monitor], object]) -> None:
        """Rank 0 writes; an error is kept until the ranks agree on it."""
        monitor = self.monitor
        if monitor is not None:
            problem = attempt(lambda: write(monitor), self.directory.path)[1]
            self.unwritten = self.unwritten or problem

    def _save(self, step: int) -> None:
        run = self.training.run
        assert run.model.path is not None
        with self._paused():
            for chunk in self.training.chunks:
                # With overlap, parameters are otherwise gathered by the next forward pass.
                if run.parallel.overlap_param_gather:
                    chunk.start_param_sync(force_sync=True)
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
        """Keeps the last save_total_limit checkpoints of this run. Only those in `saved` count: a name does not say which run wrote it."""
        limit = self.training.run.train.save_total_limit
        while limit and len(self.saved) > limit:
            path = self.saved.pop(0)
            try:
                shutil.rmtree(path)
            # Another process removed it.
            except FileNotFoundError:
                continue
            except OSError as error:
                self._say(f"{path} is beyond train.save_total_limit={limit} and cannot be removed: {error.strerror}")

    def _say(self, text: str) -> None:
        if self.monitor is not None:
            self.monitor.say(text)

    def _merge(self, checkpoint: Path) -> Path | None:
        run = self.training.run
        if not (run.export.merge_lora and run.tuner.makes_adapter):
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
