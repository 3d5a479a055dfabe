"""Quantised checkpoints, read as plain ones: against files that were written number by number, and other people's dequantisers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import quantised_files as files
import tiny
from swift_mega.convert import quantised
from swift_mega.convert.hf_files import Checkpoint
from swift_mega.convert.quantised import Dequantised, open_checkpoint
from swift_mega.errors import UserError


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("plain") / "llama", "llama", num_hidden_layers=1)


@pytest.fixture(scope="module", params=list(files.FORMATS))
def stored(request, plain, tmp_path_factory):
    """A quantised directory and the weights it means."""
    target = tmp_path_factory.mktemp(request.param) / "model"
    return target, files.write(plain, target, request.param)


def test_names_shapes_and_numbers_are_the_plain_models(stored, plain):
    """Every weight, to the bit: float32 as each formula gives it, and its rounding to bfloat16; what was plain stays what it was."""
    directory, meant = stored
    wide, narrow = (open_checkpoint(directory, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert wide.entries.keys() == narrow.entries.keys() == Checkpoint(plain).entries.keys()
    assert any(files.linear(name) for name in meant)
    for name, value in meant.items():
        assert wide.entries[name].shape == narrow.entries[name].shape == value.shape
        assert torch.equal(wide.read(name), value), name
        expected = value.bfloat16() if files.linear(name) else value
        assert narrow.entries[name].dtype == narrow.read(name).dtype == expected.dtype
        assert torch.equal(narrow.read(name), expected), name


def test_slices_are_slices_of_the_whole(stored):
    """Along both dims, inside words and blocks and over their ends, empty and whole."""
    directory, meant = stored
    found = open_checkpoint(directory, torch.float32)
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.weight"):
        for axis in (0, 1):
            size = meant[name].shape[axis]
            for start, stop in ((0, size // 2), (size // 2, size), (5, 27), (3, 4), (13, 13), (size - 1, size)):
                value = found.read(name, axis, start, stop)
                assert torch.equal(value, meant[name].narrow(axis, start, stop - start)), (name, axis, start, stop)
        assert torch.equal(found.read(name, 0, 7), meant[name][7:])


def test_pieces_do_not_show(stored, monkeypatch):
    """A weight that is dequantised in many pieces has the bits of one that is not."""
    directory, meant = stored
    monkeypatch.setattr(quantised, "CHUNK", 40)
    monkeypatch.setattr(quantised, "ALIGNED", 3)
    found = open_checkpoint(directory, torch.float32)
    for name in filter(files.linear, meant):
        assert torch.equal(found.read(name), meant[name]), name
        assert torch.equal(found.read(name, 0, 5, 31), meant[name][5:31]), name


def test_without_asking_nothing_is_dequantised(stored):
    """The stored tensors are what they are; who needs them as weights refuses them (test_coverage.py)."""
    directory, _ = stored
    assert not isinstance(open_checkpoint(directory), Dequantised)
    assert open_checkpoint(directory).entries.keys() == Checkpoint(directory).entries.keys()
