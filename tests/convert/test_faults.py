"""Disks that are full or read-only, folders without permission, and damaged sources, from the command line: one line, status 2, no file
left.

A small tmpfs takes the place of the disk. Mounting one needs root, or a user namespace; without either the tests say so.
"""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from swift_mega import outputs
from swift_mega.cli import main
from swift_mega.config import schema
from swift_mega.convert.files import to_fp8
from swift_mega.convert.files.hf_files import Checkpoint
from swift_mega.convert.megatron.mcore import save_mcore
from swift_mega.convert.source import Source
from swift_mega.errors import UserError
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.layout import Layout
from swift_mega.train.build import build_part
from tests import tiny

MEGABYTE = 1 << 20
HERE = "SWIFT_MEGA_TEST_NAMESPACE"


def mount(path: Path, megabytes: int) -> None:
    path.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)], check=True, capture_output=True
    )


def works(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB of its own."""
    path = tmp_path / "disk"
    try:
        mount(path, 4)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no tmpfs can be mounted here ({error}); test_in_a_namespace runs this one where it can")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_in_a_namespace():
    """Runs the tests that need a disk again, as root of a user namespace, where this user may not mount."""
    if os.environ.get(HERE) or works("unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"):
        # The tests below have run directly.
        return
    if not works("unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"):
        pytest.skip("neither root nor unshare -rm may mount a tmpfs here")
    command = [
        "unshare",
        "-rm",
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "disk or room",
        __file__,
    ]
    done = subprocess.run(command, env=os.environ | {HERE: "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --- every writer


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf: 3.1 MB, most of it embedding and head. mcore: made from it for two tensor ranks. adapter: on one linear."""
    folder = tmp_path_factory.mktemp("sources")
    source = tiny.make(folder / "hf", "llama", vocab_size=12_000)
    made = ["convert", "--model", str(source), "--to", "mcore", "--output", str(folder / "mcore")]
    assert main([*made, "--tensor_model_parallel_size", "2"]) == 0
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    (folder / "adapter").mkdir()
    save_file(
        {f"{module}.lora_A.weight": torch.ones(2, 32), f"{module}.lora_B.weight": torch.ones(64, 2)},
        folder / "adapter" / "adapter_model.safetensors",
    )
    (folder / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    for path in folder.rglob("*"):
        path.chmod(path.stat().st_mode | 0o055)  # readable by user nobody too
    return folder


WRITERS: dict[str, list[str]] = {
    "hf to mcore": ["convert", "--model", "hf", "--to", "mcore"],
    "hf to mcore, 2 ranks": ["convert", "--model", "hf", "--to", "mcore", "--tensor_model_parallel_size", "2"],
    "hf to hf": ["convert", "--model", "hf", "--to", "hf"],
    "mcore to hf": ["convert", "--mcore", "mcore", "--to", "hf"],
    "mcore to hf, 2 ranks": ["convert", "--mcore", "mcore", "--to", "hf", "--tensor_model_parallel_size", "2"],
    "merge": ["export", "--model", "hf", "--adapters", "adapter", "--merge_lora", "true"],
    "quantize": ["export", "--model", "hf", "--quant_method", "fp8"],
}
every_writer = pytest.mark.parametrize("writer", WRITERS)
Run = Callable[..., str]


@pytest.fixture
def run(sources: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """run(writer, output, ...): the single line on stderr of the command; "" where it succeeds."""

    def go(writer: str, output: Path, *more: str) -> str:
        monkeypatch.chdir(sources)
        capfd.readouterr()
        status = main([*WRITERS[writer], "--output", str(output), *more])
        said = capfd.readouterr()
        everything = said.out + said.err
        assert "Traceback" not in everything, everything
        lines = [line for line in said.err.splitlines() if line.startswith("swift-mega: ")]
        assert status == (2 if lines else 0), everything
        assert len(lines) <= 1, everything
        return lines[0] if lines else ""

    return go


def check_no_room(said: str, output: Path, *, older: bool = False) -> int:
    """Checks that the message has the path, the bytes needed, the bytes free and a remedy. Returns the bytes needed."""
    found = re.search(r"cannot write (\S+): it takes ([\d,]+) bytes, and ([\d,]+) are free", said)
    assert found is not None, said
    needed, free = (int(number.replace(",", "")) for number in found.groups()[1:])
    assert Path(found[1]) == output and 700_000 < needed < 4 * MEGABYTE and free < needed, said
    assert "; free the space or choose another --output" in said
    assert ("the older one is kept until the new one is complete" in said) == older
    return needed


@every_writer
def test_too_small_a_disk_is_found_before_a_byte_is_written(run, disk, writer):
    (disk / "other").write_bytes(bytes(4 * MEGABYTE - 600_000))
    check_no_room(run(writer, disk / "out"), disk / "out")
    assert names(disk) == ["other"]


@every_writer
def test_both_outputs_need_room(run, sources, disk, writer):
    """An older output stays until the new one is complete, and it is unchanged where there is no room for the new one."""
    assert run(writer, disk / "out") == ""
    before = contents(disk)
    needed = check_no_room(run(writer, disk / "out", "--overwrite", "true"), disk / "out", older=True)
    # Never more than it takes: that would refuse an output that fits.
    assert 0.95 < needed / sum(map(len, before.values())) <= 1
    assert contents(disk) == before and names(disk) == ["out"]


@every_writer
def test_a_disk_that_fills_up_meanwhile(run, disk, monkeypatch, writer):
    """Another process fills the disk after the space was counted: one line with the free bytes, the older output is complete, and no
    staging directory is left."""
    (disk / "out").mkdir()
    (disk / "out" / "config.json").write_text("old")
    (disk / "other").write_bytes(bytes(4 * MEGABYTE - 600_000))
    monkeypatch.setattr(outputs, "check_space", lambda staging, needed: None)
    monkeypatch.setattr(to_fp8, "check_space", lambda staging, needed: None)
    said = run(writer, disk / "out", "--overwrite", "true")
    assert re.search(
        r"error: cannot write \S+/disk/out: .+ \([\d,]+ bytes are free\); free the space or choose another --output",
        said,
    ), said
    assert "No space left on device" in said or "mcore" in writer
    assert contents(disk / "out") == {"config.json": b"old"} and names(disk) == ["other", "out"]


def to_mcore(source: Path, output: Path, cpu: Any) -> str:
    """One of two ranks; the second may not write a file as long as its own. Returns the message that both ranks must have."""
    groups = parallel_groups.init(Layout(world=2, layers=(4,), tensor=2))
    run, checkpoint = schema.Run(parallel=schema.Parallel(tensor=2)), Checkpoint(source)
    part = build_part(run, cpu, groups, dtype=torch.float32, reads_inputs=False, source=Source(source))
    if dist.get_rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (MEGABYTE, MEGABYTE))
    said = ""
    try:
        save_mcore(part, groups, output, checkpoint, overwrite=True)
    except UserError as error:
        said = str(error)
    heard = ["", ""]
    dist.all_gather_object(heard, said)
    assert heard[0] == heard[1], heard
    return said


def test_one_rank_that_cannot_write_stops_both(ranks, cpu, tmp_path_factory, tmp_path):
    """With Megatron's writer; test_save.py has the same with ours."""
    large = tiny.make(tmp_path_factory.mktemp("large"), "llama", vocab_size=40_000)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")
    said = ranks(2, to_mcore, large, tmp_path / "out", cpu, timeout=60)
    assert re.fullmatch(rf"cannot write {tmp_path}/out: .+ \([\d,]+ bytes are free\); free the space or .+", said), said
    assert contents(tmp_path) == {"out/config.json": b"old"} and names(tmp_path) == ["out"]


@every_writer
def test_a_read_only_disk(run, disk, writer):
    (disk / "out").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for output in (disk / "out", disk / "new", disk / "a" / "b"):
        said = run(writer, output)
        assert f"error: cannot write {output}: Read-only file system; choose another --output" in said, said
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert contents(disk) == {}


@every_writer
def test_a_parent_that_is_a_file(run, tmp_path, writer):
    (tmp_path / "file").write_text("mine")
    said = run(writer, tmp_path / "file" / "out")
    assert f"error: cannot write {tmp_path}/file/out: Not a directory; choose another --output" in said, said
    assert contents(tmp_path) == {"file": b"mine"}


@every_writer
def test_a_folder_that_others_own(run, sources, tmp_path, writer):
    """As a user who may not write there. Root may write anywhere, so the test becomes user nobody."""
    (tmp_path / "theirs").mkdir(mode=0o555)
    root = os.geteuid() == 0
    closed = [
        path for start in (tmp_path, sources) for path in (start, *start.parents) if not path.stat().st_mode & 0o005
    ]
    parents = [(path, path.stat().st_mode) for path in closed] if root else []
    for path, mode in parents:
        path.chmod(mode | 0o055)
    if root:
        os.seteuid(65534)
    try:
        said = run(writer, tmp_path / "theirs" / "out")
    finally:
        if root:
            os.seteuid(0)
        for path, mode in parents:
            path.chmod(mode)
    assert f"error: cannot write {tmp_path}/theirs/out: Permission denied; choose another --output" in said, said
    assert names(tmp_path / "theirs") == []


# --- damaged sources


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def spoil(directory: Path, what: str, trap: Path) -> None:
    """directory: hf in two files with an index."""
    first, second = sorted(directory.glob("*.safetensors"))
    index = directory / "model.safetensors.index.json"

    def pickled(file: Path) -> None:
        torch.save({"model.norm.weight": torch.ones(32), "trap": Trap(trap)}, file)

    def only_pickle() -> None:
        for file in (first, second, index):
            file.unlink()
        pickled(directory / "pytorch_model.bin")

    def moved(name: str, file: Path) -> None:
        index.write_text(re.sub(rf'("{name}": )"[^"]*"', rf'\1"{file.name}"', index.read_text()))

    def again() -> None:
        first.write_bytes(second.read_bytes())

    def twice() -> None:
        line = next(one for one in index.read_text().splitlines() if second.name in one)
        index.write_text(
            index.read_text().replace(line, line.rstrip(",") + ",\n" + line.replace(second.name, first.name))
        )

    actions: dict[str, Callable[[], object]] = {
        "pickle only": only_pickle,
        "pickle under the name": lambda: pickled(first),
        "tensor in two shards": again,
        "tensor listed twice": twice,
        "index names the other shard": lambda: moved("model.norm.weight", first),
        "index names an absent shard": lambda: moved(
            "model.norm.weight", directory / "model-00003-of-00003.safetensors"
        ),
        "header longer than the file": lambda: first.write_bytes(
            (1 << 40).to_bytes(8, "little") + first.read_bytes()[8:]
        ),
        "truncated": lambda: first.write_bytes(first.read_bytes()[:-1]),
        "header only": lambda: first.write_bytes(first.read_bytes()[:100]),
        "empty": lambda: first.write_bytes(b""),
    }
    actions[what]()


SPOILED = {
    "pickle only": r"holds pickle files only \(pytorch_model.bin\), which can run code when read and are refused; convert",
    "pickle under the name": r"model-00001-of-00002.safetensors is a pickle .*, which can run code when read and is refused; ",
    "tensor in two shards": r"tensor \S+ is in model-00001-of-00002.safetensors and again in model-00002",
    "tensor listed twice": r"index.json: lists \S+ twice; copy it from the source again",
    "index names the other shard": r"says tensor model.norm.weight is in model-00001-of-00002\S+, but it is in model-00002",
    "index names an absent shard": r"lacks model-00003-of-00003.safetensors, which model.safetensors.index.json lists; copy",
    "header longer than the file": r"is not a complete safetensors file: \d+ bytes, header of 1099511627776; copy it",
    "truncated": r"model-00001-of-00002.safetensors is truncated: \d+ bytes, .*; copy it from the source again",
    "header only": r"model-00001-of-00002.safetensors is not a complete safetensors file: 100 bytes, header of \d+; copy",
    "empty": r"model-00001-of-00002.safetensors is not a complete safetensors file: 0 bytes, header of 0; copy",
}


@pytest.fixture(scope="module")
def two_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    source = tiny.make(folder / "one", "llama")
    size = (source / "model.safetensors").stat().st_size
    made = [
        "convert",
        "--model",
        str(source),
        "--to",
        "hf",
        "--output",
        str(folder / "hf"),
        "--max_shard_size",
        str(size * 2 // 3),
    ]
    assert main(made) == 0
    return folder / "hf"


@pytest.mark.parametrize("what", SPOILED)
@pytest.mark.parametrize("writer", ["hf to mcore", "hf to hf", "merge", "quantize"])
def test_a_damaged_source(two_files, sources, tmp_path, monkeypatch, capfd, writer, what):
    shutil.copytree(two_files, tmp_path / "hf")
    shutil.copytree(sources / "adapter", tmp_path / "adapter")
    spoil(tmp_path / "hf", what, tmp_path / "trap")
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    assert main([*WRITERS[writer], "--output", "out"]) == 2
    said = capfd.readouterr()
    assert said.err.startswith("swift-mega: error: ") and said.err.count("\n") == 1 and "Traceback" not in said.out
    assert re.search(SPOILED[what], said.err), said.err
    assert names(tmp_path) == ["adapter", "hf"]
