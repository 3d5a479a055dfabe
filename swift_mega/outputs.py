"""Output directories that appear whole or not at all, whenever the writer is killed.

Everything is written beside the target under a name that nobody loads; then the two names are exchanged in one step of the file
system, and what was there before is removed under the other name. A kill leaves the old directory or the new one, never
neither, and the next run removes what the killed one left.
"""

import ctypes
import errno
import os
import shutil
from pathlib import Path

from swift_mega.errors import UserError

EXCHANGE, RELATIVE_TO_HERE = 2, -100
"""RENAME_EXCHANGE and AT_FDCWD of Linux's renameat2(2)."""
NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
"""What a kernel or a file system answers that has no such step (NFS, some FUSE)."""


def staging_of(target: Path) -> Path:
    """Where `target` is written until it is complete."""
    return target.with_name(f"{target.name}.writing")


def begin_staging(staging: Path) -> None:
    """An empty staging directory, in place of one that a killed save left: never complete, never loaded."""
    if staging.is_dir():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)


def check_output(target: Path, overwrite: bool) -> None:
    """UserError where the output is there already and may not be replaced."""
    if target.exists() and not target.is_dir():
        raise UserError(f"output {target} is a file and is left as it is; choose another path")
    if target.is_dir() and not overwrite and any(target.iterdir()):
        raise UserError(
            f"output {target} exists already and is left as it is; choose another path, or pass --overwrite true"
        )


def recover(target: Path) -> None:
    """Puts the older directory back where a kill between two renames (no exchange on that file system) left none."""
    old = _old(target)
    if old.is_dir() and not target.exists():
        os.rename(old, target)


def publish(staging: Path, target: Path) -> None:
    """Makes a complete staging directory the target; an older target is removed afterwards."""
    _reach_disk(staging)
    old = _old(target)
    if old.exists():
        shutil.rmtree(old)
    if not target.exists():
        os.rename(staging, target)
    elif _exchange(staging, target):
        old = staging
    else:
        os.rename(target, old)
        os.rename(staging, target)
    _sync(target.parent)
    if old.exists():
        shutil.rmtree(old)


def cannot_write(path: Path, error: OSError) -> str:
    """What to tell the user of an OSError while `path` was written."""
    return f"cannot write {path}: {error.strerror or error}; free the space or choose another --output"


def _old(target: Path) -> Path:
    return target.with_name(f"{target.name}.old")


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step; False where the kernel or the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(RELATIVE_TO_HERE, os.fsencode(one), RELATIVE_TO_HERE, os.fsencode(other), EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


def _reach_disk(directory: Path) -> None:
    """The files' bytes before the directory's new name: after a power cut a name must not lead to holes."""
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
