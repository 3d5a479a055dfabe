"""Puts known faults into a copy of the tree, one at a time: do the tests find them? `make test-the-tests`, or `run.py [WORDS]`.

faults.toml says what is wrong, by which edit, and which tests must find it. An edit that no longer fits its file is an error. So are tests
that fail without the fault, or that cannot run with it. WORDS choose faults whose names contain one of them.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent.parent
TABLE = Path(__file__).with_name("faults.toml")
COPIED = (
    "swift_mega",
    "tests",
    "scripts",
    "examples",
    "docs",
    "tools",
    "benchmarks",
    "pyproject.toml",
    "README.md",
    "Makefile",
    "setup.py",
)
PASSED, FAILED = 0, 1
"""pytest's exit statuses; any other status means that tests did not run."""
Verdict = Literal["found", "MISSED", "ERROR"]


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Replaces `old`, which is in `file` exactly once, by `new`."""

    file: str
    old: str
    new: str


@dataclass(frozen=True, kw_only=True)
class Fault:
    name: str
    tests: str
    edits: tuple[Edit, ...]
    quick: bool = False


def read(table: Path = TABLE) -> list[Fault]:
    return [
        Fault(**{**one, "edits": tuple(Edit(**edit) for edit in one["edits"])})
        for one in tomllib.loads(table.read_text())["fault"]
    ]


def apply(fault: Fault, tree: Path) -> None:
    """Edits the files of `tree`; ValueError where `old` of an edit is not in its file exactly once."""
    for edit in fault.edits:
        path = tree / edit.file
        text = path.read_text() if path.is_file() else ""
        if (count := text.count(edit.old)) != 1:
            raise ValueError(
                f"{edit.file} holds {count} times, not once: {edit.old!r}; bring tests/faults/faults.toml up to date"
            )
        path.write_text(text.replace(edit.old, edit.new))


def copy_tree(tree: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy2(source, tree / name)


def run_tests(tree: Path, tests: str) -> tuple[int, str]:
    """pytest's exit status in `tree`, whose package it imports, and the end of its output."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "--timeout=300",
        "-m",
        "not gpu",
        *shlex.split(tests),
    ]
    done = subprocess.run(
        ["env", f"PYTHONPATH={tree}", *command],
        cwd=tree,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def judge(fault: Fault, *, sound: bool = True) -> tuple[Verdict, str]:
    """Whether the tests find the fault. sound: first run them without the fault; they must pass."""
    with tempfile.TemporaryDirectory(prefix="swift-mega-fault-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        if sound:
            status, said = run_tests(tree, fault.tests)
            if status != PASSED:
                return "ERROR", f"without the fault pytest ends with status {status}\n{said[-3000:]}"
        try:
            apply(fault, tree)
        except ValueError as error:
            return "ERROR", str(error)
        status, said = run_tests(tree, fault.tests)
    if status == FAILED:
        return "found", next((line for line in said.splitlines() if line.startswith("FAILED")), "")
    if status == PASSED:
        return "MISSED", said.splitlines()[-1] if said else ""
    return "ERROR", f"with the fault pytest ends with status {status}\n{said[-3000:]}"


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only faults whose name holds one of them")
    parser.add_argument(
        "--smoke", action="store_true", help="the quick faults alone, without running their tests in sound code first"
    )
    parser.add_argument("--no-sound", action="store_true", help="do not run the tests without the fault first")
    arguments = parser.parse_args(given)
    faults, wrong = read(), 0
    if arguments.smoke:  # tests/test_known_faults.py tries every edit
        faults, arguments.no_sound = [fault for fault in faults if fault.quick], True
    elif arguments.words:
        faults = [fault for fault in faults if any(word in fault.name for word in arguments.words)]
    for fault in faults:
        begin = time.monotonic()
        verdict, said = judge(fault, sound=not arguments.no_sound)
        wrong += verdict != "found"
        print(f"{verdict:6} {fault.name}  ({time.monotonic() - begin:.0f} s)\n       {said}", flush=True)
    print(f"{len(faults)} faults, {wrong} not found or not tried")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
