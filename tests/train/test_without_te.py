"""A CUDA device without Transformer Engine: Megatron's local modules are built, and give the same numbers as on the CPU.

The device is a stand-in, CUDA by name with CPU tensors. So the test shows which modules are chosen, not what GPUs compute.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from swift_mega.config import schema
from swift_mega.device.backends import transformer_engine
from swift_mega.device.device import CPU, Device
from swift_mega.models.translate import load_settings
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.layout import Layout, parse_layout, plan_layout
from swift_mega.train.header import header
from swift_mega.train.wire import build_training
from swift_mega.verify import parity

AS_IF = Device(kind="cuda", device=CPU, backend="gloo", name="as if")
LAYOUTS = {
    "llama": "tp2-sp",
    "qwen3_moe": "ep2",
    "deepseek_v3_moe": "tp2-sp",
    "gpt_oss": "ep2",
    "qwen3_next": "single",
}
# Not qwen3_next, whose config.json names its four layers.
TWO_LAYERS = {family: {"num_hidden_layers": 2} for family in LAYOUTS if family != "qwen3_next"}


def measured(run: schema.Run, where: Device, layout: Layout, rows: parity.Rows, output: Path) -> list[str]:
    """Writes logits and gradients of one rank; returns the lines that a run prints at its start."""
    groups = parallel_groups.init(layout, seed=run.train.seed)
    training = build_training(run, where, groups, steps=1)
    parity.write_measured(training, rows, output)
    said = header(training)
    parallel_groups.close()
    return said


def both(run: schema.Run, cpu: Device, layout: Layout, rows: parity.Rows, folder: Path) -> list[list[str]]:
    """On the CPU, then on the stand-in for CUDA."""
    return [measured(run, where, layout, rows, folder / where.kind) for where in (cpu, AS_IF)]


@pytest.mark.skipif(transformer_engine().version is not None, reason="Transformer Engine is installed")
@pytest.mark.parametrize("family", LAYOUTS)
def test_the_same_numbers(tmp_path: Path, cpu: Device, ranks: Any, family: str) -> None:
    """In bfloat16, where Transformer Engine's modules would be used if it were installed; within the rounding of bfloat16."""
    model = tiny.make(tmp_path / "model", family, dtype=torch.bfloat16, **TWO_LAYERS.get(family, {}))
    shape = load_settings(model).shape
    parallel, world = parse_layout(LAYOUTS[family])
    run = schema.Run(model=schema.Model(path=str(model), dtype="bfloat16"), parallel=parallel)
    layout, rows = plan_layout(parallel, shape, world), parity.example_rows(shape.vocab, examples=4)
    here, there = ranks(world, both, run, cpu, layout, rows, tmp_path)
    found = parity.compare(family, tmp_path / "cpu", tmp_path / "cuda")
    assert found.logits < 0.05 and found.gradient < 0.05, found
    assert "layers: Megatron's local modules; optimizer: " in here[0] and len(here) == 2
    assert here[1].startswith("kernels             train.kernels=auto: attention: ")
    assert here[0].split(";")[0] == there[0].split(";")[0] and "torch's AdamW" in there[0]
    assert (
        there[2]
        == "optional packages   Transformer Engine is not installed; flash-attn is not installed; apex is not installed"
    )
