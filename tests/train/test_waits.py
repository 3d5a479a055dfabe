"""A training step reads few values from the device, because during each read a GPU runs out of work."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from waits import waits

import tiny
from swift_mega.config import schema
from swift_mega.data.pack import Example, Microbatch, collate
from swift_mega.device.device import Device
from swift_mega.launch.torchrun import run_ranks
from swift_mega.models.translate import load_settings
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.layout import plan_layout
from swift_mega.train.step import train_step
from swift_mega.train.wire import Training, build_training
from swift_mega.verify import parity

ROWS = 3


def _batch(vocab: int) -> list[Microbatch]:
    """Packed rows in which every third token has no label."""
    examples = [
        Example(tokens=np.asarray(row, dtype=np.int32), trained=np.arange(len(row)) % 3 > 0)
        for row in parity.example_rows(vocab, examples=2 * ROWS)
    ]
    return [collate(examples[start : start + 2], 1) for start in range(0, len(examples), 2)]


def counted(run: schema.Run, device: Device) -> Counter[str]:
    """One rank: the waits of a second step; the first step makes the optimizer's state."""
    assert run.model.path is not None
    settings = load_settings(run.model.path)
    training = build_training(
        run, device, parallel_groups.init(plan_layout(run.parallel, settings.shape, 1), seed=1), steps=2
    )
    batch = _batch(settings.shape.vocab)
    train_step(training, batch)
    with waits(_tensors(training)) as found:
        train_step(training, batch)
    parallel_groups.close()
    return found


def _tensors(training: Training) -> list[Any]:
    found: list[Any] = []
    for chunk in training.chunks:
        found += [*chunk.module.parameters(), *chunk.module.buffers()]
        found += [buffer.grad_data for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    for group in training.optimizer.param_groups:
        found += group["params"]
    return found


LAYERS = 2
# The number of trained tokens, by which Megatron divides the gradients; the norm of the gradients; and the result of the step.
A_STEP = 3
# In every MoE layer and microbatch: the number of tokens of each expert, which Megatron's dispatcher fetches as two tensors, and two
# selections by mask in the permutation of 0.16. Once per step: the losses of routers.
A_LAYER, ROUTER_LOSSES = 4, 1
CASES = {
    ("llama", "lora", "float32"): A_STEP,
    ("llama", "full", "bfloat16"): A_STEP,  # chunks of a trained head
    ("qwen3_moe", "lora", "float32"): A_STEP + LAYERS * ROWS * A_LAYER + ROUTER_LOSSES,
}


@pytest.mark.parametrize(("family", "tuner", "dtype"), CASES)
def test_a_step_waits_for_few_values(family: str, tuner: str, dtype: str, tmp_path: Path, cpu: Device) -> None:
    """Their number does not depend on the number of microbatches and of chunks of the loss. Older code read one value for each chunk
    and one for each parameter."""
    model = tiny.make(tmp_path / "model", family, num_hidden_layers=LAYERS)
    run = schema.Run(
        model=schema.Model(
            path=str(model), dtype=dtype, router_aux_loss_coefficient=0.01 if family == "qwen3_moe" else 0.0
        ),
        train=schema.Train(loss_chunk_size=4),
        tuner=schema.Lora(rank=4) if tuner == "lora" else schema.Full(),
    )
    found = run_ranks(1, counted, run, cpu)
    print(*(f"{count:4} {where}" for where, count in found.most_common()), sep="\n")
    assert 0 < found.total() <= CASES[family, tuner, dtype], found


def test_what_counts_as_a_wait() -> None:
    here, host = torch.arange(6.0), torch.arange(6.0)
    with waits([here]) as found:
        made = (here * 2 + host)[1:]
        for reads in (
            lambda: float(made.sum()), lambda: bool((made > 1).all()), lambda: made.nonzero(), lambda: made[made > 1], made.tolist,
            lambda: made.index_put((made > 3,), made[:1]), made.cpu, lambda: host[1:].add_(made).sum().item(),
        ):  # fmt: skip
            before = found.total()
            reads()
            assert found.total() == before + 1, reads
        before = found.total()
        other = torch.arange(4)
        (
            other.tolist(),
            float(other.sum()),
            other.nonzero(),
            other[other > 1],
            made[other],
            made.masked_fill(made > 1, 0),
        )
        made.cpu().tolist()
        assert found.total() == before + 1, "the copy is the host's"
