"""Two names are exchanged in one step, or, where the file system cannot, in two that the next run can finish."""

import errno
import os
from pathlib import Path

import pytest

from swift_mega import outputs


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
    """Both names are there all the time; what was under one is under the other."""
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
    outputs.recover(target)  # with nothing to do
    assert names(tmp_path) == {"out": "older", "out.writing": "new"}
