"""Megatron's TEDotProductAttention makes and calls Transformer Engine's attention over context ranks as its own source requires.

In a process of its own (tests/models/context_on_te.py), where Transformer Engine was built. Its kernels need a GPU and do not run.
"""

from typing import Any

import pytest

from tests.models.te_process import FOLDER, NOT_BUILT, found_by
from tests.te_stand_in import local

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=NOT_BUILT)

EXPECTED = {
    "cp2-te:p2p": ("p2p", [-1, 0], lambda rank: [[0, 1]]),
    "cp2-te:a2a": ("a2a", [5, 0], lambda rank: [[0, 1]]),  # a window of 6 tokens, with the query's own
    "tp2-cp2-te:allgather-sp": ("all_gather", [5, 0], lambda rank: [[rank % 2, rank % 2 + 2]]),
    "cp4-te:a2a2+p2p": ("a2a+p2p", [-1, 0], lambda rank: [[rank - rank % 2, rank - rank % 2 + 1], [rank % 2, rank % 2 + 2]]),
}  # fmt: skip
"""By layout: cp_comm_type, window_size, and the groups of a rank."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of each rank, by layout."""
    return found_by("context_on_te", tmp_path_factory.mktemp("engine"))


@pytest.mark.parametrize("layout", EXPECTED)
def test_it_is_made(found: dict[str, Any], layout: str) -> None:
    """With the groups, window and scale of the layer. The model has the same parameters as without it."""
    communication, window, groups = EXPECTED[layout]
    assert len(found[layout]) == (2 if layout.startswith("cp2") else 4)
    for rank, told in enumerate(found[layout]):
        assert told["class"] == "TEDotProductAttention" and not told["wrong"], told["wrong"]
        assert (told["communication"], told["window"], told["dropout"]) == (communication, window, 0)
        assert told["groups"] == groups(rank) and rank in told["ranks"]
        assert told["scale"] == pytest.approx(8**-0.5)


@pytest.mark.parametrize("layout", EXPECTED)
def test_it_is_called(found: dict[str, Any], layout: str) -> None:
    """The arguments of Transformer Engine's own forward, bound to its parameters; no padding between examples is declared."""
    for told in (each["call"] for each in found[layout]):
        assert told["format"] == "thd" and told["mask"] == "padding_causal" and told["padding"] is None
        assert told["one"] and told["starts"] and told["longest"] == [told["max"]] * 2
        assert told["out"][1] == 1


@pytest.mark.parametrize("layout", EXPECTED)
def test_rows_are_cut_and_padded_as_its_own_functions_do(found: dict[str, Any], layout: str) -> None:
    """get_batch_on_this_cp_rank for tokens, labels and positions; pad_thd_sequences_for_cp for the padding after each example."""
    assert all(told["cut"] and told["padding"] for told in found[layout])


def test_the_stand_in_has_the_parameters_of_the_installed_one(found: dict[str, Any]) -> None:
    assert all(told["__init__"] and told["forward"] for each in found.values() for told in each)


def test_the_definition_of_the_tests_cuts_as_it_does(found: dict[str, Any]) -> None:
    """tests/te_stand_in.py, with a row of two examples of 20 and 24 tokens."""
    assert [told["places"] for told in found["cp2-te:p2p"]] == local([0, 20, 44], 2)
