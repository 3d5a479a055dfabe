"""The table of known faults names tests that exist."""

import ast
import tomllib
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CASES = tomllib.loads((HERE / "cases.toml").read_text())["case"]


def test_every_number_is_there_once() -> None:
    assert [case["number"] for case in CASES] == [str(number) for number in range(1, 25)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["number"])
def test_its_tests_are_there(case: dict) -> None:
    for name in case["tests"]:
        file, _, function = name.partition("::")
        tree = ast.parse((HERE / file).read_text())
        there = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
        assert there and (not function or function in there), name
