"""How context ranks are divided between Ulysses and ring, and the error where this is impossible."""

import dataclasses

import pytest

from swift_mega.config.schema import Parallel
from swift_mega.errors import UserError
from swift_mega.parallel.layout import ModelShape, parse_layout, plan_layout
from swift_mega.parallel.mesh import TE_KINDS, Mesh, choose_mesh, key_copies

SHAPE = ModelShape(layers=4, heads=8, kv_heads=2, hidden=64, ffn=96, vocab=100)


@pytest.mark.parametrize(
    ("kind", "size", "heads", "kv_heads", "ulysses", "mesh", "reason"),
    [
        ("ring", 4, 9, 3, None, Mesh(1, 4), "as set"),
        ("allgather", 4, 9, 3, None, Mesh(1, 4, gather=True), "as set"),
        ("ulysses", 2, 8, 2, None, Mesh(2, 1), "as set"),
        ("ulysses", 8, 8, 2, None, Mesh(8, 1), "each of 2 key heads of a tensor rank is sent 4 times, since 8 ranks share them"),
        ("ulysses", 3, 6, 2, None, Mesh(3, 1), "each of 2 key heads of a tensor rank is sent 3 times, since 3 ranks share them"),
        ("auto", 8, 8, 2, None, Mesh(2, 4), "2 of 8 ranks can split 2 key heads of a tensor rank without copies; a ring of 4 for the rest"),
        ("auto", 4, 8, 8, None, Mesh(4, 1), "4 of 4 ranks can split 8 key heads of a tensor rank without copies"),
        ("auto", 4, 9, 3, None, Mesh(1, 4), "1 of 4 ranks can split 3 key heads of a tensor rank without copies; a ring of 4 for the rest"),
        ("hybrid", 8, 8, 2, None, Mesh(2, 4), "as set"),
        ("te:p2p", 4, 9, 3, None, Mesh(1, 4, te=True), "as set"),
        ("te:allgather", 4, 9, 3, None, Mesh(1, 4, gather=True, te=True), "as set"),
        ("te:a2a", 3, 9, 3, None, Mesh(3, 1, te=True), "as set"),
        ("te:a2a+p2p", 8, 8, 4, None, Mesh(4, 2, te=True), "as set"),
        ("te:a2a+p2p", 8, 8, 4, 2, Mesh(2, 4, te=True), "as set"),
        ("hybrid", 8, 8, 2, 4, Mesh(4, 2), "each of 2 key heads of a tensor rank is sent 2 times, since 4 ranks share them"),
    ],
)  # fmt: skip
def test_chosen(kind, size, heads, kv_heads, ulysses, mesh, reason):
    found, why = choose_mesh(kind, size, heads=heads, kv_heads=kv_heads, ulysses=ulysses)
    assert found == mesh and found.size == size
    assert why.removeprefix("as set; ") == reason


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
        (dict(cp="ring"), r"parallel.cp=ring has no effect with parallel.context=1"),
        (dict(ulysses=2), r"parallel.ulysses=2 has no effect with parallel.context=1"),
        (dict(context=4, cp="te:p2p", ulysses=2), r"parallel.ulysses=2 is the inner size .*, and cp=te:p2p; remove it"),
        (dict(cp="te:p2p"), r"parallel.cp=te:p2p has no effect with parallel.context=1"),
        (dict(context=4, cp="te:a2a"), r"a2a: 4 context ranks do not divide the 8 query and 2 key heads.*; choose parallel.context=2, or"),
        (dict(context=4, tensor=2, cp="te:a2a"), r"divide the 4 query and 1 key heads.*; choose parallel.context=1, or parallel.cp=auto"),
        (dict(context=2, cp="te:a2a+p2p"), r"te:a2a\+p2p needs an inner size between 2 and 1 that divides 2 context ranks and the 8 query"),
        (dict(context=9, cp="te:a2a+p2p"), r"and there is none; choose parallel.cp=te:p2p or auto"),
        (dict(context=8, cp="te:a2a+p2p", ulysses=4), r"ulysses=4 with parallel.cp=te:a2a\+p2p does not divide 8 context .*; choose 2"),
        (dict(context=0), r"parallel.context=0 is not a number of ranks"),
    ],
)  # fmt: skip
def test_what_cannot_be(parallel, message):
    with pytest.raises(UserError, match=message):
        plan_layout(Parallel(**parallel), SHAPE, parallel.get("context", 1) * parallel.get("tensor", 1) or 1)


@pytest.mark.parametrize("kind", TE_KINDS)
def test_what_transformer_engine_cannot_do(kind):
    """Models that Transformer Engine does not support at all, and windows, which it supports in two ways only; the proposed
    alternative works."""
    parallel = Parallel(context=4, cp=kind)
    shape = dataclasses.replace(SHAPE, kv_heads=8)
    with pytest.raises(UserError) as refused:
        plan_layout(parallel, dataclasses.replace(shape, no_te_context="has wheels"), 4)
    told = str(refused.value)
    assert (
        f"parallel.cp={kind} is Transformer Engine's attention, and this model has wheels; set parallel.cp=auto" in told
    )
    assert (
        told.endswith("these would work: parallel.cp=auto | parallel.context=1 parallel.cp=auto")
        or "parallel.cp=auto |" in told
    )
    windowed = dataclasses.replace(shape, windows=True)
    if kind in ("te:a2a", "te:allgather"):
        assert plan_layout(parallel, windowed, 4).mesh.te
        return
    with pytest.raises(
        UserError, match=r"sliding windows, .* te:a2a and te:allgather only; choose one of these, or parallel.cp=auto"
    ):
        plan_layout(parallel, windowed, 4)


def test_ranks_that_are_no_multiple_and_the_remedy():
    with pytest.raises(
        UserError,
        match=r"6 ranks cannot be split into replicas of .* x parallel.context=4 = 4 ranks: start 4 or 8 ranks",
    ):
        plan_layout(Parallel(context=4), SHAPE, 6)
    with pytest.raises(UserError, match=r"on 3 ranks these would work: .*parallel.cp=auto"):
        plan_layout(Parallel(context=3, cp="ulysses"), SHAPE, 3)


@pytest.mark.parametrize(
    "name", ["cp2-ring", "cp2-ulysses", "cp4-ulysses2", "cp4-allgather", "tp2-cp2-ring-sp", "pp2-cp2-ulysses-dp2", "cp4-te:p2p",
     "tp2-cp2-te:allgather-sp", "cp2-te:a2a", "cp8-te:a2a2+p2p"],
)  # fmt: skip
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
        for name in (
            "single",
            "tp2-sp",
            "cp2-ulysses",
            "cp2-ring",
            "cp4-ulysses2",
            "tp2-cp2-ring-sp",
            "tp2-cp2-te:p2p-sp",
            "cp2-te:a2a",
        )
    }
    ours = {"single": 1, "tp2-sp": 2, "cp2-ulysses": 2, "cp2-ring": 4, "cp4-ulysses2": 8, "tp2-cp2-ring-sp": 8}
    assert found == ours | {"tp2-cp2-te:p2p-sp": 8, "cp2-te:a2a": 4}


def test_only_transformer_engine_wants_examples_of_some_multiple():
    assert {Mesh(2, 1).example_multiple, Mesh(1, 4).example_multiple, Mesh(2, 2).example_multiple} == {1}
    assert Mesh(2, 1, te=True).example_multiple == 4 and Mesh(2, 2, te=True).example_multiple == 8
