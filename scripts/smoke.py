"""Runs every benchmark and script with --smoke: `make smoke`. A file that is in no table below is an error.

With --smoke, each runs its normal code on a tiny model for some seconds, and asserts that its results are complete and finite. These runs
are no measurements.
"""

import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STARTED = {
    "benchmarks/train_step.py": ["--smoke"],
    "benchmarks/convert.py": ["--smoke"],
    "benchmarks/long_context.py": ["--smoke"],
    "benchmarks/context_curve.py": ["--smoke"],
    "benchmarks/gpu_session.py": ["--smoke"],
    "scripts/demo.py": ["--smoke"],
    "scripts/prepare_smollm2.py": ["--smoke"],
    "tests/faults/run.py": ["--smoke"],
}
"""File -> its arguments."""
STARTED_ELSEWHERE = {
    "benchmarks/context_parts.py": "parts b to d of long_context.py",
    "benchmarks/gpu_check": "stages of gpu_session.py",
    "benchmarks/memory_parts.py": "parts a and e of long_context.py",
    "scripts/smoke.py": "this one",
    "scripts/smoke_model.py": "the model of the others",
    "scripts/models_page.py": "tests/test_docs.py",
    "scripts/token_layout.py": "tests/test_docs.py",
    "scripts/swift_page.py": "tests/test_docs.py",
    "scripts/build_te.py": "make test-newest",
    "tools/convert/compare_logits.py": "tests/test_tools.py",
    "tools/convert/hf_to_mcore.py": "tests/test_tools.py",
    "tools/convert/mcore_to_hf.py": "tests/test_tools.py",
}
"""File, or folder for all its files -> what runs it."""
LIMIT = 300
"""Time limit of one file in seconds; a file that needs longer has hung."""
AT_ONCE = 2


def missing() -> list[str]:
    """Files that are in no table."""
    folders = ("benchmarks", "scripts", "tools")
    there = [file.relative_to(ROOT) for folder in folders for file in (ROOT / folder).rglob("*.py")]
    known = STARTED.keys() | STARTED_ELSEWHERE.keys()
    return sorted(str(file) for file in there if not known & {str(file), str(file.parent)})


def main() -> int:
    """Runs all files; returns 1 where a file ended with a status other than 0."""
    if unknown := missing():
        print(
            f"error: {', '.join(unknown)}: in no table of scripts/smoke.py; give it a --smoke form, or name what starts it"
        )
        return 1
    begin, failed = time.monotonic(), False
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for name, seconds, done in pool.map(_start, STARTED):
            print(f"{'ok  ' if done.returncode == 0 else 'FAIL'} {name:32} {seconds:5.1f} s", flush=True)
            if done.returncode:
                failed = True
                print(done.stdout, flush=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{time.monotonic() - begin:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of processor time")
    return int(failed)


def _start(name: str) -> tuple[str, float, "subprocess.CompletedProcess[str]"]:
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, ROOT / name, *STARTED[name]],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    return name, time.monotonic() - begin, done


if __name__ == "__main__":
    sys.exit(main())
