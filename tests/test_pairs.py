"""A cover has every pair, and no more cases than it needs; the only case with some pair is never left out."""

from itertools import product
from pathlib import Path

import pytest

from tests import pairs


def test_every_pair_is_in_the_cover() -> None:
    """Of 54 cases of a product, pairs need at least 9 (3 x 3); the greedy choice needs few more."""
    cases = list(product("abc", "123", "xyz", "pq"))
    chosen = pairs.cover(cases, pairs.pairs, lambda case: 1)
    held = set().union(*(pairs.pairs(cases[place]) for place in chosen))
    assert held == set().union(*(pairs.pairs(case) for case in cases))
    assert {frozenset(("a", "1")), frozenset(("z", "q")), frozenset(("c",))} <= held
    assert 9 <= len(chosen) <= 14


def test_long_files_are_there(pytestconfig: pytest.Config) -> None:
    here = Path(__file__).parent
    # By path, because several folders have a module of this name.
    conftest = pytestconfig.pluginmanager.get_plugin(str(here / "conftest.py"))
    assert conftest is not None and [name for name in conftest.LONGEST if not (here / name).is_file()] == []


def test_the_cheaper_case_is_chosen() -> None:
    cases = [("llama", "tp4", "full"), ("llama", "tp2", "full")]
    same = {frozenset(("one",))}
    assert pairs.cover(cases, lambda case: same, pairs.cost_of) == {1}
    assert pairs.cover(cases, pairs.of_layouts(pairs.kind), pairs.cost_of) == {0, 1}


def test_cases_outside_the_cover_are_marked() -> None:
    cases = [("llama", "tp2", "full"), ("qwen3", "tp2", "full"), ("llama", "tp2", "lora"), ("qwen3", "tp2", "lora")]
    made = pairs.covering(cases, pairs.of_layouts(pairs.kind))
    kept = [param.values for param in made if not param.marks]
    assert {family for family, _, _ in kept} == {"llama", "qwen3"} and {tuner for _, _, tuner in kept} == {
        "full",
        "lora",
    }
    assert len(kept) == 2 and all(mark.name == "full" for param in made for mark in param.marks)


@pytest.mark.parametrize(
    "family, kind",
    [("qwen3_next_dense", "delta"), ("deepseek_v3_moe", "latent"), ("gpt_oss_8_2", "experts"), ("qwen2_4_1", "dense"),
     ("llama_tied_4_2", "tied"), ("phi3_4_1", "joined")],
)  # fmt: skip
def test_kinds(family: str, kind: str) -> None:
    assert pairs.kind(family) == kind
