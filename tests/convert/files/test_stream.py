"""A Hugging Face directory rewritten with other file sizes or another dtype, a few rows at a time: every tensor is there."""

import json
import resource
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from swift_mega import api
from swift_mega.convert.files import stream
from swift_mega.convert.files.hf_files import Checkpoint
from swift_mega.convert.files.report import problems
from swift_mega.errors import UserError
from tests import tiny


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_every_tensor(tmp_path, monkeypatch, dtype):
    """In pieces of 100 bytes. Tensors that are not floating point keep their dtype."""
    monkeypatch.setattr(stream, "IN_FLIGHT", 100)
    tensors = {
        "a": torch.randn(9, 7).to(torch.bfloat16),
        "wide": torch.randn(3, 200),
        "scalar": torch.tensor(1.5),
        "none": torch.empty(0, 3),
        "count": torch.arange(40),
        "flag": torch.tensor([True, False]),
    }
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text('{"torch_dtype": "bfloat16", "x": 1}')
    (tmp_path / "in" / "report.json").write_text("{}")
    stream.restream(Checkpoint(tmp_path / "in"), tmp_path / "out", dtype=dtype, max_shard_bytes=500)
    found = {
        name: value for file in (tmp_path / "out").glob("*.safetensors") for name, value in load_file(file).items()
    }
    assert found.keys() == tensors.keys() and len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    for name, value in tensors.items():
        wanted = value.to(dtype) if dtype and value.is_floating_point() else value
        assert found[name].dtype == wanted.dtype and torch.equal(found[name], wanted), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    said = {"torch_dtype": "bfloat16"} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}
    assert config == {"x": 1, **said}
    assert problems(tmp_path / "out") == (6, [])


def test_the_config_is_held_against_the_tensors(tmp_path):
    directory = tiny.make(tmp_path / "in", "llama")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"config.json states 3 layers, and layers up to 3 are there"):
        api.convert(source=str(directory), to="hf", output=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_type_that_nobody_knows_is_copied_and_said(tmp_path, capsys):
    directory = tiny.make(tmp_path / "in", "llama")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    api.convert(source=str(directory), to="hf", output=str(tmp_path / "out"), dtype="bfloat16")
    assert "model_type unheard_of is not known: tensors are copied, not checked against it" in capsys.readouterr().out
    assert Checkpoint(tmp_path / "out").entries.keys() == Checkpoint(directory).entries.keys()


def test_outputs_that_cannot_be(tmp_path):
    directory = tiny.make(tmp_path / "in", "llama")
    source = Checkpoint(directory)
    with pytest.raises(UserError, match=r"output .* contains .*, the input; choose another path"):
        stream.restream(source, tmp_path, max_shard_bytes=1000, overwrite=True)
    stream.restream(source, tmp_path / "out", max_shard_bytes=1000)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match=r"exists already and is left as it is"):
        stream.restream(source, tmp_path / "out", dtype=torch.float64, max_shard_bytes=1000)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*/out: File too large; free the space"):
            stream.restream(source, tmp_path / "out", max_shard_bytes=1 << 30, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
