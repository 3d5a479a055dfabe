"""Dropout of adapters: the same mask where ranks have the same activations, different masks where they have different ones."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tiny
from swift_mega.config import schema
from swift_mega.device.device import Device
from swift_mega.models.translate import load_settings
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.agree import gather
from swift_mega.parallel.layout import Coordinate, parse_layout, plan_layout
from swift_mega.train.step import run_schedule
from swift_mega.train.wire import build_training
from swift_mega.tuners.lora import Adapter
from swift_mega.verify import parity

Masks = dict[str, list[list[bool]]]
"""By linear: the first values of the mask of each of its calls."""


def dropped(model: Path, device: Device, layout_name: str) -> list[tuple[Coordinate, Masks]]:
    """The masks of every rank in two microbatches."""
    parallel, world = parse_layout(layout_name)
    layout = plan_layout(parallel, load_settings(model).shape, world)
    run = schema.Run(
        model=schema.Model(path=str(model)),
        parallel=parallel,
        tuner=schema.Lora(rank=2, dropout=0.5, target_modules=("q_proj", "o_proj", "up_proj", "down_proj")),
    )
    groups = parallel_groups.init(layout, seed=run.train.seed)
    training = build_training(run, device, groups, steps=1)
    names = {
        module: name
        for chunk in training.part.chunks
        for name, module in chunk.named_modules()
        if isinstance(module, Adapter)
    }
    found: Masks = {}
    drop = Adapter._drop

    def noted(adapter: Adapter, x: Tensor) -> Tensor:
        out = drop(adapter, torch.ones_like(x))
        found.setdefault(names[adapter], []).append((out.flatten()[:64] == 0).tolist())
        return x * out

    Adapter._drop = noted  # type: ignore[method-assign]
    for chunk in training.chunks:
        chunk.train()
    rows = parity.example_rows(training.part.settings.shape.vocab, examples=4 * layout.data)
    run_schedule(training, parity.microbatches(rows, layout, groups.coordinate.data)[:2], forward_only=False)
    Adapter._drop = drop  # type: ignore[method-assign]
    told = gather((groups.coordinate, found))
    parallel_groups.close()
    return told


def test_dense(ranks: Any, tmp_path: Path, cpu: Device) -> None:
    """Column-parallel linears get the same tokens on all tensor ranks; row-parallel linears get each rank's own features."""
    model = tiny.make(tmp_path, "llama", num_hidden_layers=2)
    for name, own in (("tp2-dp2", "data"), ("tp2-cp2-ring", "context")):
        calls = []
        for where, masks in ranks(4, dropped, model, cpu, name):
            calls += [
                (
                    where.tensor * (".linear_proj." in linear or ".linear_fc2." in linear),
                    getattr(where, own),
                    linear,
                    n,
                    mask,
                )
                for linear, each in masks.items()
                for n, mask in enumerate(each)
            ]
        assert len(calls) == 4 * 2 * 4 * 2  # ranks, layers, linears, microbatches
        check(calls)


def test_stages(ranks: Any, tmp_path: Path, cpu: Device) -> None:
    model = tiny.make(tmp_path, "llama", num_hidden_layers=2)
    told = ranks(2, dropped, model, cpu, "pp2")
    check(
        [
            (where.pipeline, linear, n, mask)
            for where, found in told
            for linear, e in found.items()
            for n, mask in enumerate(e)
        ]
    )


def test_experts(ranks: Any, tmp_path: Path, cpu: Device) -> None:
    """Ranks that share an expert get the same tokens, from all their data ranks; `down_proj` gets each rank's own features."""
    model = tiny.make(tmp_path, "qwen3_moe", num_hidden_layers=1)
    calls = []
    for where, masks in ranks(4, dropped, model, cpu, "ep2-etp2"):
        for linear, each in masks.items():
            if ".experts." in linear:
                own = where.expert_tensor * (".linear_fc2." in linear)
                calls += [(where.expert, own, linear, n, mask) for n, mask in enumerate(each) if len(mask) == 64]
    assert len(calls) > 8
    check(calls)


def check(calls: list[tuple[Any, ...]]) -> None:
    """Masks are equal where all coordinates before them are equal, and nowhere else."""
    by_place: dict[Any, Any] = {}
    for *place, mask in calls:
        assert by_place.setdefault(tuple(place), mask) == mask, place
    assert len({tuple(mask) for mask in by_place.values()}) == len(by_place), "two places drop the same"
