"""The measured CPU time of tests beside their budget (budget.toml), by folder, printed at the end of a run of several folders."""

import tomllib
from collections import Counter
from pathlib import Path

import pytest

TABLE = Path(__file__).parent / "budget.toml"


class Budget:
    """Adds up the reports of tests. The process that prints sees the reports of all workers."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        """Of CPU time, which conftest.py records when a test is torn down."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            self.seconds[folder_of(report.nodeid)] += float(str(dict(report.user_properties)["cpu_seconds"]))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if len(self.seconds) > 1:
            terminalreporter.section("processor minutes")
            for line in lines(self.seconds, tomllib.loads(TABLE.read_text())["minutes"]):
                terminalreporter.line(line)


def folder_of(nodeid: str) -> str:
    """tests/train/test_loop.py::test_x -> train; tests/test_cli.py::test_y -> ."""
    parts = Path(nodeid.partition("::")[0]).parts
    return parts[1] if len(parts) > 2 else "."


def lines(seconds: dict[str, float], budget: dict[str, float]) -> list[str]:
    """The lines of the table. A folder without a budget has a budget of zero."""
    shown = [f"{'folder':10} {'spent':>6} {'budget':>6}"]
    for folder in sorted(seconds, key=lambda name: -seconds[name]):
        spent, may = seconds[folder] / 60, budget.get(folder, 0.0)
        shown.append(f"{folder:10} {spent:6.2f} {may:6.2f}{'  OVER' if spent > may else ''}")
    spent, may = sum(seconds.values()) / 60, sum(budget.get(folder, 0.0) for folder in seconds)
    return [*shown, f"{'all':10} {spent:6.2f} {may:6.2f}{'  OVER' if spent > may else ''}"]


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Budget(), "budget-of-processor-minutes")
