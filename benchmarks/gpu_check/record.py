"""The results file of a GPU check. It is written after every number, so nothing is lost when a stage ends the process.

{"device": …, "stages": {name: {"state": "running" | "done" | "failed", "seconds": …, "commit": …, "command": …, "facts": {name: text},
 "checks": [{"name", "value", "limit", "ok"}], "error": …}}}
"""

import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Record:
    """The results file. Only one process at a time writes to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"stages": {}}

    def write(self) -> None:
        """Writes the file atomically, because the process that watches the stages reads it at the same time."""
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps(self.found, indent=1) + "\n")
        os.replace(beside, self.path)

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        return self.found["stages"]

    def begin(self, name: str, **about: str) -> "Stage":
        """Starts a stage; its results of an earlier run are deleted."""
        self.stages[name] = {"state": "running", "begun": time.time(), **about, "facts": {}, "checks": []}
        self.write()
        return Stage(self, name)

    def end(self, name: str, error: str | None = None) -> None:
        """Ends a stage. error: the reason why it did not finish; None where it did."""
        entry = self.stages[name]
        entry["seconds"] = round(time.time() - entry.pop("begun"), 1)
        entry["state"] = "done" if error is None else "failed"
        if error is not None:
            entry["error"] = error
        self.write()

    def bad(self, stages: Iterable[str]) -> list[str]:
        """Checks that are over their limit, and stages that failed."""
        found = []
        for name in stages:
            entry = self.stages[name]
            found += [f"{name}: {check['name']}" for check in entry["checks"] if not check["ok"]]
            if entry["state"] != "done":
                found.append(f"{name}: did not finish")
        return found


@dataclass
class Stage:
    """Writes the results of one stage to the record and prints them."""

    record: Record
    name: str
    entry: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.entry = self.record.stages[self.name]

    def fact(self, name: str, value: object) -> None:
        """Records a number or a text that has no limit."""
        self.entry["facts"][name] = str(value)
        self._say(name, str(value))

    def check(self, name: str, value: float, limit: float) -> None:
        """Records a number with a limit: ok where value <= limit, so NaN is BAD."""
        ok = bool(value <= limit)
        # JSON has no NaN and no infinities.
        shown = value if math.isfinite(value) else str(value)
        self.entry["checks"].append({"name": name, "value": shown, "limit": limit, "ok": ok})
        self._say(name, f"{value:.3g}  {'ok' if ok else 'BAD'} (limit {limit:.3g})")

    def _say(self, name: str, text: str) -> None:
        self.record.write()
        print(f"{self.name:10} {name:62} {text}", flush=True)
