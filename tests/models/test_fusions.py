"""Megatron's fused functions are on only where they compute what the model computes; here they run uncompiled, on the CPU."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tiny
from swift_mega.config import schema
from swift_mega.data.pack import Microbatch
from swift_mega.device import backends
from swift_mega.device.device import Device
from swift_mega.errors import UserError
from swift_mega.launch.torchrun import run_ranks
from swift_mega.models import fusions
from swift_mega.models.megatron_config import check_passthrough
from swift_mega.models.translate import load_settings
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.layout import plan_layout
from swift_mega.train.step import run_schedule
from swift_mega.train.wire import Training, build_training
from swift_mega.verify import parity

CUDA = Device(kind="cuda", device=torch.device("cpu"), backend="gloo", name="stand-in")
FAMILIES = {
    # activation, bias and residual; the second where it is more than a sum without dropout
    "llama": (True, True, False),
    "llama_bias": (True, True, True),
    "starcoder2": (False, True, True),
    "qwen3_moe": (True, True, False),
    "gemma2": (False, False, False),
    "gpt_oss": (False, False, False),
    "gpt_neox": (False, False, False),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    work = tmp_path_factory.mktemp("fusions")
    return {name: tiny.make(work / name, name, num_hidden_layers=2) for name in FAMILIES}


def test_what_is_on_by_default(models: dict[str, Path], cpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusions, "cannot_compile", lambda: None)
    for name, (activation, residual, without_dropout) in FAMILIES.items():
        settings = load_settings(models[name])
        for dropout, wanted in ((0.0, without_dropout), (0.1, residual)):
            found = fusions.fused(settings, CUDA, torch.bfloat16, dropout)
            assert found == {"bias_activation_fusion": activation, "bias_dropout_fusion": wanted}, name
        for device, dtype in ((cpu, torch.bfloat16), (CUDA, torch.float64)):
            assert not any(fusions.fused(settings, device, dtype, 0.1).values())


def test_a_machine_that_cannot_compile(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing is fused by default. A fusion that is asked for is refused with what is missing."""
    settings = load_settings(models["llama"])
    monkeypatch.setattr(backends, "_there", lambda name: True)
    monkeypatch.setattr(backends, "sysconfig", SimpleNamespace(get_path=lambda name: str(tmp_path)))
    monkeypatch.setenv("CC", "cc")
    missing = [
        r"Python\.h, which is missing",
        "a C compiler, and there is none",
        "the package triton, which is not installed",
    ]
    for spoil in (
        lambda: None, lambda: (monkeypatch.delenv("CC"), monkeypatch.setenv("PATH", "")),
        lambda: monkeypatch.setattr(backends, "_there", lambda name: False),
    ):  # fmt: skip
        spoil()
        assert not any(fusions.fused(settings, CUDA, torch.bfloat16, 0.1).values())
        with pytest.raises(UserError, match=f"bias_activation_fusion=True needs {missing.pop(0)}"):
            check_passthrough({"bias_activation_fusion": True}, settings, schema.Train(), CUDA)
    assert not missing
    check_passthrough({"bias_activation_fusion": False}, settings, schema.Train(), CUDA)


def test_fused_is_the_same_model(models: dict[str, Path], cpu: Device) -> None:
    """With the allowed fusions, loss and gradients equal those without, for every kind of MLP that allows them."""
    for name, (loss, gradient) in run_ranks(1, differences, models, cpu).items():
        assert loss < 1e-6 and gradient < 2e-6, (name, loss, gradient)


def differences(models: dict[str, Path], device: Device) -> dict[str, tuple[float, float]]:
    return {
        name: difference(models[name], device, activation, residual)
        for name, (activation, residual, _) in FAMILIES.items()
        if activation or residual
    }


def difference(model: Path, device: Device, activation: bool, residual: bool) -> tuple[float, float]:
    """The difference of the loss, and the relative difference of all gradients."""
    run = schema.Run(
        model=schema.Model(path=str(model)),
        parallel=schema.Parallel(distributed_optimizer=False),
        tuner=schema.Full(),
    )
    settings = load_settings(model)
    layout = plan_layout(run.parallel, settings.shape, 1)
    training = build_training(run, device, parallel_groups.init(layout, seed=1), steps=1)
    rows = parity.microbatches(parity.example_rows(settings.shape.vocab, examples=2), layout, 0)
    loss, gradient = measured(training, rows)
    for module in training.chunks[0].modules():
        if hasattr(module, "config"):
            module.config.bias_activation_fusion, module.config.bias_dropout_fusion = activation, residual
            module.config.__post_init__()  # Megatron's own conditions
    fused_loss, fused_gradient = measured(training, rows)
    parallel_groups.close()
    return abs(fused_loss - loss), float((fused_gradient - gradient).norm() / gradient.norm())


def measured(training: Training, rows: list[Microbatch]) -> tuple[float, torch.Tensor]:
    (chunk,) = training.chunks
    chunk.zero_grad_buffer()
    loss = run_schedule(training, rows, forward_only=False).loss
    return loss, torch.cat([p.main_grad.flatten() for p in chunk.parameters()]).clone()
