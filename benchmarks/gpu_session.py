"""Checks results, memory and speed on a GPU, with a limit for each: `make gpu-check`, or `python benchmarks/gpu_session.py [--help]`.

The stages are modules of benchmarks/gpu_check. They run in a separate process, so a stage that fails does not affect the others. Where a
stage ends the process, or makes the GPU unusable, the remaining stages run in a new process. Results are written after every number to
benchmarks/results/<gpu>-<date>.json. A later run on the same day replaces the results of its stages in this file. docs/gpu.md is made from
these files (--docs). Needs only the packages of setup.py; swift_mega need not be installed, and no virtual environment is needed.
"""

import argparse
import ast
import datetime
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.gpu_check import page  # noqa: E402
from benchmarks.gpu_check.record import Record  # noqa: E402
from benchmarks.gpu_check.stages import STAGES  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
NOT_NEEDED = ("matplotlib", "tensorboard")
"""Requirements of setup.py that only plots and TensorBoard need."""
Start = Callable[[Sequence[str]], "subprocess.Popen[bytes]"]
STAGE_SECONDS = 240
"""Time limit of a stage; one that takes longer has hung."""
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


# ------------------------------------------------------------------------------------------------ the stages, in another process


def run_stages(
    stages: Sequence[str], path: Path, start: Start, *, about: Mapping[str, str], limit: float = STAGE_SECONDS
) -> Record:
    """Runs the stages in one process, or in several where a process ends early; returns the record.

    start: starts a process that runs the given stages and writes their results to `path`. about: fields of the record for a stage that
    did not begin because the process died. limit: seconds for one stage.
    """
    record = Record(path)
    for name in stages:
        record.stages.pop(name, None)
    record.write()
    left = list(stages)
    while left:
        why = _wait(start(left), path, left, limit)
        record = Record(path)
        begun = [name for name in left if name in record.stages]
        # The process died before its first stage; another one would do the same.
        if not begun:
            begun = left
            for name in left:
                record.begin(name, **about)
        for name in begun:
            if record.stages[name]["state"] == "running":
                record.end(name, why or "the process ended before the stage did")
        left = [name for name in left if name not in begun]
    return record


def _wait(process: "subprocess.Popen[bytes]", path: Path, stages: Sequence[str], limit: float) -> str:
    """Waits until the process ends; returns the reason of a failure, or "" after success."""
    try:
        while True:
            try:
                status = process.wait(timeout=0.5)
                return "" if status == 0 else f"the process ended with status {status}"
            except subprocess.TimeoutExpired:
                if path.is_file() and (name := _overdue(Record(path), stages, limit)):
                    process.kill()
                    process.wait()
                    return f"{name} took more than {limit:g} s and was killed"
    finally:
        # Still running after Ctrl-C.
        if process.poll() is None:
            process.kill()
            process.wait()


def _overdue(record: Record, stages: Iterable[str], limit: float) -> str | None:
    for name in stages:
        entry = record.stages.get(name, {})
        if entry.get("state") == "running" and time.time() - entry["begun"] > limit:
            return name
    return None


# ------------------------------------------------------------------------------------------------ what is there


def missing() -> dict[str, str]:
    """Requirements of setup.py, and pytest, that this interpreter does not meet: requirement -> installed version, or "nothing"."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return {"packaging": "nothing"}
    call: Any = ast.parse((ROOT / "setup.py").read_text()).body[-1]
    named = next(each.value for each in call.value.keywords if each.arg == "install_requires")
    found = {}
    for text in [*ast.literal_eval(named), "pytest"]:
        wanted = Requirement(text)
        if wanted.name in NOT_NEEDED:
            continue
        try:
            there = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            there = "nothing"
        if there == "nothing" or not wanted.specifier.contains(there, prereleases=True):
            found[text] = there
    return found


def refuse(lacking: Mapping[str, str], gpu: str | None, *, small: bool) -> str | None:
    """The reason why this machine cannot run the check, with a remedy; None where it can. gpu: the result of `gpu_of`."""
    if lacking:
        found = ", ".join(f"{text} ({there} is installed)" for text, there in lacking.items())
        install = shlex.join([sys.executable, "-m", "pip", "install", *lacking])
        return (
            f"{sys.executable} lacks {found}. With a network: {install}. Without one: copy their wheels here, pip install --no-index "
            "--no-deps --target site *.whl, and set PYTHONPATH=site. Or name another interpreter: make gpu-check GPU_PYTHON=python3"
        )
    if gpu is None and not small:
        return (
            f"torch finds no GPU in {sys.executable}; on a machine that has one, install the torch build of its CUDA version (a CPU build "
            "finds none), or name another interpreter: make gpu-check GPU_PYTHON=python3. What a CPU can show: --small"
        )
    return None


def gpu_of(python: str) -> str | None:
    """The name of the first GPU that torch finds; None without a GPU. Runs in another process, so its GPU memory is freed at its end."""
    asked = (
        "import torch; print(torch.cuda.get_device_name(0) if torch.version.cuda and torch.cuda.is_available() else '')"
    )
    done = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def commit() -> str:
    """The commit of HEAD, with "+" where files differ from it; "unknown" where there is no git repository."""
    if shutil.which("git") is None:
        return "unknown"
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def results_file(gpu: str, today: datetime.date) -> Path:
    """For example benchmarks/results/nvidia-h200-2026-11-30.json."""
    return RESULTS / f"{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}-{today.isoformat()}.json"


# ------------------------------------------------------------------------------------------------ the command


def check(stages: Sequence[str], output: Path, *, small: bool, head: str) -> int:
    """Runs the stages and prints everything that is BAD; returns 1 where something is. head: the commit of this tree."""
    command = " ".join(["python", *sys.argv])
    environment = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}

    def start(names: Sequence[str]) -> "subprocess.Popen[bytes]":
        words = [output, command, head, *(["--small"] if small else []), *names]
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_check.worker", *map(str, words)],
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
        )

    begin = time.monotonic()
    record = run_stages(stages, output, start, about={"command": command, "commit": head})
    record.found["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record.write()
    bad, checks = record.bad(stages), sum(len(record.stages[name]["checks"]) for name in stages)
    print(f"{len(bad)} BAD of {checks} checks in {time.monotonic() - begin:.0f} s", *bad, sep="\n  ")
    return int(bool(bad))


def main(given: Sequence[str] | None = None) -> int:
    """Runs the command; exit status 1 where something is BAD, 2 where the check could not run."""
    arguments = _arguments(given)
    if arguments.docs or arguments.check_docs:
        return page.main(RESULTS, check=arguments.check_docs)
    stages = [name for name in STAGES if arguments.stages is None or name in arguments.stages]
    gpu = None if (lacking := missing()) else gpu_of(sys.executable)
    if why := refuse(lacking, gpu, small=arguments.small):
        print(f"error: {why}", file=sys.stderr)
        return 2
    head = arguments.commit or commit()
    if arguments.output is not None:
        return check(stages, arguments.output, small=arguments.small, head=head)
    if arguments.small or gpu is None:
        with tempfile.TemporaryDirectory(prefix="swift-mega-gpu-") as folder:
            return check(stages, Path(folder) / "gpu.json", small=True, head=head)
    RESULTS.mkdir(exist_ok=True)
    output = results_file(gpu, datetime.datetime.now(datetime.UTC).date())
    status = check(stages, output, small=False, head=head)
    print(f"written to {output.relative_to(ROOT)}")
    page.main(RESULTS)
    return status


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=_stages, help=f"stages to run, of {','.join(STAGES)}; default: all")
    parser.add_argument(
        "--small", "--smoke", action="store_true", help="tiny models and short rows, also on a CPU; keeps no results"
    )
    parser.add_argument("--output", type=Path, help="results file; default: benchmarks/results/<gpu>-<date>.json")
    parser.add_argument("--commit", help="commit of this tree, where it is a copy without git")
    parser.add_argument("--docs", action="store_true", help="only write docs/gpu.md from the results files")
    parser.add_argument("--check-docs", action="store_true", help="exit with 1 where docs/gpu.md is not up to date")
    return parser.parse_args(given)


def _stages(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in STAGES]:
        raise argparse.ArgumentTypeError(f"no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    return names


if __name__ == "__main__":
    raise SystemExit(main())
