"""One rank on the device equals transformers, takes the steps of torch's AdamW, and offloading changes nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.gpu_check import lora, offload, parity
from benchmarks.gpu_check.bench import Bench, packed
from swift_mega.verify.parity import example_rows

LENGTHS = (40, 9)
OneRank = Callable[..., Any]


def in_float64(bench: Bench) -> parity.Errors:
    rows = example_rows(bench.vocab("tiny"), examples=4)
    return parity.errors_of(
        parity.ours(bench, "tiny", rows, "float64"), parity.theirs(bench, "tiny", rows, torch.float64)
    )


def test_one_rank_equals_transformers(bench: Bench, one_rank: OneRank) -> None:
    """Logits, loss and every gradient; in float64 rounding is negligible."""
    found = one_rank(in_float64, bench)
    # In transformers, norms are in float32 even then.
    assert max(found.logits, found.loss, found.worst) < 1e-5, found


def steps(bench: Bench, tuner: str) -> lora.Steps:
    return lora.against_torch(bench, "tiny", [packed(LENGTHS, bench.vocab("tiny"))], tuner)


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_the_optimizer_steps_as_torch_does(bench: Bench, one_rank: OneRank, tuner: str) -> None:
    """Megatron's fused optimizer, with decay and clipping, against AdamW parameter by parameter."""
    found = one_rank(steps, bench, tuner)
    assert "fused" in found.by.lower(), found.by
    assert found.loss <= lora.LOSS_LIMIT and found.update <= lora.UPDATE_LIMIT, found


def passes(bench: Bench, train: dict[str, Any]) -> tuple[float, float]:
    batch = [packed(LENGTHS, bench.vocab("tiny"), seed) for seed in range(2)]
    with_it, without = offload.once(bench, "tiny", batch, **train), offload.once(bench, "tiny", batch)
    return abs(with_it.loss - without.loss), offload.relative(with_it.gradients, without.gradients)


def test_offloaded_inputs_give_the_same_gradients(bench: Bench, one_rank: OneRank) -> None:
    """Two microbatches of four layers whose inputs are copied to the host and back, with the device's own streams."""
    loss, gradients = one_rank(passes, bench, {"offload_activations": True})
    assert loss <= offload.LOSS_LIMIT and gradients <= offload.GRADIENT_LIMITS[bench.dtype]
