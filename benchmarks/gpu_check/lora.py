"""LoRA: steps compared with PEFT's, and the losses of PEFT and transformers with the files that we write."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu_check.bench import (
    OPTIM,
    Bench,
    DtypeName,
    computed_by,
    examples,
    network,
    packed,
    relative,
    run_of,
    summed_loss,
)
from benchmarks.gpu_check.record import Stage
from swift_mega.config import schema
from swift_mega.convert.files.hf_files import Checkpoint
from swift_mega.data.pack import Microbatch
from swift_mega.export.checkpoint import save_checkpoint
from swift_mega.export.merged import merge
from swift_mega.train.build import layout_of
from swift_mega.train.step import evaluate, train_step
from swift_mega.verify import parity

STEPS, MORE_STEPS = 3, 8
UPDATE_LIMIT, LOSS_LIMIT = 1e-3, 1e-4


@dataclass(frozen=True)
class Steps:
    """The result of STEPS steps, compared with torch's AdamW."""

    loss: float
    """Largest difference of the loss in a step."""
    update: float
    """Relative difference of the total change of all trained weights."""
    by: str
    """Backends of our side."""


def run(bench: Bench, stage: Stage) -> None:
    """Runs the stage."""
    size = bench.size("smol")
    lengths = (40, 9) if bench.small else (512, 300, 200)
    batch = [packed(lengths, bench.vocab(size), seed) for seed in range(2)]
    steps = against_torch(bench, size, batch, "lora")
    stage.fact("float32: computed by", steps.by)
    stage.check(f"{STEPS} steps beside PEFT and torch's AdamW, float32: loss", steps.loss, LOSS_LIMIT)
    stage.check("the change of all factors, relative", steps.update, UPDATE_LIMIT)
    _falls(bench, stage, size, batch)
    by_peft, by_transformers = exported(bench, size, batch)
    stage.check("loss of the exported adapter under PEFT, difference", by_peft, LOSS_LIMIT)
    stage.check("loss of the merged model under transformers, difference", by_transformers, LOSS_LIMIT)


def random_adapter(bench: Bench, size: str) -> Path:
    """An adapter in which both factors are nonzero."""
    folder = bench.folder / f"adapter-{size}"
    if not folder.exists():
        run = run_of(bench.model(size), "float32", "lora")
        parity.random_adapter(run, bench.device, layout_of(run, 1), folder)
        bench.free()
    return folder


def against_torch(bench: Bench, size: str, batch: Sequence[Microbatch], tuner: str) -> Steps:
    """Compares steps. tuner: "full" with transformers, "lora" with PEFT; both references use torch's AdamW, one update per parameter."""
    model = bench.model(size)
    start = random_adapter(bench, size) if tuner == "lora" else None
    folder = bench.folder / f"steps-{size}-{tuner}"
    with bench.training(run_of(model, "float32", tuner, adapter=start)) as training:
        losses, by = [train_step(training, batch).loss for _ in range(STEPS)], computed_by(training)
        save_checkpoint(
            training.tuner,
            training.part,
            training.groups,
            folder,
            source=model,
            max_shard_size="5GB",
            dtype=torch.float32,
        )
    expected, weights = _by_torch(bench, model, start, batch)
    before, after = Checkpoint(start or model), Checkpoint(folder)
    assert before.entries.keys() == weights.keys(), sorted(before.entries.keys() ^ weights.keys())
    changes = [
        torch.cat([(values(name) - before.read(name).double()).flatten() for name in sorted(weights)])
        for values in (lambda name: after.read(name).double(), lambda name: weights[name])
    ]
    loss = max(abs(one - other) for one, other in zip(losses, expected, strict=True))
    return Steps(loss, relative(*changes), by)


def _by_torch(
    bench: Bench, model: Path, adapter: Path | None, batch: Sequence[Microbatch]
) -> tuple[list[float], dict[str, Tensor]]:
    """(loss of each step, trained weights by their names in files)."""
    net = network(bench, model, torch.float32, adapter, trainable=True).train()
    trained = {name: x for name, x in net.named_parameters() if x.requires_grad}
    # As in Megatron, biases and norms have no weight decay.
    groups = [
        {"params": [x for x in trained.values() if x.dim() > 1], "weight_decay": OPTIM.weight_decay},
        {"params": [x for x in trained.values() if x.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps, foreach=False)
    losses = []
    for _ in range(STEPS):
        rows = [tokens.to(bench.device.device) for row in batch for tokens in examples(row)]
        count = sum(len(tokens) - 1 for tokens in rows)
        total = 0.0
        for tokens in rows:
            loss = summed_loss(net, tokens) / count
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained.values(), OPTIM.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    weights = {name.replace(".default.", "."): x.detach().double().cpu() for name, x in trained.items()}
    del net, trained, groups, optimizer
    bench.free()
    return losses, weights


def _falls(bench: Bench, stage: Stage, size: str, batch: Sequence[Microbatch]) -> None:
    """Checks that the loss falls in eight steps on one batch, in the default dtype of training."""
    optim = schema.Optim(lr=1e-3, schedule="constant")
    with bench.training(run_of(bench.model(size), bench.dtype, "lora", optim=optim)) as training:
        losses = [train_step(training, batch).loss for _ in range(MORE_STEPS)]
    stage.fact(f"losses of {MORE_STEPS} steps on one batch, {bench.dtype}", " ".join(f"{loss:.4f}" for loss in losses))
    stage.check("last loss - first", losses[-1] - losses[0], 0.0)


def exported(bench: Bench, size: str, batch: Sequence[Microbatch], dtype: DtypeName = "float32") -> tuple[float, float]:
    """Differences from our loss: (our exported adapter with PEFT, our merged model with transformers)."""
    model, adapter, merged = bench.model(size), bench.folder / f"exported-{size}", bench.folder / f"merged-{size}"
    run = run_of(model, dtype, "lora", adapter=random_adapter(bench, size))
    with bench.training(run) as training:
        train_step(training, batch)
        loss = evaluate(training, [batch]).loss
        save_checkpoint(
            training.tuner,
            training.part,
            training.groups,
            adapter,
            source=model,
            max_shard_size="5GB",
            dtype=torch.float32,
        )
    merge(model, adapter, merged, overwrite=True)
    differences = [
        abs(_loss(bench, network(bench, *of).eval(), batch) - loss)
        for of in ((model, torch.float32, adapter), (merged, torch.float32))
    ]
    bench.free()
    return differences[0], differences[1]


@torch.no_grad()
def _loss(bench: Bench, net: torch.nn.Module, batch: Sequence[Microbatch]) -> float:
    rows = [tokens.to(bench.device.device) for row in batch for tokens in examples(row)]
    return float(sum(summed_loss(net, tokens) for tokens in rows)) / sum(len(tokens) - 1 for tokens in rows)
