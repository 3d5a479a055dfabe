"""Boxes of a torch_dist checkpoint equal slices of its tensors, and code in a pickle of it never runs."""

import itertools
import os
import pickle
import re
import shutil
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.distributed import checkpoint as dcp

from swift_mega import api
from swift_mega.convert.megatron.torch_dist import ChunkWriter, TorchDist, read_metadata
from swift_mega.errors import UserError
from tests import tiny


def write_by_torch(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Writes each tensor in one chunk with torch's own writer."""
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[list[int], list[list[int]], list[tuple[int, int]], int]:
    """A shape, the borders of its chunks, a box in it, and how many leading dims the box has a single index of."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    cuts = [sorted(draw(st.sets(st.integers(1, size), max_size=2)) | {0, size}) for size in shape]
    box, lead = [], draw(st.integers(0, len(shape) - 1))
    for dim, size in enumerate(shape):
        start = draw(st.integers(0, size - 1))
        box.append((start, start + 1 if dim < lead else draw(st.integers(start + 1, size))))
    return shape, cuts, box, lead


@settings(max_examples=60, deadline=None)
@given(boxes())
def test_a_box_of_chunks_is_a_slice(tmp_path_factory, drawn):
    shape, cuts, box, lead = drawn
    folder = tmp_path_factory.mktemp("box")
    tensor = torch.randn(shape).to(torch.bfloat16)
    write_by_torch(folder, {"other": torch.zeros(3)})
    with ChunkWriter(folder) as writer:
        for ranges in itertools.product(*(itertools.pairwise(ends) for ends in cuts)):
            part = tensor[tuple(slice(*ends) for ends in ranges)]
            writer.add("x", shape, [start for start, _ in ranges], part)
        writer.finish()
    found = {"x": torch.empty(shape, dtype=torch.bfloat16), "other": torch.ones(3)}
    dcp.load(found, checkpoint_id=folder, no_dist=True)  # torch reads what we write
    assert torch.equal(found["x"], tensor) and not found["other"].any()
    want = tensor[tuple(slice(*ends) for ends in box)]
    have = torch.full(want.shape[lead:], 7, dtype=torch.bfloat16)
    TorchDist(folder).read_into(have, "x", [start for start, _ in box], lead)
    assert torch.equal(have, want.reshape(want.shape[lead:]))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(5, 7), torch.randn(5, 7).t(), torch.randn(5, 7)[1:4, 2:6], torch.tensor(3.5), torch.arange(24).view(2, 3, 4),
        torch.randn(6, 4).to(torch.float8_e4m3fn), torch.nn.Parameter(torch.randn(4, 3)), torch.randn(0, 4),
        torch.randn(2, 3, 4).transpose(0, 2),
    ],
    ids=["plain", "transposed", "a view", "a number", "integers", "float8", "a parameter", "empty", "transposed in 3 dims"],
)  # fmt: skip
def test_what_torch_wrote(tmp_path, tensor):
    """Also where the numbers are not contiguous and torch has to make the chunk."""
    write_by_torch(tmp_path, {"x": tensor})
    have = torch.zeros(tensor.shape, dtype=tensor.dtype)
    TorchDist(tmp_path).read_into(have, "x", [0] * tensor.dim(), 0)
    assert torch.equal(have.float(), tensor.detach().float())
    if tensor.dim() == 2 and len(tensor):
        rows = torch.zeros((2, *tensor.shape[1:]), dtype=tensor.dtype)
        TorchDist(tmp_path).read_into(rows, "x", [1, 0], 0)
        assert torch.equal(rows.float(), tensor.detach()[1:3].float())


def test_a_box_that_is_not_there(tmp_path):
    write_by_torch(tmp_path, {"x": torch.randn(4, 4)})
    with pytest.raises(ValueError, match=r"x: 8 of 12 elements from \[2, 0\] on are in the files"):
        TorchDist(tmp_path).read_into(torch.empty(3, 4), "x", [2, 0], 0)


class Runs:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("ranks_started", [False, True], ids=["one process", "ranks"])
def test_a_pickle_that_would_run_something(ranks, tmp_path, ranks_started):
    """In .metadata: for our reader, and before Megatron's reader, which would run it."""
    source = tiny.make(tmp_path / "hf", "llama")
    api.convert(source=str(source), to="mcore", output=str(tmp_path / "mcore"))
    metadata = read_metadata(tmp_path / "mcore" / "release")
    metadata.planner_data = Runs(tmp_path / "ran")
    (tmp_path / "mcore" / "release" / ".metadata").write_bytes(pickle.dumps(metadata))
    given = dict(source=str(tmp_path / "mcore"), to="hf", output=str(tmp_path / "out"))
    with pytest.raises(
        UserError, match=r"\.metadata of the checkpoint names (posix|nt)\.mkdir, which is no part of such metadata"
    ):
        if ranks_started:
            from swift_mega.config.schema import Parallel

            ranks(2, _convert, given | {"parallel": Parallel(tensor=2)})
        else:
            api.convert(**given)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def _convert(given: dict[str, object]) -> None:
    api.convert(**given)  # type: ignore[arg-type]


def test_a_chunk_that_is_damaged(tmp_path):
    """The damage is found during the conversion, and no output is left."""
    source = tiny.make(tmp_path / "hf", "llama")
    api.convert(source=str(source), to="mcore", output=str(tmp_path / "mcore"))
    release = tmp_path / "mcore" / "release"
    (info,) = (
        info
        for index, info in read_metadata(release).storage_data.items()
        if index.fqn == "decoder.final_layernorm.weight"
    )
    with (release / info.relative_path).open("r+b") as file:
        file.seek(info.offset + info.length - 22)  # the end record of its zip file
        file.write(b"\0" * 22)
    with pytest.raises(UserError, match=r"release cannot be read as a torch_dist checkpoint: .*zip.*; copy it again"):
        api.convert(source=str(tmp_path / "mcore"), to="hf", output=str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mcore"]


def test_a_file_elsewhere(tmp_path):
    write_by_torch(tmp_path / "a", {"x": torch.randn(4)})
    metadata = read_metadata(tmp_path / "a")
    for info in metadata.storage_data.values():
        info.relative_path = "../" + info.relative_path
    (tmp_path / "a" / ".metadata").write_bytes(pickle.dumps(metadata))
    for file in (tmp_path / "a").glob("*.distcp"):
        shutil.copy(file, tmp_path)
    with pytest.raises(ValueError, match=re.escape("names a file '../__0_0.distcp', which is not in its folder")):
        TorchDist(tmp_path / "a").read_into(torch.empty(4), "x", [0], 0)
