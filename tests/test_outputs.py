"""Two names are exchanged in one step or, where the file system cannot do this, in two steps that the next run can finish."""

import errno
import os
import re
import sys
from pathlib import Path

import pytest

from swift_mega import outputs
from swift_mega.errors import UserError


def folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "file").write_text(text)
    return path


def names(path: Path) -> dict[str, str]:
    return {one.name: (one / "file").read_text() for one in path.iterdir()}


@pytest.mark.parametrize("exchange", [True, False])
def test_an_older_directory_is_replaced(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(outputs, "_exchange", lambda one, other: False)
    target = folder(tmp_path / "out", "older")
    folder(tmp_path / "out.old", "left over")
    outputs.publish(folder(outputs.staging_of(target), "new"), target)
    assert names(tmp_path) == {"out": "new"}


def test_the_exchange_is_one_step(tmp_path):
    """Both names exist all the time; afterwards each has what was under the other."""
    one, other = folder(tmp_path / "a", "1"), folder(tmp_path / "b", "2")
    assert outputs._exchange(one, other)
    assert names(tmp_path) == {"a": "2", "b": "1"}
    with pytest.raises(OSError, match="No such file") as caught:
        outputs._exchange(one, tmp_path / "absent")
    assert caught.value.errno == errno.ENOENT


def test_a_kill_between_two_renames_is_recovered(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "_exchange", lambda one, other: False)
    target = folder(tmp_path / "out", "older")
    staging, renamed = folder(outputs.staging_of(target), "new"), os.rename

    def killed(source: Path, destination: Path) -> None:
        if source == staging:
            raise KeyboardInterrupt
        renamed(source, destination)

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        outputs.publish(staging, target)
    assert not target.exists()
    monkeypatch.setattr(os, "rename", renamed)
    outputs.recover(target)
    assert (target / "file").read_text() == "older"
    outputs.recover(target)  # nothing to do
    assert names(tmp_path) == {"out": "older", "out.writing": "new"}


def test_room_is_counted_before_anything_is_made(tmp_path):
    """Free space is counted at the existing parent folder. The rest of a killed run is removed first."""
    target = tmp_path / "a" / "b" / "out"
    free = outputs.free_bytes(target)
    assert 0 < free <= os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize
    too_much = 1 << 60
    message = rf"cannot write {target}: it takes {too_much:,} bytes, and [\d,]+ are free; free the space or choose another --output"
    with pytest.raises(UserError, match=message):
        outputs.open_staging(target, overwrite=False, needed=too_much)
    assert list(tmp_path.iterdir()) == []
    assert outputs.open_staging(target, overwrite=False, needed=1) == tmp_path / "a" / "b" / "out.writing"
    folder(target, "older")
    (target.parent / "out.writing" / "left").write_text("over")
    with pytest.raises(
        UserError, match=r"are free, where the older one is kept until the new one is complete; free the space"
    ):
        outputs.open_staging(target, overwrite=True, needed=too_much)
    assert names(target.parent) == {"out": "older"}


def test_a_file_system_that_does_not_count():
    assert os.statvfs("/proc").f_blocks == 0 and outputs.free_bytes(Path("/proc/none")) == sys.maxsize


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            errno.ENOSPC,
            r"a/out: No space left on device \([\d,]+ bytes are free\); free the space or choose another --output",
        ),
        (
            errno.EDQUOT,
            r"a/out: Disk quota exceeded \([\d,]+ bytes are free\); free the space or choose another --output",
        ),
        (errno.EFBIG, r"a/out: File too large; free the space or choose another --output"),
        (errno.EROFS, r"a/out: Read-only file system; choose another --output"),
        (errno.EEXIST, r"a/out.writing: File exists; choose another --output"),
    ],
)
def test_what_is_said_of_an_error(tmp_path, code, message):
    """The target is named as the user gave it; a file in its way is named by its own name."""
    staging = tmp_path / "a" / "out.writing"
    said = outputs.cannot_write(staging, OSError(code, os.strerror(code), str(staging)))
    assert re.fullmatch(f"cannot write {tmp_path}/{message}", said), said


class _Killed(BaseException):
    """An exception that a handler of SIGTERM may raise."""


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize(
    "ended_by", [UserError("no"), OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), _Killed()]
)
def test_whatever_ends_the_writing_leaves_the_older_directory_alone(tmp_path, older, ended_by):
    """No staging directory is left either; an OSError becomes the message about the disk."""
    target = folder(tmp_path / "out", "older") if older else tmp_path / "out"
    full = isinstance(ended_by, OSError)
    expected = (
        pytest.raises(UserError, match=r"cannot write .*out: No space left") if full else pytest.raises(type(ended_by))
    )
    with expected, outputs.staged(target, overwrite=True) as staging:
        (staging / "file").write_text("half")
        raise ended_by
    assert names(tmp_path) == ({"out": "older"} if older else {})


def test_what_is_staged_to_its_end_is_published(tmp_path):
    with outputs.staged(tmp_path / "out", overwrite=False) as staging:
        (staging / "file").write_text("new")
        assert names(tmp_path) == {"out.writing": "new"}
    assert names(tmp_path) == {"out": "new"}


def test_a_kill_between_two_renames_is_put_right_at_once(tmp_path, monkeypatch):
    """Where the file system has no exchange, and the writer still has time to clean up."""
    monkeypatch.setattr(outputs, "_exchange", lambda one, other: False)
    target, renamed = folder(tmp_path / "out", "older"), os.rename

    def killed(source: Path, destination: Path) -> None:
        if source == outputs.staging_of(target):
            raise KeyboardInterrupt
        renamed(source, destination)

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt), outputs.staged(target, overwrite=True) as staging:
        (staging / "file").write_text("new")
    assert names(tmp_path) == {"out": "older"}
