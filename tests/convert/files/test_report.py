"""report.json against the files: any byte that changes later is found, and its tensor is named."""

import hashlib
import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from swift_mega.convert.files.hf_files import Checkpoint
from swift_mega.convert.files.hf_write import Writer, plan_files, write_headers
from swift_mega.convert.files.report import checksums, problems, write_report
from swift_mega.errors import UserError


@pytest.fixture
def directory(tmp_path):
    tensors = {f"t{n}": torch.randn(n + 1, 7).to(torch.bfloat16) for n in range(12)}
    planned = plan_files({name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}, 300)
    write_headers(tmp_path, planned)
    with Writer(tmp_path, planned) as writer:
        for name, value in tensors.items():
            writer.write(name, value)
    write_report(tmp_path, planned, checksums(tmp_path, planned, planned))
    return tmp_path


def test_the_checksums_are_those_of_the_tensors(directory):
    report = json.loads((directory / "report.json").read_text())
    assert problems(directory) == (12, []) and report["tensors_in_all"] == 12
    for file in directory.glob("*.safetensors"):
        for name, value in load_file(file).items():
            raw = value.view(torch.uint8).numpy().tobytes()
            assert report["tensors"][name]["sha256"] == hashlib.sha256(raw).hexdigest()
            assert report["tensors"][name]["file"] == file.name


def test_every_flipped_byte_is_named(directory):
    draw = random.Random(0)
    for name, entry in Checkpoint(directory).entries.items():
        raw = bytearray(entry.file.read_bytes())
        at = draw.randrange(entry.begin, entry.end)
        raw[at] ^= 1 << draw.randrange(8)
        whole = entry.file.read_bytes()
        entry.file.write_bytes(raw)
        _, found = problems(directory)
        assert len(found) == 1 and found[0].startswith(f"{name} in {entry.file.name} has other bytes (sha256 "), found
        entry.file.write_bytes(whole)


def test_missing_added_and_reshaped_tensors(directory):
    (directory / "model.safetensors.index.json").unlink()
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        if "t5" in tensors:
            tensors["other"] = tensors.pop("t5")
        if "t6" in tensors:
            tensors["t6"] = tensors["t6"].t().contiguous()
        save_file(tensors, file)
    _, found = problems(directory)
    assert "t5 is missing" in found and any(line.startswith("other in model-") for line in found)
    assert "t6 is BF16 [7, 7], was BF16 [7, 7]" not in found and any(line.startswith("t6 in") for line in found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no report.json, so its bytes cannot be checked"),
        ("{}", "is not a report of tensors; write"),
        ("{", "is not valid JSON"),
    ],
)
def test_no_report(directory, text, message):
    (directory / "report.json").unlink()
    if text is not None:
        (directory / "report.json").write_text(text)
    with pytest.raises(UserError, match=message):
        problems(directory)
