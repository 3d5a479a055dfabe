"""Models with gated delta nets: examples in one row give the same as each alone, and every way of training gives the same steps."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swift_mega.config import schema
from swift_mega.convert.source import Source
from swift_mega.device.device import Device
from swift_mega.export.merged import merge
from swift_mega.models.translate import load_settings
from swift_mega.ops.gated_delta import CHUNK
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.layout import parse_layout, plan_layout
from swift_mega.train.build import build_part
from swift_mega.verify import parity
from tests import tiny
from tests.train.bench import bench, check, check_steps, settings

RECOMPUTED = [
    ("full", "lora"), ("selective", "full"),
    pytest.param("full", "full", marks=pytest.mark.full), pytest.param("selective", "lora", marks=pytest.mark.full),
]  # fmt: skip
LENGTHS = (3, CHUNK + 6, 1, CHUNK, 2 * CHUNK + 1, 2)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gated_delta")


def alone_and_together(directory: Path, cpu: Device) -> None:
    """One rank: hidden states and every gradient of examples in one row, and of each example in a row of its own."""
    layout = plan_layout(schema.Parallel(), load_settings(directory).shape, 1)
    groups = parallel_groups.init(layout)
    part = build_part(schema.Run(), cpu, groups, dtype=torch.float64, reads_inputs=False, source=Source(directory))
    (chunk,) = part.chunks
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 131, (length,), generator=draw) for length in LENGTHS]
    weights = [torch.randn(length, 32, generator=draw, dtype=torch.float64) for length in LENGTHS]

    def run(rows: list[Tensor], weights: list[Tensor]) -> Tensor:
        ends = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).to(torch.int32)
        positions = torch.cat([torch.arange(len(row)) for row in rows])
        hidden = chunk(torch.cat(rows), positions, ends)[:, 0]
        (hidden * torch.cat(weights)).sum().backward()
        return hidden.detach()

    together, packed = run(rows, weights), gradients(part)
    alone = torch.cat([run([row], [weight]) for row, weight in zip(rows, weights, strict=True)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)
    for name, gradient in gradients(part).items():
        torch.testing.assert_close(packed[name], gradient, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    parallel_groups.close()


def gradients(part: Any) -> dict[str, Tensor]:
    """Returns the gradients of the parameters and clears them."""
    found = {named.name: named.parameter.grad for named in part.named_parameters() if named.parameter.grad is not None}
    for named in part.named_parameters():
        named.parameter.grad = None
    assert any(name.endswith("self_attention.conv") for name in found)
    return found


def test_no_state_goes_from_example_to_example(ranks: Any, cpu: Device, tmp_path: Path) -> None:
    ranks(1, alone_and_together, tiny.make(tmp_path, "qwen3_next_dense"), cpu)


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkvz", "in_proj_ba", "out_proj")


def pefts_logits(model: Path, adapter: Path, merged: Path) -> tuple[float, float]:
    """One rank: the difference of the merged model from the base, and from PEFT's model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(90)[None] % 131
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(model)
        before = base(tokens).logits
        theirs = PeftModel.from_pretrained(base, str(adapter))(tokens).logits
        ours = AutoModelForCausalLM.from_pretrained(merged)(tokens).logits
    return float((ours - before).abs().max()), float((ours - theirs).abs().max())


def test_an_adapter_of_attention_is_pefts(ranks: Any, cpu: Device, tmp_path: Path) -> None:
    """The gates joined to the queries, and a delta net's projections, get adapters as in PEFT."""
    model = tiny.make(tmp_path / "model", "qwen3_next")
    run = settings(model, schema.Parallel(), "lora")
    run = dataclasses.replace(run, tuner=dataclasses.replace(run.tuner, target_modules=ATTENTION))
    layout = plan_layout(schema.Parallel(), load_settings(model).shape, 1)
    ranks(1, parity.random_adapter, run, cpu, layout, tmp_path / "adapter")
    merge(model, tmp_path / "adapter", tmp_path / "merged")
    moved, apart = ranks(1, pefts_logits, model, tmp_path / "adapter", tmp_path / "merged")
    assert moved > 0.1 and apart < 1e-4


@pytest.mark.parametrize("recompute, tuner", RECOMPUTED)
def test_recompute(work: Path, cpu: Device, tuner: str, recompute: str) -> None:
    check(work, cpu, "qwen3_next", tuner, "tp2-ep2-etp1-sp", recompute=recompute)


def test_distributed_optimizer(work: Path, cpu: Device) -> None:
    """Optimizer state sharded over data ranks, communication overlapped: parameters that the module itself owns are waited for too."""
    parallel, world = parse_layout("tp2-ep2-etp1-dp2-sp")
    parallel = dataclasses.replace(
        parallel, distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True, ddp_bucket_size=4000
    )
    one = bench(work, cpu, "qwen3_next", "full")
    check_steps(one, *one.steps("overlap", parallel, world))
