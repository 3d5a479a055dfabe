"""Frozen experts in one grouped product per linear equal Megatron's loop; grouped_mm runs on the CPU too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from swift_mega.config import schema
from swift_mega.device.device import Device
from swift_mega.launch.torchrun import run_ranks
from swift_mega.models.modules import experts
from swift_mega.models.translate import load_settings
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.layout import parse_layout, plan_layout
from swift_mega.train.step import run_schedule
from swift_mega.train.wire import build_training
from swift_mega.verify import parity

CASES = {
    ("qwen3_moe", "", "none"): 1,
    ("gpt_oss", "", "full"): 1,  # biases, a clamp and an offset; computed again in the backward pass
    ("qwen3_moe", "tp2-ep2-etp1-sp", "none"): 2,
    ("qwen3_moe", "tp2-ep2-etp2-sp", "none"): 4,  # experts sharded over tensor ranks
}


@pytest.mark.parametrize(("family", "layout", "recompute"), CASES)
def test_grouped_is_the_loop(family: str, layout: str, recompute: str, tmp_path: Path, cpu: Device) -> None:
    """Loss and gradients of adapters on all linears, those of experts too; the products really are grouped."""
    model = tiny.make(tmp_path, family, num_hidden_layers=2)
    world = CASES[family, layout, recompute]
    loss, gradient, products = run_ranks(world, differences, model, layout, recompute, cpu)
    assert loss < 1e-6 and gradient < 2e-6, (loss, gradient)
    # Two linears in two layers: forward (twice where it is recomputed), and the gradient of the input.
    assert products == 2 * 2 * (3 if recompute == "full" else 2)


class Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.grouped = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.grouped += func is torch.ops.aten._grouped_mm.default
        return func(*args, **(kwargs or {}))


def differences(model: Path, layout: str, recompute: Any, device: Device) -> tuple[float, float, int]:
    (loss, gradient, none), (grouped_loss, grouped_gradient, products) = (
        measured(model, layout, recompute, device, grouped) for grouped in ({}, {"cpu": (torch.float32,)})
    )
    assert none == 0
    return abs(grouped_loss - loss), float((grouped_gradient - gradient).norm() / gradient.norm()), products


def measured(
    model: Path, layout: str, recompute: Any, device: Device, grouped: dict[str, Any]
) -> tuple[float, Tensor, int]:
    """One rank: loss, gradients, and the number of grouped products of a microbatch."""
    experts.GROUPED = grouped
    parallel = parse_layout(layout)[0] if layout else schema.Parallel()
    run = schema.Run(
        model=schema.Model(path=str(model)),
        parallel=parallel,
        train=schema.Train(recompute=recompute),
        tuner=schema.Lora(rank=4, target_modules=("all-linear",)),
    )
    settings = load_settings(model)
    planned = plan_layout(parallel, settings.shape, torch.distributed.get_world_size())
    groups = parallel_groups.init(planned, seed=1)
    training = build_training(run, device, groups, steps=1)
    draw = torch.Generator().manual_seed(groups.coordinate.expert + 7)
    trained = [p for chunk in training.chunks for p in chunk.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    rows = parity.microbatches(parity.example_rows(settings.shape.vocab, examples=4), planned, 0)
    with Products() as products:
        loss = run_schedule(training, rows, forward_only=False).loss
    gradient = torch.cat([p.main_grad.flatten() for p in trained]).clone()
    parallel_groups.close()
    return loss, gradient, products.grouped // len(rows)


def test_weights_that_lie_together() -> None:
    """Tensors at equal distances in one storage are viewed as one tensor; others are not."""
    whole = torch.arange(48.0).view(4, 2, 6)
    found = experts.together([part[:, :3].reshape(-1).view(2, 3) for part in whole])
    assert found is None, "copies"
    found = experts.together(list(whole))
    assert found is not None and torch.equal(found, whole) and found.data_ptr() == whole.data_ptr()
    found = experts.together([part[1] for part in whole])
    assert found is not None and torch.equal(found, whole[:, 1]), "a gap between them"
    assert experts.together(list(whole.flip(0).unbind())) is not None
    assert experts.together([whole[3], whole[2]]) is None, "backwards"
    assert experts.together([whole[0], whole[1], whole[3]]) is None, "unequal distances"
    assert experts.together([part.t() for part in whole]) is None, "not contiguous"
    assert experts.together([whole[0], whole[1].clone()]) is None, "two storages"
