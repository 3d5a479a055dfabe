"""How context ranks are shared out between Ulysses and ring, and what is said where that cannot be."""

import pytest

from swift_mega.config.schema import Parallel
from swift_mega.errors import UserError
from swift_mega.parallel.layout import ModelShape, parse_layout, plan_layout
from swift_mega.parallel.mesh import Mesh, choose_mesh, key_copies

SHAPE = ModelShape(layers=4, heads=8, kv_heads=2, hidden=64, ffn=96, vocab=100)


@pytest.mark.parametrize(
    ("kind", "size", "heads", "kv_heads", "ulysses", "mesh", "reason"),
    [
        ("ring", 4, 9, 3, None, Mesh(1, 4), "as asked"),
        ("allgather", 4, 9, 3, None, Mesh(1, 4, gather=True), "as asked"),
        ("ulysses", 2, 8, 2, None, Mesh(2, 1), "as asked"),
        ("ulysses", 8, 8, 2, None, Mesh(8, 1), "each of 2 key heads of a tensor rank is sent 4 times, since 8 ranks share them"),
        ("ulysses", 3, 6, 2, None, Mesh(3, 1), "each of 2 key heads of a tensor rank is sent 3 times, since 3 ranks share them"),
        ("auto", 8, 8, 2, None, Mesh(2, 4), "2 is as far as 2 key heads of a tensor rank {among 8}; the ring does the other 4"),
        ("auto", 4, 8, 8, None, Mesh(4, 1), "4 is as far as 8 key heads of a tensor rank {among 4}"),
        ("auto", 4, 9, 3, None, Mesh(1, 4), "1 is as far as 3 key heads of a tensor rank {among 4}; the ring does the other 4"),
        ("hybrid", 8, 8, 2, None, Mesh(2, 4), "as asked"),
        ("hybrid", 8, 8, 2, 4, Mesh(4, 2), "each of 2 key heads of a tensor rank is sent 2 times, since 4 ranks share them"),
    ],
)  # fmt: skip
def test_chosen(kind, size, heads, kv_heads, ulysses, mesh, reason):
    found, why = choose_mesh(kind, size, heads=heads, kv_heads=kv_heads, ulysses=ulysses)
    assert found == mesh and found.size == size
    among = f"can be shared among {size} without a copy"
    assert why.removeprefix("as asked; ") == reason.replace(f"{{among {size}}}", among)


def test_copies_are_the_fewest_that_ranks_can_share():
    for kv_heads in range(1, 9):
        for ulysses in range(1, 9):
            fewest = next(copies for copies in range(1, 9) if kv_heads * copies % ulysses == 0)
            assert key_copies(kv_heads, ulysses) == fewest


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (dict(context=3, cp="ulysses"), r"3 does not divide the 8 query heads of a tensor rank; choose parallel.context=2 or 4 or 8, or"),
        (dict(context=3, cp="hybrid"), r"parallel.cp=hybrid needs an inner size that divides 3 context ranks and 8 query heads"),
        (dict(context=8, cp="hybrid", ulysses=3), r"parallel.ulysses=3 does not divide 8 context ranks and 8 query heads.*choose 2 or 4"),
        (dict(context=4, cp="ring", ulysses=2), r"parallel.ulysses=2 is the inner size of parallel.cp=hybrid, and cp=ring; remove it"),
        (dict(cp="ring"), r"parallel.cp=ring says how context ranks work together, and parallel.context=1 has none"),
        (dict(ulysses=2), r"parallel.ulysses=2 says how context ranks work together, and parallel.context=1 has none"),
        (dict(context=0), r"parallel.context=0 is not a number of ranks"),
    ],
)  # fmt: skip
def test_what_cannot_be(parallel, message):
    with pytest.raises(UserError, match=message):
        plan_layout(Parallel(**parallel), SHAPE, parallel.get("context") or 1)


def test_ranks_that_are_no_multiple_and_the_remedy():
    with pytest.raises(
        UserError, match=r"6 ranks cannot be cut into copies of .* x parallel.context=4 = 4 ranks: start 4 or 8 ranks"
    ):
        plan_layout(Parallel(context=4), SHAPE, 6)
    with pytest.raises(UserError, match=r"on 3 ranks these would work: .*parallel.cp=auto"):
        plan_layout(Parallel(context=3, cp="ulysses"), SHAPE, 3)


@pytest.mark.parametrize(
    "name", ["cp2-ring", "cp2-ulysses", "cp4-ulysses2", "cp4-allgather", "tp2-cp2-ring-sp", "pp2-cp2-ulysses-dp2"]
)
def test_a_name_is_read_back(name):
    parallel, world = parse_layout(name)
    assert plan_layout(parallel, SHAPE, world).name == name
    assert parse_layout("cp2")[0].cp == "auto"


def test_rows_are_multiples_of_what_cuts_them():
    def multiple(name: str) -> int:
        parallel, world = parse_layout(name)
        return plan_layout(parallel, SHAPE, world).row_multiple

    found = {
        name: multiple(name)
        for name in ("single", "tp2-sp", "cp2-ulysses", "cp2-ring", "cp4-ulysses2", "tp2-cp2-ring-sp")
    }
    assert found == {"single": 1, "tp2-sp": 2, "cp2-ulysses": 2, "cp2-ring": 4, "cp4-ulysses2": 8, "tp2-cp2-ring-sp": 8}
