"""Every pack, at any sizes, against a reference that says for one number at a time where it comes from (tests/packs_by_index.py)."""

import importlib
import itertools
import math
import pkgutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import swift_mega
from swift_mega.convert import save
from swift_mega.convert.files.hf_files import Checkpoint
from swift_mega.convert.files.hf_write import Writer, plan_files, write_headers
from swift_mega.convert.load import fill
from swift_mega.convert.save import Piece
from swift_mega.convert.slices import rows_of
from swift_mega.models import packs
from swift_mega.models.build import ModelPart, NamedParameter
from swift_mega.models.family import Rule, families
from swift_mega.models.linears import STACKED
from swift_mega.models.packs import Pack
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.layout import Layout
from tests.packs_by_index import (
    DTYPES,
    MATRIX,
    REFERENCES,
    Case,
    Sizes,
    Source,
    as_bits,
    cases,
    cut,
    equal,
    make,
    random_bits,
)


def subclasses(cls: type) -> set[type]:
    found = {one for one in cls.__subclasses__() if one.__module__.startswith("swift_mega")}
    return found.union(*map(subclasses, found))


def packs_in(value: object) -> Iterator[Pack]:
    if isinstance(value, Pack):
        yield value
    elif isinstance(value, Rule):
        yield value.pack
    elif isinstance(value, dict):
        for one in value.values():
            yield from packs_in(one)
    elif isinstance(value, tuple | list | set | frozenset):
        for one in value:
            yield from packs_in(one)


def test_every_pack_has_a_reference():
    """Every pack of any module, and of any family's rules, has a reference and runs in the tests below; so does every class of packs."""
    found: dict[Pack, str] = {}
    for module in pkgutil.walk_packages(swift_mega.__path__, "swift_mega."):
        if not module.name.endswith("__main__"):
            for name, value in vars(importlib.import_module(module.name)).items():
                found.update(dict.fromkeys(packs_in(value), f"{module.name}.{name}"))
    for name, family in families().items():
        for rule in family.rules:
            found[rule.pack] = f"{name}: {rule.megatron}"
    found.update({pack.linear: f"linear of {where}" for pack, where in list(found.items())})
    unknown = {where: pack for pack, where in found.items() if pack not in REFERENCES}
    assert not unknown, f"give these a reference in REFERENCES: {unknown}"
    classes = subclasses(Pack) | {Pack}
    assert classes == {type(one) for pack in REFERENCES for one in (pack, getattr(pack, "inner", pack))}, (
        "a class of packs without a reference"
    )
    assert len(found) >= 14 and len(classes) >= 6  # the search found packs at all


NAMES = {name: value for name, value in vars(packs).items() if isinstance(value, Pack)}
every_pack = pytest.mark.parametrize("pack", NAMES.values(), ids=NAMES.keys())


def examples(count: int = 20) -> Any:
    return settings(max_examples=count, deadline=None)


# --- reading


@every_pack
@examples()
@given(data=st.data())
def test_what_a_rank_reads_joined_is_its_parameter(pack, data):
    case = data.draw(cases(pack))
    for rank in range(case.sizes.size):
        found = pack.join(case.read(rank), case.heads(rank))
        expected = case.local(rank)
        if pack.padded:
            expected, padding = expected[: len(found)], as_bits(expected[len(found) :])
            assert not padding.any()
        assert equal(found, expected)


@every_pack
@examples()
@given(data=st.data())
def test_places_take_what_a_rank_reads(pack, data):
    """Views of the parameter are filled in order with the slices, whatever their shapes: the result is the parameter."""
    case = data.draw(cases(pack))
    for rank in range(case.sizes.size):
        expected = case.local(rank)
        made = torch.zeros_like(expected)
        places = pack.places(made[: rows_of(case.read(rank)[0].shape)] if pack.padded else made, case.heads(rank))
        assert places is not None
        for place, part in zip(places, case.read(rank), strict=True):
            place.copy_(part.reshape(place.shape))
        assert equal(made, expected)


@every_pack
@examples(8)
@given(data=st.data())
def test_a_file_fills_every_rank(pack, data):
    """Through a file, in the file's dtype and in float64. The earlier contents of the memory do not matter."""
    case = data.draw(cases(pack))
    # A file has finite numbers only (tests/convert/files/test_not_finite.py).
    case = replace(case, tensors=[torch.where(one.isfinite(), one, one.new_ones(())) for one in case.tensors])
    with tempfile.TemporaryDirectory() as folder:
        planned = plan_files(
            {name: (one.dtype, tuple(one.shape)) for name, one in zip(case.rule.parts, case.tensors, strict=True)},
            1 << 20,
        )
        write_headers(Path(folder), planned)
        with Writer(Path(folder), planned) as writer:
            for name, tensor in zip(case.rule.parts, case.tensors, strict=True):
                writer.write(name, tensor)
        checkpoint = Checkpoint(folder)
        for rank in range(case.sizes.size):
            expected = case.local(rank)
            for dtype in (expected.dtype, torch.float64):
                made = torch.full(expected.shape, 77, dtype=dtype)
                fill(made, checkpoint, case.rule, [piece for _, piece in case.slices(rank)], case.heads(rank))
                if dtype == expected.dtype:
                    assert equal(made, expected)
                else:
                    torch.testing.assert_close(made, expected.to(dtype), rtol=0, atol=0, equal_nan=True)


@every_pack
@examples()
@given(data=st.data())
def test_ranks_tile_every_tensor(pack, data):
    """A rank's slices have exactly the numbers that the reference takes from them, and every number is on one rank, or on all."""
    case = data.draw(cases(pack))
    counted: Counter[Source] = Counter()
    times = [torch.zeros(tensor.shape, dtype=torch.int32) for tensor in case.tensors]
    for rank in range(case.sizes.size):
        mine = [torch.zeros(tensor.shape, dtype=torch.int32) for tensor in case.tensors]
        for number, piece in case.slices(rank):
            cut(mine[number], piece).add_(1)
        taken = Counter(place for _, place in case.reference.numbers(rank) if place is not None)
        counted += taken
        assert taken == Counter(dict.fromkeys(local_places(mine), 1))
        for whole, one in zip(times, mine, strict=True):
            assert int(one.max()) <= 1
            whole += one
    owners = case.sizes.size if pack.axis is None else 1
    assert all((whole == owners).all() for whole in times)
    assert set(counted.values()) == {owners} and len(counted) == sum(math.prod(one.shape) for one in case.tensors)


def local_places(counts: Iterable[Tensor]) -> Iterator[Source]:
    for number, count in enumerate(counts):
        for index in count.nonzero().tolist():
            yield number, tuple(index)


# --- the parts of a pack


@every_pack
@examples()
@given(data=st.data())
def test_split_gives_back_what_was_joined(pack, data):
    case = data.draw(cases(pack))
    for rank in range(case.sizes.size):
        local = case.local(rank)
        if pack.padded:
            local = local[: len(case.read(rank)[0])]
        pieces = pack.split(local, case.heads(rank))
        assert all(equal(one, other) for one, other in zip(pieces, case.read(rank), strict=True))
        assert equal(pack.join(pieces, case.heads(rank)), local)


@every_pack
@examples(10)
@given(data=st.data())
def test_shares_ranges_and_fuse(pack, data):
    """The relative sizes of the parts, the range of each in its tensor, and the tensors of whole parts."""
    case = data.draw(cases(pack))
    reference, axis, generator = case.reference, pack.axis or 0, torch.Generator().manual_seed(3)
    lengths, shares = [part[axis] for part in reference.parts], pack.shares(case.model_heads)
    assert len(shares) == len(lengths)
    assert all(length * shares[0] == lengths[0] * share for length, share in zip(lengths, shares, strict=True))
    places = [(part, reference.place((part, (0,) * len(shape)))) for part, shape in enumerate(reference.parts)]
    for number, tensor in enumerate(case.tensors):
        inside = [(index[axis], index[axis] + lengths[part]) for part, (where, index) in places if where == number]
        if pack.axis is not None:
            assert list(pack.ranges(tensor.shape[axis], case.model_heads)) == inside
    whole = [random_bits(shape, case.tensors[0].dtype, generator) for shape in reference.parts]
    fused_tensors = pack.fuse(whole)
    assert [tuple(tensor.shape) for tensor in fused_tensors] == reference.tensors
    bits = [as_bits(tensor) for tensor in fused_tensors]
    for part, tensor in enumerate(whole):
        for index in itertools.product(*map(range, tensor.shape)):
            where, at = reference.place((part, index))
            assert bits[where][at] == as_bits(tensor)[index]


@every_pack
@examples(10)
@given(data=st.data())
def test_shard_dim_is_the_one_that_is_sharded(pack, data):
    """Compares the shape of a rank's parameter with that of a single rank."""
    case = data.draw(cases(pack))
    alone = REFERENCES[pack][0](replace(case.sizes, size=1, multiple=case.sizes.groups, within=1)).local_shape
    if pack in (packs.REPLICATED, packs.ONE_ROW):
        assert pack.shard_dim is None and pack.axis is None
        return
    assume(alone != case.reference.local_shape)
    assert [
        dim for dim, (one, other) in enumerate(zip(alone, case.reference.local_shape, strict=True)) if one != other
    ] == [pack.shard_dim]


@every_pack
@examples(10)
@given(data=st.data())
def test_linear_is_the_pack_of_tensors_stored_out_in(pack, data):
    """`linear` gives the same parameter from the transposed tensors, where the pack's are stored [in, out]; adapters are sharded by it."""
    if isinstance(pack, packs.InterleavedGateUp):
        rules = [rule for family in families().values() for rule in family.rules if rule.pack == pack]
        # Stacked experts get no adapter, so the pack has no other form.
        assert rules and all(STACKED.fullmatch(rule.parts[0]) for rule in rules)
        return
    case = data.draw(cases(pack))
    stored = [tensor.t() for tensor in case.tensors] if isinstance(pack, packs.Transposed) else case.tensors
    straight = Case(pack.linear, case.sizes, case.reference, list(stored))
    for rank in range(case.sizes.size):
        found, expected = pack.linear.join(straight.read(rank), case.heads(rank)), case.local(rank)
        assert equal(found, expected[: len(found)] if pack.padded else expected)
    assert pack.linear.axis == pack.shard_dim and pack.linear.linear is pack.linear


# --- writing


def part_of(case: Case, layout: Layout, rank: int, expert: bool = False) -> ModelPart:
    """The attributes of a rank's part that `save` reads: its coordinates, and the model's heads and vocabulary."""
    shape = SimpleNamespace(vocab=case.tensors[0].shape[0])
    model: Any = SimpleNamespace(heads=replace(case.model_heads, groups=0) if expert else case.model_heads, shape=shape)
    nothing: Any = None
    return ModelPart(nothing, model, nothing, layout, layout.coordinate(rank), [])


def named_of(case: Case, rank: int, expert: int | None = None) -> NamedParameter:
    """expert: a number, where the parameter belongs to an expert."""
    numbers = {} if expert is None else {"e": expert}
    parameter = torch.nn.Parameter(case.local(rank), requires_grad=False)
    rule = case.rule if expert is None else replace(case.rule, parts=tuple(f"{part}.{{e}}" for part in case.rule.parts))
    return NamedParameter("parameter", parameter, rule, numbers, False)


def check_pieces(found: Iterable[Piece], case: Case, suffix: str = "") -> None:
    """Together the pieces are the tensors, with each number exactly once."""
    names = [f"{part}{suffix}" for part in case.rule.parts]
    made = {name: torch.zeros_like(tensor) for name, tensor in zip(names, case.tensors, strict=True)}
    times = {name: torch.zeros(tensor.shape, dtype=torch.int32) for name, tensor in made.items()}
    for piece in found:
        rows = slice(piece.first_row, piece.first_row + rows_of(piece.value.shape))
        assert made[piece.name][rows].shape == piece.value.shape
        made[piece.name][rows] = piece.value
        times[piece.name][rows] += 1
    for name, tensor in zip(names, case.tensors, strict=True):
        assert equal(made[name], tensor) and (times[name] == 1).all(), name


@every_pack
@examples()
@given(data=st.data())
def test_pieces_of_all_ranks_are_the_tensors(pack, data):
    """For a parameter sharded over tensor ranks, and for an expert's, sharded over expert tensor ranks; the other size is arbitrary."""
    case, other, expert = data.draw(cases(pack)), data.draw(st.integers(1, 3)), data.draw(st.booleans())
    expert = expert and case.sizes.within == 1 and not isinstance(pack, packs.PerHead)  # attention has no experts
    sizes = (other, case.sizes.size) if expert else (case.sizes.size, other)
    layout = Layout(world=math.lcm(*sizes), layers=(1,), tensor=sizes[0], expert_tensor=sizes[1])
    pieces: list[Piece] = []
    shards: list[Tensor] = []
    for rank in range(layout.world):
        where = layout.coordinate(rank)
        if (where.expert_data if expert else where.data) != 0:
            continue
        number = where.expert_tensor if expert else where.tensor
        part, local = part_of(case, layout, rank, expert), named_of(case, number, 7 if expert else None)
        assert part.tensor_axis(local) == (number, case.sizes.size)
        assert part.part_shapes(local) == case.reference.tensors
        if pack.axis == 0:
            pieces.extend(save._rows(part, local, local.parameter.data))
        shards.append(local.parameter.data)
    assert len(shards) == case.sizes.size
    if pack.axis is None:
        pieces.extend(save._whole(part, local, shards[:1]))
    elif pack.axis != 0:
        pieces.extend(save._whole(part, local, shards))
    check_pieces(pieces, case, ".7" if expert else "")


def fixed_cases(size: int) -> list[Case]:
    """Every pack, as matrix and as vector, at fixed sizes that all differ."""
    found = []
    for number, (pack, (_, kinds)) in enumerate(REFERENCES.items()):
        for kind in kinds:
            sizes = Sizes(size, 2, 3, 2, 5 if kind == MATRIX else None, missing=1)
            found.append(make(pack, sizes, DTYPES[number % len(DTYPES)], number))
    return found


def saved_by_ranks(layout: Layout, expert: bool) -> int:
    """All cases as parameters of one model: every rank's pieces, from `pieces` with its groups, put together on every rank.

    Returns the number of pieces. The writing rank changes round-robin over replicas and ranks, so that each of them writes some.
    """
    groups = parallel_groups.init(layout)
    where, size = groups.coordinate, layout.expert_tensor if expert else layout.tensor
    rank = where.expert_tensor if expert else where.tensor
    found_cases, exported = fixed_cases(size), []
    if expert:
        found_cases = [case for case in found_cases if not isinstance(case.pack, packs.PerHead)]
    for number, case in enumerate(found_cases):
        local = named_of(case, rank, where.expert if expert else None)
        rule = replace(local.rule, parts=tuple(f"case{number}.{part}" for part in local.rule.parts))
        exported += [replace(local, rule=rule), replace(local, rule=rule, copy=True)]
    (vocab,) = (case for case in found_cases if case.pack.padded and case.sizes.columns is None)
    mine = [
        replace(piece, value=piece.value.clone())
        for piece in save.pieces(
            part_of(vocab, layout, groups.rank, expert), groups, exported, lambda local: local.parameter
        )
    ]
    everyone: list[list[Piece]] = [[] for _ in range(layout.world)]
    dist.all_gather_object(everyone, mine)
    parallel_groups.close()
    assert all(everyone), "a rank that writes nothing"
    by_case: dict[str, list[Piece]] = {}
    for piece in itertools.chain.from_iterable(everyone):
        number, _, name = piece.name.partition(".")
        suffix = f".{name.partition('.')[2]}" if expert else ""
        by_case.setdefault(number + suffix, []).append(replace(piece, name=name))
    for number, case in enumerate(found_cases):
        for suffix in [f".{e}" for e in range(layout.expert)] if expert else [""]:
            check_pieces(by_case.pop(f"case{number}{suffix}"), case, suffix)
    assert not by_case
    return sum(map(len, everyone))


@pytest.mark.parametrize(
    ("sizes", "expert"),
    [
        (dict(world=2, tensor=2), False),
        (dict(world=2, tensor=1, expert_tensor=2), False),
        (dict(world=2, tensor=1, expert_tensor=2), True),
        (dict(world=2, tensor=2, expert=2), True),
        (dict(world=3, tensor=3), False),
    ],
    ids=["tensor", "data", "expert-tensor", "expert", "tensor3"],
)
def test_ranks_write_every_tensor_once(ranks, sizes, expert):
    """The collective part: which rank gathers, and which replica writes."""
    layout = Layout(layers=(1,), **sizes)
    assert ranks(layout.world, saved_by_ranks, layout, expert) > len(fixed_cases(1))
