"""A directory appears as a whole or not at all, whichever rank fails and whenever: a full disk, a path that is a file, a kill."""

import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from swift_mega.config import schema
from swift_mega.convert.files.hf_files import Checkpoint
from swift_mega.convert.files.hf_write import Writer, plan_files, write_headers
from swift_mega.convert.save import save
from swift_mega.convert.source import Source
from swift_mega.errors import UserError
from swift_mega.models.translate import load_settings
from swift_mega.outputs import begin_staging, check_output, publish, staging_of
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.layout import parse_layout, plan_layout
from swift_mega.train.build import build_part
from tests import tiny


def saved(layout_name: str, source: Path, output: Path, cpu: Any, **given: Any) -> None:
    """One rank: loads `source` and saves it."""
    parallel, world = parse_layout(layout_name)
    groups = parallel_groups.init(plan_layout(parallel, load_settings(source).shape, world, training=False))
    run = schema.Run(parallel=parallel)
    part = build_part(run, cpu, groups, dtype=torch.float32, reads_inputs=False, source=Source(source))
    save(part, groups, output, source=source, **{"dtypes": torch.float32, "max_shard_bytes": 20_000, **given})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embedding and head, on the first and the last stage, are larger than LIMIT."""
    return tiny.make(tmp_path_factory.mktemp("large"), "llama", vocab_size=20_000)


LIMIT = 1_000_000
"""Bytes of one file that a limited rank may write."""


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def small_files(ranks_limited: tuple[int, ...], limit: int, source: Path, output: Path, cpu: Any) -> str:
    """A rank in `ranks_limited` may not write past `limit` bytes of a file, which looks like a full disk. Returns the UserError.

    The limit leaves room for the file of the rendezvous, which grows while groups are made. All four ranks must raise the same error, and
    none may wait: their answers are gathered.
    """
    if dist.get_rank() in ranks_limited:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    said = ""
    try:
        saved("tp2-pp2-sp", source, output, cpu)
    except UserError as error:
        said = str(error)
    heard: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(heard, said)
    assert len(set(heard)) == 1, heard
    return said


@pytest.mark.parametrize("limited", [(0,), (2,), (0, 1, 2, 3)], ids=["first", "other stage", "all"])
def test_a_full_disk_is_one_message_on_every_rank(ranks, cpu, large, tmp_path, limited):
    """Whichever rank cannot write: all ranks stop with its reason, and no incomplete directory and no staging directory stays."""
    said = ranks(4, small_files, limited, LIMIT, large, tmp_path / "out", cpu, timeout=60)
    assert said.startswith(f"cannot write {tmp_path / 'out'}: File too large; free the space or choose another")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_older_directory_as_it_was(ranks, cpu, large, tmp_path):
    shutil.copytree(large, tmp_path / "out")
    before = contents(tmp_path / "out")

    def body() -> str:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
        try:
            saved("tp2", large, tmp_path / "out", cpu, overwrite=True)
        except UserError as error:
            return str(error)
        return ""

    assert "File too large" in ranks(2, body, timeout=60)
    assert contents(tmp_path / "out") == before and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_of_the_last_files_is_heard_by_all(ranks, cpu, source, tmp_path):
    """Rank 0 copies config and tokenizer when the other ranks are done. They must not wait in a barrier for ever."""
    broken = tmp_path / "hf"
    shutil.copytree(source, broken)

    def body() -> str:
        parallel, world = parse_layout("tp2")
        groups = parallel_groups.init(plan_layout(parallel, load_settings(broken).shape, world))
        run = schema.Run(parallel=parallel)
        part = build_part(run, cpu, groups, dtype=torch.float32, reads_inputs=False, source=Source(broken))
        dist.barrier()
        if dist.get_rank() == 0:
            os.symlink(broken / "gone", broken / "aaa")
            (broken / "config.json").unlink()
        dist.barrier()
        try:
            save(part, groups, tmp_path / "out", source=broken, dtypes=torch.float32, max_shard_bytes=1 << 30)
        except UserError as error:
            return str(error)
        return ""

    said = ranks(2, body, timeout=60)
    assert said.startswith(f"{broken / 'aaa'} is a link to {broken / 'gone'}, which does not exist; copy")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_file_where_the_directory_should_be(ranks, cpu, source, tmp_path):
    (tmp_path / "file").write_text("mine")
    for output, message in (
        (tmp_path / "file", "output .*file is a file and is left as it is; choose another path"),
        (tmp_path / "file" / "out", "cannot write .*file/out: Not a directory; choose another --output"),
    ):
        with pytest.raises(UserError, match=message):
            ranks(2, lambda output=output: saved("tp2", source, output, cpu, overwrite=True), timeout=60)
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_what_is_there_is_left_or_replaced(ranks, cpu, source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(
        UserError, match="out exists already and is left as it is; choose another path, or pass --overwrite"
    ):
        ranks(2, saved, "tp2", source, out, cpu)
    assert contents(out) == {"notes.txt": b"mine"} and len(list(tmp_path.iterdir())) == 1
    ranks(1, lambda: saved("single", source, out, cpu, overwrite=True, max_shard_bytes=1 << 30))
    assert sorted(contents(out)) == sorted([*contents(source), "report.json"]) and len(list(tmp_path.iterdir())) == 1


def test_an_empty_directory_is_no_obstacle(ranks, cpu, source, tmp_path):
    (tmp_path / "out").mkdir()
    ranks(1, saved, "single", source, tmp_path / "out", cpu)
    assert Checkpoint(tmp_path / "out").entries.keys() == Checkpoint(source).entries.keys()


def test_what_a_killed_save_left_is_replaced(ranks, cpu, source, tmp_path):
    """Files in a staging directory of another run must not get into the new output. A staging *file* is an error."""
    staging = tmp_path / "out.writing"
    staging.mkdir()
    (staging / "model-00099-of-00099.safetensors").write_bytes(b"left over")
    (tmp_path / "out.old").mkdir()
    (tmp_path / "out.old" / "model.safetensors").write_bytes(b"older")
    ranks(1, lambda: saved("single", source, tmp_path / "out", cpu, overwrite=True))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "model-00099-of-00099.safetensors").exists()
    staging.write_text("mine")
    with pytest.raises(UserError, match=r"cannot write .*out.writing: File exists"):
        ranks(1, lambda: saved("single", source, tmp_path / "out", cpu, overwrite=True))
    assert staging.read_text() == "mine" and Checkpoint(tmp_path / "out").entries


def test_a_trailing_slash_is_the_same_directory(ranks, cpu, source, tmp_path):
    ranks(1, saved, "single", source, f"{tmp_path}/out/", cpu)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_tensor_whose_dtype_nobody_knows(ranks, cpu, source, tmp_path):
    with pytest.raises(
        UserError, match=r"no dtype is known for lm_head.weight, model.embed_tokens.weight, .* more, which the source"
    ):
        ranks(
            2,
            lambda: saved("tp2", source, tmp_path / "out", cpu, dtypes={"model.norm.weight": torch.float32}),
            timeout=60,
        )
    assert list(tmp_path.iterdir()) == []


def test_check_output_and_publish(tmp_path):
    """Replacing is two renames. The older directory stays complete under either name until the new one is there."""
    target, staging = tmp_path / "out", tmp_path / "out.writing"
    check_output(target, False)
    staging.mkdir()
    (staging / "new").write_text("1")
    target.mkdir()
    (target / "older").write_text("0")
    publish(staging, target)
    assert contents(tmp_path) == {"out/new": b"1"}


def save_once(target: Path) -> None:
    staging = staging_of(target)
    planned = plan_files({f"t{n}": (torch.float32, (1000,)) for n in range(1000)}, 400_000)
    begin_staging(staging)
    write_headers(staging, planned)
    with Writer(staging, planned) as writer:
        for name in planned:
            writer.write(name, torch.full((1000,), float(name[1:])))
    publish(staging, target)


def save_for_ever(target: Path) -> None:
    while True:
        save_once(target)


def test_a_kill_leaves_a_whole_directory(tmp_path):
    """kill -9 at 30 random moments of repeated saves: the target directory is complete, and another save finishes."""
    target, draw = tmp_path / "out", random.Random(7)
    for _ in range(30):
        child = os.fork()
        if child == 0:
            try:
                save_for_ever(target)
            finally:
                os._exit(1)
        while not target.exists():
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.25))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL, "the writer failed by itself"
        found = Checkpoint(target)
        assert len(found.entries) == 1000
        assert all((found.read(f"t{n}") == n).all() for n in range(0, 1000, 37))
    save_once(target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and len(Checkpoint(target).entries) == 1000


def test_a_killed_rank_ends_the_save_and_leaves_the_older_directory(ranks, cpu, source, tmp_path):
    """One rank dies during the exchange of tensors. The launcher ends the others, and the target is the older directory, byte for byte."""
    shutil.copytree(source, tmp_path / "out")
    before = contents(tmp_path / "out")

    def body() -> None:
        import swift_mega.convert.save as module

        writes = []

        def counted(*given: Any) -> None:
            writes.append(given)
            if len(writes) == 5 and dist.get_rank() == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            original(*given)

        original, module.Writer.write = module.Writer.write, counted
        saved("tp2-pp2-sp", source, tmp_path / "out", cpu, overwrite=True)

    with pytest.raises(Exception, match="rank 2 of 4 was killed by signal 9"):
        ranks(4, body, timeout=60)
    assert contents(tmp_path / "out") == before
    ranks(1, lambda: saved("single", source, tmp_path / "out", cpu, overwrite=True))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
