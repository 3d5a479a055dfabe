"""Optional packages: a broken package is distinguished from a missing one and does no harm; GPUs that torch cannot use are reported."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from swift_mega.api.proof import say_of_unused_gpus
from swift_mega.device.backends import Package, transformer_engine
from swift_mega.device.device import CPU, Device, unused_gpus

CUDA = Device(kind="cuda", device=CPU, backend="gloo", name="as if")


@pytest.fixture
def searched_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Transformer Engine is searched for again in the test, and after it."""
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    transformer_engine.cache_clear()
    yield
    sys.modules.pop("transformer_engine", None)
    transformer_engine.cache_clear()


@pytest.mark.parametrize(
    ("part", "raised", "said"),
    [
        ("__init__", "OSError('libcudnn.so.9: cannot open')", "libcudnn.so.9: cannot open"),
        ("pytorch", "ImportError('undefined symbol: _ZN3c10')", "undefined symbol: _ZN3c10"),
        ("pytorch", "RuntimeError()", "RuntimeError"),
    ],
)
def test_a_broken_transformer_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, searched_anew: None, part: str, raised: str, said: str
) -> None:
    """Its layers are not used, the reason is kept, and Megatron, which imports it next, finds no Transformer Engine at all."""
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").touch()
    (tmp_path / "transformer_engine" / f"{part}.py").write_text(f"raise {raised}")
    monkeypatch.syspath_prepend(tmp_path)
    found = transformer_engine()
    assert str(found) == f"Transformer Engine is installed and cannot be imported ({said})"
    assert not CUDA.uses_transformer_engine(torch.bfloat16)
    assert importlib.util.find_spec("transformer_engine") is None
    with pytest.raises(ImportError):
        importlib.import_module("transformer_engine.pytorch")


@pytest.mark.parametrize(
    ("kind", "dtype", "version", "used"),
    [
        ("cuda", torch.bfloat16, "2.20.2", True),
        ("cuda", torch.float16, "2.20.2", True),
        ("cuda", torch.float32, "2.20.2", False),
        ("cuda", torch.float64, "2.20.2", False),
        ("cuda", torch.bfloat16, None, False),
        ("cpu", torch.bfloat16, "2.20.2", False),
    ],
)
def test_whose_layers(
    monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype, version: str | None, used: bool
) -> None:
    found = Package(name="Transformer Engine", version=version)
    monkeypatch.setattr("swift_mega.device.device.transformer_engine", lambda: found)
    device = Device(kind=kind, device=CPU, backend="gloo", name="as if")  # type: ignore[arg-type]
    assert device.uses_transformer_engine(dtype) is used


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch uses the GPUs")
def test_unused_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU build of torch, a driver that does not fit, and GPUs hidden by the user."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert unused_gpus(tmp_path) is None
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    monkeypatch.setattr(torch.version, "cuda", None)
    said = unused_gpus(tmp_path)
    assert said is not None and f"has {tmp_path}/nvidia0, {tmp_path}/nvidia1, and ranks run on the CPU: torch" in said
    assert "is a build without CUDA; install one with it" in said
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "cannot use them (CUDA 13.0); see `nvidia-smi`" in str(unused_gpus(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert unused_gpus(tmp_path) is None


def test_verify_tells_of_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, from one rank."""
    monkeypatch.setattr("swift_mega.device.device.unused_gpus", lambda: "this machine has GPUs")
    say_of_unused_gpus()
    assert capsys.readouterr().err == "this machine has GPUs\n"
    monkeypatch.setenv("RANK", "1")
    say_of_unused_gpus()
    assert capsys.readouterr().err == ""
