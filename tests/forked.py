"""Runs a script as `python script words` would, in a fork of this process, where Megatron is imported already (an import takes seconds)."""

import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from swift_mega.launch import rank


def run_script(script: Path, *words: object) -> "subprocess.CompletedProcess[str]":
    """Status and both streams. A traceback is status 1, as in the interpreter."""
    with tempfile.TemporaryDirectory() as scratch:
        out, err = Path(scratch, "out"), Path(scratch, "err")
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        pid = os.fork()
        if not pid:
            _be(script, [str(word) for word in words], out, err, parent)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return subprocess.CompletedProcess([script, *words], status, out.read_text(), err.read_text())


def _be(script: Path, words: list[str], out: Path, err: Path, parent: int) -> Any:
    status: Any = 1
    try:
        rank.settle(parent)
        for path, stream in ((out, 1), (err, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.environ["OMP_NUM_THREADS"] = "1"
        sys.argv = [str(script), *words]
        runpy.run_path(str(script), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            sys.stderr.write(end.code + "\n")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
