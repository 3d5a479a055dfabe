"""Slices of a file read into tensors of any shape, strides and dtype, against indexing of the whole tensor."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from swift_mega.convert.files import spans
from swift_mega.convert.files.hf_files import Checkpoint
from swift_mega.errors import UserError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], int | None, int, int, torch.dtype, torch.dtype]:
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    axis = draw(st.one_of(st.none(), st.integers(0, len(shape) - 1)))
    start = draw(st.integers(0, shape[axis or 0] - 1))
    stop = draw(st.integers(start, shape[axis or 0]))
    return shape, axis, start, stop, draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(), short=st.sampled_from([1, 32, 1 << 20]), buffer=st.sampled_from([64, 256, 1 << 20]))
def test_any_slice_into_any_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case, short, buffer):
    """The limits are small, so that every path (direct, converted, with strides, row by row) is taken."""
    shape, axis, start, stop, stored, wanted = case
    monkeypatch.setattr(spans, "SHORT", short)
    monkeypatch.setattr(spans, "BUFFER", buffer)
    numbers = torch.arange(torch.tensor(shape).prod().item(), dtype=torch.float64).view(shape) % 251
    save_file({"x": torch.zeros(3), "y": numbers.to(stored)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    index = [slice(None)] * len(shape)
    if axis is not None:
        index[axis] = slice(start, stop)
    expected = numbers[tuple(index)]
    assert torch.equal(checkpoint.read("y", axis, start, stop).double(), expected)
    wide = torch.full((*expected.shape, 2), -1.0, dtype=wanted)
    for target in (torch.empty(expected.shape, dtype=wanted), wide[..., 0], wide.transpose(0, -1)[0].transpose(-1, 0)):
        if target.shape == expected.shape:
            checkpoint.read_into(target, "y", axis, start, stop)
            assert torch.equal(target.double(), expected)
    assert (wide[..., 1] == -1).all() or wide.shape[0] == 2  # nothing beside the target was written


def test_one_of_a_stack(tmp_path):
    stack = torch.randn(5, 6, 4)
    save_file({"experts": stack}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.shape("experts[3]") == (6, 4) and spans.stacked("experts[3]") == ("experts", 3)
    for number in range(5):
        assert torch.equal(checkpoint.read(f"experts[{number}]"), stack[number])
        assert torch.equal(checkpoint.read(f"experts[{number}]", 1, 1, 3), stack[number, :, 1:3])
        assert torch.equal(checkpoint.read(f"experts[{number}]", 0, 2, 5), stack[number, 2:5])


def test_what_is_read_for_a_slice(tmp_path):
    """Rows are read exactly. Short runs of columns are read together with the bytes between them; long runs are read alone."""
    save_file({"m": torch.zeros(8, 4), "w": torch.zeros(4, 1 << 18)}, tmp_path / "model.safetensors")
    entries = Checkpoint(tmp_path).entries
    rows = spans.spans(entries["m"], "m", 0, 2, 4)
    assert (rows.begin - entries["m"].begin, rows.bytes, rows.bytes_read, rows.runs) == (32, 32, 32, 1)
    columns = spans.spans(entries["m"], "m", 1, 1, 3)
    assert (columns.bytes, columns.bytes_read, columns.runs, columns.stride) == (64, 7 * 16 + 8, 8, 16)
    wide = spans.spans(entries["w"], "w", 1, 0, 1 << 17)
    assert wide.bytes == wide.bytes_read == 4 * (1 << 19)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    save_file({"x": torch.zeros(1000)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    checkpoint.read("x", 0, 0, 1)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(UserError, match=r"model.safetensors was truncated while it was read; copy it from the source"):
        checkpoint.read("x")
