"""Output directories that appear complete or not at all, whenever the writer is killed.

Everything is written beside the target, under a name that nothing loads. Then the file system exchanges the two names in one step, and
the older directory is removed under the other name. A kill leaves the old directory or the new one, never neither. The next run removes
what the killed one left.
"""

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swift_mega.errors import UserError

EXCHANGE, RELATIVE_TO_HERE = 2, -100
"""RENAME_EXCHANGE and AT_FDCWD of Linux's renameat2(2)."""
NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
"""Error numbers of a kernel or a file system that cannot exchange names (NFS, some FUSE)."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
WRITING = ".writing"


def staging_of(target: Path) -> Path:
    """The directory in which `target` is written until it is complete."""
    return target.with_name(target.name + WRITING)


@contextmanager
def staged(target: Path, *, overwrite: bool, needed: int = 0) -> Iterator[Path]:
    """`with staged(target, …) as staging:` writes into `staging`, which becomes `target` where the body ends normally.

    If the body ends early for any reason (a UserError, a full disk, Ctrl-C, a signal that raises), `target` stays as it was and no
    staging directory is left. UserError for an OSError, and where `target` may not be written. needed: as for `open_staging`.
    """
    staging = open_staging(target, overwrite=overwrite, needed=needed)
    try:
        yield staging
        publish(staging, target)
    except OSError as error:
        raise UserError(cannot_write(target, error)) from None
    finally:
        recover(target)
        shutil.rmtree(staging, ignore_errors=True)


def open_staging(target: Path, *, overwrite: bool, needed: int = 0) -> Path:
    """The empty directory in which `target` is to be written. UserError where it may not be written, cannot be, or has too little space.

    needed: bytes that will be written, as far as they are known.
    """
    staging = staging_of(target)
    try:
        recover(target)
        check_output(target, overwrite)
        begin_staging(staging, needed)
    except OSError as error:
        raise UserError(cannot_write(target, error)) from None
    return staging


def begin_staging(staging: Path, needed: int = 0) -> None:
    """Makes an empty staging directory, in place of one that a killed save left, which is never complete and never loaded."""
    if staging.is_dir():
        shutil.rmtree(staging)
    check_space(staging, needed)
    staging.mkdir(parents=True)


def check_space(staging: Path, needed: int) -> None:
    """UserError where fewer than `needed` bytes are free. An older output is kept until the new one is complete, so its bytes are not
    free.
    """
    free, target = free_bytes(staging), _target_of(staging)
    if needed > free:
        older = (
            ", where the older one is kept until the new one is complete"
            if target.is_dir() and any(target.iterdir())
            else ""
        )
        raise UserError(
            f"cannot write {target}: it takes {needed:,} bytes, and {free:,} are free{older}; free the space or choose another --output"
        )


def free_bytes(path: Path) -> int:
    """Bytes that can still be written where `path` is, or will be. Where a file system does not count them: sys.maxsize."""
    while not path.exists():
        path = path.parent
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize if found.f_blocks else sys.maxsize


def check_output(target: Path, overwrite: bool) -> None:
    """UserError where the output exists already and may not be replaced."""
    if target.exists() and not target.is_dir():
        raise UserError(f"output {target} is a file and is left as it is; choose another path")
    if target.is_dir() and not overwrite and any(target.iterdir()):
        raise UserError(
            f"output {target} exists already and is left as it is; choose another path, or pass --overwrite true"
        )


def recover(target: Path) -> None:
    """Restores the older directory after a kill between two renames, which are used where the file system has no exchange."""
    old = _old(target)
    if old.is_dir() and not target.exists():
        os.rename(old, target)


def publish(staging: Path, target: Path) -> None:
    """Makes a complete staging directory the target. An older target is removed afterwards."""
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
    """The message to the user for an OSError while `path` was written."""
    if error.errno == errno.EEXIST and error.filename:  # this file is in the way of the staging directory
        path = Path(error.filename)
    else:
        path = _target_of(path)
    counted = f" ({free_bytes(path):,} bytes are free)" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    remedy = "free the space or choose another --output" if error.errno in FULL else "choose another --output"
    return f"cannot write {path}: {error.strerror or error}{counted}; {remedy}"


def _target_of(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(WRITING))


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
    """Syncs the files' bytes before the directory gets its new name. After a power failure, a name must not lead to incomplete files."""
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
