"""Safetensors directories: reads what safetensors wrote, writes what safetensors reads, and refuses every damaged file with one message.

Damaged files are built byte by byte here, so that our writer does not test our reader.
"""

import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from swift_mega.config import parse
from swift_mega.convert.files import hf_files
from swift_mega.convert.files.hf_files import Checkpoint
from swift_mega.convert.files.hf_write import Writer, plan_files, write_headers
from swift_mega.errors import UserError

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """A file with a header (an object, or raw bytes) and data. `length`: a wrong header length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def at(begin: int, end: int, **changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end], **changes}


# --- reading what safetensors wrote

KINDS = [kind for kind in hf_files.DTYPES.values() if kind not in (torch.float8_e4m3fn, torch.float8_e5m2)]


@pytest.mark.parametrize("dtype", hf_files.DTYPES.values(), ids=str)
def test_reads_what_safetensors_wrote(tmp_path, dtype):
    tensors = {
        "a": torch.arange(24).reshape(4, 6).to(dtype),
        "b": torch.tensor([1, 0, 1]).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = Checkpoint(tmp_path)
    assert found.entries.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found.entries[name].dtype == dtype and found.entries[name].shape == tuple(value.shape)
        assert torch.equal(found.read(name).reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))
    assert torch.equal(found.read("a", 0, 1, 3).float(), tensors["a"][1:3].float())
    assert torch.equal(found.read("a", 1, 2, 5).float(), tensors["a"][:, 2:5].float())
    assert torch.equal(found.read("a", 1, 4).float(), tensors["a"][:, 4:].float())


def test_reads_tensors_that_are_not_aligned(tmp_path):
    """The format does not require alignment: a byte tensor before a float tensor moves the float tensor to an odd address."""
    header = {"odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}, "a": at(3, 11)}
    raw(tmp_path / "model.safetensors", header, b"\x01\x02\x03" + struct.pack("<2f", 1.5, -2.5))
    found = Checkpoint(tmp_path)
    assert found.read("a").tolist() == [1.5, -2.5] and found.read("odd").tolist() == [1, 2, 3]


def test_reads_a_tensor_without_elements(tmp_path):
    raw(tmp_path / "model.safetensors", {"none": at(0, 0), "a": F32}, struct.pack("<2f", 1, 2))
    found = Checkpoint(tmp_path)
    assert found.read("none").shape == (0,) and found.read("a").tolist() == [1, 2]


def test_reading_never_writes_to_the_file(tmp_path):
    save_file({"a": torch.ones(4)}, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    Checkpoint(tmp_path).read("a").zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


# --- one damaged file

WHOLE = struct.pack("<2f", 1, 2)
DAMAGED = {
    "empty": (b"", "is not a complete safetensors file: 0 bytes"),
    "seven bytes": (b"1234567", "is not a complete safetensors file: 7 bytes"),
    "header longer than the file": (struct.pack("<Q", 1 << 40) + b"{}", "header of 1099511627776"),
    "header length past 2^63": (struct.pack("<Q", (1 << 64) - 1) + b"{}", "header of 18446744073709551615"),
}
HEADERS = {
    "not JSON": (b"garbage!", b"", "has a damaged safetensors header"),
    "not UTF-8": (b'{"\xff": 1}', b"", "has a damaged safetensors header"),
    "a list": ([1, 2], b"", "has a damaged safetensors header"),
    "null": (None, b"", "has a damaged safetensors header"),
    "deep": (b'{"a":' * 100_000, b"", "has a damaged safetensors header"),
    "entry is text": ({"a": "x"}, b"", "has a damaged safetensors header"),
    "entry lacks offsets": (
        {"a": {"dtype": "F32", "shape": [2]}},
        WHOLE,
        "has a damaged safetensors header .'data_offsets'",
    ),
    "three offsets": ({"a": {**F32, "data_offsets": [0, 4, 8]}}, WHOLE, "has a damaged safetensors header"),
    "truncated": ({"a": F32}, WHOLE[:-1], "is truncated: .* but a ends at"),
    "no data": ({"a": F32}, b"", "is truncated"),
    "rest": ({"a": F32}, WHOLE + b"\0", "has 1 bytes after a, which belong to no tensor"),
    "rest without tensors": ({}, WHOLE, "has 8 bytes after the header, which belong to no tensor"),
    "gap": ({"a": at(0, 4), "b": at(8, 12)}, WHOLE + b"\0\0\0\0", "tensor b begins at byte .* leaves a gap after a"),
    "gap at the start": ({"a": at(4, 8)}, WHOLE, "tensor a begins at byte .* leaves a gap after the header"),
    "overlap": ({"a": at(0, 8), "b": at(4, 8)}, WHOLE, "tensor b begins at byte .* overlaps a"),
    "same bytes": ({"a": F32, "b": F32}, WHOLE, "tensor b begins at byte .* overlaps a"),
    "doubled name": (b'{"a":%b,"a":%b}' % ((json.dumps(F32).encode(),) * 2), WHOLE, "model.safetensors: lists a twice"),
    "doubled key": (
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        WHOLE,
        "model.safetensors: lists dtype twice",
    ),
    "unknown dtype": ({"a": {**F32, "dtype": "F31"}}, WHOLE, "tensor a has dtype F31, supported: F64, F32"),
    "sub-byte dtype": ({"a": {**F32, "dtype": "F4", "shape": [16]}}, WHOLE, "tensor a has dtype F4, supported"),
    "dtype is a list": ({"a": {**F32, "dtype": ["F32"]}}, WHOLE, "has a damaged safetensors header"),
    "shape too large": (
        {"a": {**F32, "shape": [3]}},
        WHOLE,
        r"tensor a of shape \[3\] and dtype F32 does not fit bytes 0 to 8",
    ),
    "shape too small": ({"a": {**F32, "shape": [1]}}, WHOLE, "does not fit bytes 0 to 8"),
    "negative sizes": (
        {"a": {**F32, "shape": [-1, -2]}},
        WHOLE,
        r"shape \[-1, -2\] and bytes 0 to 8, which are not whole numbers",
    ),
    "fractional size": ({"a": {**F32, "shape": [2.0]}}, WHOLE, "which are not whole numbers"),
    "size is text": ({"a": {**F32, "shape": ["2"]}}, WHOLE, "which are not whole numbers"),
    "shape is null": ({"a": {**F32, "shape": None}}, WHOLE, "has a damaged safetensors header"),
    "negative offset": ({"a": at(-8, 0, shape=[2])}, WHOLE, "which are not whole numbers"),
    "offsets in reverse": ({"a": {**F32, "data_offsets": [8, 0]}}, WHOLE, "does not fit bytes 8 to 0"),
    "sizes that overflow": ({"a": {**F32, "shape": [1 << 62, 8]}}, WHOLE, "does not fit bytes 0 to 8"),
}


def refused(directory: Path, message: str) -> str:
    """The UserError of reading `directory`. It names the file or the directory and a remedy, and no file is changed."""
    before = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    with pytest.raises(UserError, match=message) as caught:
        Checkpoint(directory)
    assert before == {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    said = str(caught.value)
    assert str(directory) in said and "; " in said and len(said.splitlines()) == 1
    return said


@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_that_is_not_whole(tmp_path, name):
    content, message = DAMAGED[name]
    (tmp_path / "model.safetensors").write_bytes(content)
    refused(tmp_path, message)


@pytest.mark.parametrize("name", HEADERS)
def test_a_damaged_header(tmp_path, name):
    header, data, message = HEADERS[name]
    refused(raw(tmp_path / "model.safetensors", header, data).parent, message)


def test_a_header_length_that_ends_inside_the_header(tmp_path):
    refused(
        raw(tmp_path / "model.safetensors", {"a": F32}, WHOLE, length=10).parent, "has a damaged safetensors header"
    )


@settings(max_examples=120, deadline=None)
@given(position=st.integers(0, 10_000), bit=st.integers(0, 7), keep=st.integers(0, 10_000), cut=st.booleans())
def test_no_flipped_bit_or_cut_escapes_as_another_error(tmp_path_factory, position, bit, keep, cut):
    """After a flipped bit, the reader refuses the file or returns other values, names or dtypes: it raises nothing but UserError. A
    truncated file is always refused."""
    folder = tmp_path_factory.mktemp("flip")
    save_file(
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, folder / "model.safetensors"
    )
    content = bytearray((folder / "model.safetensors").read_bytes())
    if cut:
        content = content[: keep % len(content)]
    else:
        content[position % len(content)] ^= 1 << bit
    (folder / "model.safetensors").write_bytes(content)
    try:
        found = Checkpoint(folder)
    except UserError:
        return
    assert not cut
    for name in found.entries:
        found.read(name)


# --- a set of files


def two_files(directory: Path) -> Path:
    save_file({"a": torch.ones(2)}, directory / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(2)}, directory / "model-00002-of-00002.safetensors")
    index(directory, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    return directory


def index(directory: Path, weight_map: Any) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_two_files_with_and_without_an_index(tmp_path):
    assert Checkpoint(two_files(tmp_path)).entries.keys() == {"a", "b"}
    (tmp_path / "model.safetensors.index.json").unlink()
    assert Checkpoint(tmp_path).entries.keys() == {"a", "b"}


def test_the_index_decides_which_files_are_read(tmp_path):
    """A second set of weights in the directory (consolidated.safetensors, as Mistral publishes it) is not read."""
    save_file({"other": torch.ones(1)}, two_files(tmp_path) / "consolidated.safetensors")
    assert Checkpoint(tmp_path).entries.keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": FIRST, "b": FIRST}, f"lists tensor b in {FIRST}, which does not hold it"),
        ({"a": FIRST, "b": SECOND, "c": SECOND}, f"lists tensor c in {SECOND}, which does not hold it"),
        ({"a": SECOND, "b": FIRST}, f"says tensor a is in {SECOND}, but it is in {FIRST}"),
        ({"b": SECOND, "a": "model-00003-of-00003.safetensors"}, "lacks model-00003-of-00003.safetensors, which"),
        ({"a": FIRST, "b": "../elsewhere.safetensors"}, "names '../elsewhere.safetensors', which is not a file of"),
        ({"a": FIRST, "b": 7}, "names 7, which is not a file of"),
        ({"a": FIRST, "b": None}, "names None, which is not a file of"),
        ({"a": FIRST, "b": ""}, "names '', which is not a file of"),
        ({}, "has no weight_map"),
        ([FIRST], "has no weight_map"),
        (None, "has no weight_map"),
    ],
)
def test_an_index_that_does_not_fit(tmp_path, weight_map, message):
    index(two_files(tmp_path), weight_map)
    refused(tmp_path, message)


def test_an_index_that_leaves_out_a_tensor(tmp_path):
    save_file({"b": torch.zeros(2), "hidden": torch.zeros(1)}, two_files(tmp_path) / SECOND)
    refused(tmp_path, "does not list hidden, which the files hold; copy index and files again")


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "[" * 100_000], ids=["empty", "cut", "list", "text", "deep"])
def test_an_index_that_is_not_json(tmp_path, text):
    (two_files(tmp_path) / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, "is not valid JSON|not an object")


@pytest.mark.parametrize("indexed", [True, False])
def test_a_missing_shard(tmp_path, indexed):
    (two_files(tmp_path) / FIRST).unlink()
    if not indexed:
        (tmp_path / "model.safetensors.index.json").unlink()
    refused(
        tmp_path, f"lacks {FIRST}, which model.safetensors.index.json" if indexed else "has 1 of 2 numbered safetensors"
    )


def test_a_tensor_in_two_files(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, two_files(tmp_path) / SECOND)
    refused(tmp_path, f"tensor a is in {FIRST} and again in {SECOND} of .*; delete the file that does not belong")


def test_a_pickled_checkpoint_opens_the_files_itself(tmp_path):
    """A pickled checkpoint opens its files in the other process, which has other files under the same descriptors. It refuses a file that
    was replaced meanwhile."""
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.tensor([1.0, 2.0])}, file)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.read("a")  # so that there is a descriptor
    written = pickle.dumps(checkpoint)
    program = (
        "import os, pickle, sys; junk = [os.open(os.devnull, os.O_RDONLY) for _ in range(64)];"
        "print(pickle.loads(sys.stdin.buffer.read()).read('a').tolist())"
    )
    said = subprocess.run([sys.executable, "-c", program], input=written, capture_output=True, check=True)
    assert said.stdout.decode().strip() == "[1.0, 2.0]"
    save_file({"a": torch.tensor([3.0, 4.0])}, file)
    with pytest.raises(UserError, match=r"model.safetensors has changed since its header was read; start again when"):
        pickle.loads(written).read("a")
    assert checkpoint.read("a").tolist() == [1.0, 2.0]  # reads the file that is already open


def test_a_broken_link_and_a_folder_in_place_of_a_file(tmp_path):
    os.symlink(tmp_path / "gone", tmp_path / "model.safetensors")
    refused(tmp_path, r"model.safetensors is a link to .*gone, which does not exist; copy the file that it pointed to")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    refused(tmp_path, "model.safetensors cannot be read: Is a directory; copy it")


def test_pickle_files_are_not_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    refused(
        tmp_path,
        r"holds pickle files only \(pytorch_model.bin\), which can run code when read and are refused; convert",
    )


def test_no_weights_at_all(tmp_path):
    refused(tmp_path, r"holds no \*.safetensors file; give the directory of a complete Hugging Face checkpoint")
    raw(tmp_path / "model.safetensors", {"__metadata__": {"format": "pt"}})
    refused(tmp_path, "have no tensor; copy them from the source again")
    with pytest.raises(UserError, match="absent does not exist; give the path"):
        Checkpoint(tmp_path / "absent")


# --- writing


def written(directory: Path, tensors: dict[str, torch.Tensor], max_bytes: int) -> None:
    planned = plan_files({name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}, max_bytes)
    write_headers(directory, planned)
    with Writer(directory, planned) as writer:
        for name in reversed(tensors):  # in any order, from any process
            writer.write(name, tensors[name])


def samples() -> dict[str, torch.Tensor]:
    values = {f"t{n}": (torch.arange(2 * n + 1) % 2).to(kind) for n, kind in enumerate(KINDS)}
    return {
        **values,
        "matrix": torch.randn(3, 5),
        "column": torch.randn(4, 6).t(),
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 4),
    }


@pytest.mark.parametrize("max_bytes", [1, 60, 200, 1 << 30])
def test_safetensors_reads_what_is_written(tmp_path, max_bytes):
    tensors = samples()
    written(tmp_path, tensors, max_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    found = {name: value for file in files for name, value in load_file(file).items()}
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    assert Checkpoint(tmp_path).entries.keys() == tensors.keys()
    for file in files:
        sizes = [value.numel() * value.element_size() for value in load_file(file).values()]
        assert sum(sizes) <= max_bytes or len([size for size in sizes if size]) == 1
    if len(files) == 1:
        assert files[0].name == "model.safetensors" and not (tmp_path / "model.safetensors.index.json").exists()
        return
    listing = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert listing["metadata"]["total_size"] == sum(value.numel() * value.element_size() for value in tensors.values())
    assert [file.name for file in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]


def test_tensors_start_at_aligned_bytes(tmp_path):
    """The header is padded to 8 bytes, so tensors of one dtype are aligned views of the mapped file."""
    for count in range(1, 6):
        folder = tmp_path / str(count)
        folder.mkdir()
        written(folder, {"x" * n: torch.ones(4) for n in range(1, count + 1)}, 1 << 20)
        assert all(entry.begin % 4 == 0 for entry in Checkpoint(folder).entries.values())


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("500MB", 500_000_000),
        ("5GB", 5_000_000_000),
        ("1GiB", 1 << 30),
        ("1.5kb", 1500),
        ("7", 7),
        (" 2 KiB ", 2048),
        ("3T", 3 * 10**12),
    ],
)
def test_sizes(text, size):
    assert parse.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5XB", "5 G B", "1e9", "0.5", "nan"])
def test_sizes_that_are_none(text):
    with pytest.raises(UserError, match=f"size '{text}' is not valid; write it like 500MB"):
        parse.parse_size(text)
