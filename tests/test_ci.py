"""What CI runs and its time budget: the tables must stay complete when the tree changes."""

import sys
import tomllib
from pathlib import Path

import budget
import newest
import pytest

ROOT = Path(__file__).parent.parent


def test_spent_beside_the_budget_by_hand() -> None:
    spent = {"train": 90.0, ".": 30.0, "new": 6.0}
    assert budget.lines(spent, {"train": 1.0, ".": 2.0, "ops": 4.0}) == [
        "folder      spent budget",
        "train        1.50   1.00  OVER",
        ".            0.50   2.00",
        "new          0.10   0.00  OVER",
        "all          2.10   3.00",
    ]
    assert [budget.folder_of(name) for name in ("tests/train/test_a.py::test[tests/x]", "tests/test_b.py::test")] == [
        "train",
        ".",
    ]


def test_every_folder_has_a_budget() -> None:
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")} | {"."}
    assert folders == tomllib.loads(budget.TABLE.read_text())["minutes"].keys()


def test_what_the_newest_leg_runs_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A renamed folder once did not run for months; now it makes the CI job fail."""
    assert "tests/device" in newest.arguments()
    monkeypatch.setattr(newest, "RUN", ("tests/devices",))
    with pytest.raises(SystemExit, match=r"tests/newest.py names tests/devices, which is not there; say where it went"):
        newest.arguments()


def test_every_script_is_started_somewhere() -> None:
    """By `make smoke`, or by what smoke's table of other scripts names."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import smoke

    assert not smoke.missing()
    assert all((ROOT / name).exists() for name in (*smoke.STARTED, *smoke.STARTED_ELSEWHERE))
