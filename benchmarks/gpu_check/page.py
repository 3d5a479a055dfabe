"""Makes docs/gpu.md from the newest results file of each GPU; without such files the page says so."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.stages import STAGES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"
HEAD = """# What was run on a GPU

Made by `python benchmarks/gpu_session.py --docs` from `benchmarks/results/`, one file for each GPU and day.

`make gpu-check` runs the checks below on the first GPU of a machine, writes a results file and this page, and ends with status 1 where
anything is BAD. It needs no `make venv`: `make gpu-check GPU_PYTHON=python3` takes any Python 3.11 or newer with the packages of setup.py,
and says which are missing. `GPU_FLAGS="--stages facts,attention"` runs some stages alone. Without a GPU `--small` runs the same code on
tiny models, with the same limits, in about half a minute (also part of `make smoke`).

A machine without a network gets the wheels that it lacks (megatron-core for its Python, transformers, peft, einops: 17 MB) in a folder:

```bash
python3 -m pip install --no-index --no-deps --upgrade --target site wheels/*.whl
PYTHONPATH=site make gpu-check GPU_PYTHON=python3 GPU_FLAGS="--output gpu.json --commit $(git rev-parse --short HEAD)"
```

A results file that was written elsewhere belongs in `benchmarks/results/` as `<gpu>-<date>.json`.

| stage | what it proves | limit | seconds |
|---|---|---|---|
"""
ESTIMATE = "Seconds are estimates for one H200, about {minutes} minutes in all; a results file has the real ones.\n"
NONE = """
## Results

None: no GPU has run these checks yet. What is known without one is that the same stages pass on the CPU.
"""
NOT_SHOWN = """
## What one GPU does not show

NCCL between ranks, the overlap of communication and computation, point-to-point order in pipelines and rings: NCCL refuses two ranks on
one GPU. Tests over several gloo ranks cover the arithmetic of layouts on the CPU.
"""


def page(results: Sequence[dict[str, Any]]) -> str:
    """The text of the page. results: the newest results of each GPU."""
    rows = [f"| `{name}` | {about.proves} | {about.limit} | {about.seconds} |\n" for name, about in STAGES.items()]
    minutes = round(sum(about.seconds for about in STAGES.values()) / 60)
    found = "".join(_device(one) for one in results) if results else NONE
    return HEAD + "".join(rows) + "\n" + ESTIMATE.format(minutes=minutes) + found + NOT_SHOWN


def newest(folder: Path) -> list[dict[str, Any]]:
    """The newest results of each GPU, by the date in the file."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        one = json.loads(path.read_text())
        if one["device"] not in found or found[one["device"]]["date"] < one["date"]:
            found[one["device"]] = one
    return [found[name] for name in sorted(found)]


def main(folder: Path, *, check: bool = False) -> int:
    """Writes the page from the results files in `folder`; with `check` it only compares."""
    made = page(newest(folder))
    if check:
        return 0 if PAGE.is_file() and PAGE.read_text() == made else 1
    PAGE.write_text(made)
    return 0


def _device(found: dict[str, Any]) -> str:
    stages = [name for name in STAGES if name in found["stages"]]
    checks = [each for name in stages for each in found["stages"][name]["checks"]]
    bad = [each for each in checks if not each["ok"]]
    failed = [name for name in stages if found["stages"][name]["state"] != "done"]
    left_out = [name for name in STAGES if name not in stages]
    said = f"{len(checks) - len(bad)} of {len(checks)} checks ok"
    said += f"; stages that did not finish: {', '.join(failed)}" if failed else ""
    said += f"; stages that were not run: {', '.join(left_out)}" if left_out else ""
    text = f"\n## {found['device']}, {found['date'][:10]}\n\n{said}.\n"
    return text + "".join(_stage(name, found["stages"][name]) for name in stages) + _absent(found)


def _stage(name: str, entry: dict[str, Any]) -> str:
    lines = [f"\n### {name}\n", f"Commit {entry['commit']}, `{_cell(entry['command'])}`, {entry['seconds']:g} s.\n"]
    if entry["checks"]:
        lines += ["| check | value | limit | |", "|---|---|---|---|"]
        lines += [_check(each) for each in entry["checks"]]
        lines.append("")
    if entry["facts"]:
        lines += ["| | |", "|---|---|"]
        lines += [f"| {_cell(key)} | {_cell(value)} |" for key, value in entry["facts"].items()]
        lines.append("")
    if error := entry.get("error"):
        lines += ["Did not finish:", "", "```", error.strip().splitlines()[-1], "```", ""]
    return "\n".join(lines)


def _check(each: dict[str, Any]) -> str:
    value = each["value"] if isinstance(each["value"], str) else f"{each['value']:.3g}"
    return f"| {_cell(each['name'])} | {value} | {each['limit']:.3g} | {'ok' if each['ok'] else '**BAD**'} |"


def _absent(found: dict[str, Any]) -> str:
    """A line about optional packages that were not installed, so that the run did not test their code paths."""
    facts = found["stages"].get("facts", {}).get("facts", {})
    absent = [name for name in ("transformer-engine", "flash-attn", "apex") if facts.get(name) == "not installed"]
    return f"\nNot installed, so not shown: {', '.join(absent)}.\n" if absent else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
