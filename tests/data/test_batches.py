"""Batches are a function of (seed, step), are the same for any number of data ranks, and lose no example."""

from collections import Counter

import numpy as np
import pytest

from swift_mega.config.schema import Data
from swift_mega.data.batches import Batches
from swift_mega.data.pack import Example, Microbatch, padding_row
from swift_mega.errors import UserError


def examples(number: int) -> list[Example]:
    """Example i is the token i, i + 2 times, so the tokens of a microbatch say which examples it has."""
    return [
        Example(tokens=np.full(i + 2, i, dtype=np.int32), trained=np.ones(i + 2, dtype=bool)) for i in range(number)
    ]


def held(row: Microbatch) -> list[int]:
    return row.tokens[row.cu_seqlens[:-1].long()][row.lengths > 0].tolist()


def make(
    number: int,
    micro: int,
    total: int,
    *,
    rank: int = 0,
    size: int = 1,
    once: bool = False,
    epochs: float | None = None,
    group: int = 1,
    **settings: object,
) -> Batches:
    data = Data(**settings)  # type: ignore[arg-type]
    return Batches(
        examples(number),
        settings=data,
        micro_batch_size=micro,
        global_batch_size=total,
        data_rank=rank,
        data_size=size,
        once=once,
        epochs=epochs,
        group=group,
    )


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("step", [0, 1, 5])
def test_the_same_microbatches_for_any_number_of_ranks(packing, step):
    """The union over 1, 2 and 4 ranks is the same set of microbatches, and all ranks have equally many."""
    unions = []
    for size in (1, 2, 4):
        ranks = [
            make(21, 2, 16, rank=rank, size=size, packing=packing, max_length=40).batch(step) for rank in range(size)
        ]
        assert {len(rows) for rows in ranks} == {8 // size}
        unions.append(sorted(held(row) for rows in ranks for row in rows))
    assert unions[0] == unions[1] == unions[2]


def test_nothing_is_lost_or_doubled_over_epochs():
    """Over whole epochs every example is seen equally often, also in batches that span two epochs. Each epoch has its own order."""
    batches = make(10, 1, 4)
    seen = [index for step in range(5) for row in batches.batch(step) for index in held(row)]
    assert Counter(seen) == dict.fromkeys(range(10), 2)
    assert sorted(seen[:10]) == list(range(10)) and seen[:10] != seen[10:]
    assert batches.passes(5) == 2


EPOCHS = [
    # units, micro, batch, ranks, group, epochs -> units of each step, microbatches of a rank in the last
    (7, 1, 16, 1, 1, 1.0, [7], 7),
    (7, 1, 16, 4, 1, 1.0, [7], 2),
    (7, 2, 16, 4, 1, 1.0, [7], 1),
    (9, 4, 8, 2, 1, 1.0, [8, 1], 1),
    (9, 1, 8, 2, 2, 1.0, [8, 1], 2),
    (10, 1, 4, 2, 1, 2.0, [4, 4, 4, 4, 4], 2),
    (10, 1, 8, 2, 1, 3.0, [8, 8, 8, 6], 3),
    (5, 1, 2, 1, 1, 1.0, [2, 2, 1], 1),
    (10, 1, 4, 1, 1, 0.5, [4, 1], 1),
    (30, 1, 3, 1, 1, 0.1, [3], 3),
    (10, 1, 4, 1, 1, 1.25, [4, 4, 4, 1], 1),
    (5, 1, 4, 1, 1, 0.001, [1], 1),
]


@pytest.mark.parametrize(("units", "micro", "total", "size", "group", "epochs", "steps", "last"), EPOCHS)
def test_epochs_see_each_example_that_often(units, micro, total, size, group, epochs, steps, last):
    """Every example is seen ⌊epochs⌋ times or once more, exactly. Ranks have equally many microbatches. Only the last step is short."""
    ranks = [make(units, micro, total, rank=r, size=size, group=group, epochs=epochs) for r in range(size)]
    assert {batches.steps for batches in ranks} == {len(steps)}
    seen: Counter[int] = Counter()
    for step, wanted in enumerate(steps):
        rows = [batches.batch(step) for batches in ranks]
        now = [index for of_rank in rows for row in of_rank for index in held(row)]
        seen.update(now)
        full = total // (micro * size) if step < len(steps) - 1 else last
        assert (len(now), {len(of_rank) for of_rank in rows}) == (wanted, {full})
        assert sum(row.targets for of_rank in rows for row in of_rank) == sum(index + 1 for index in now)
    whole, rest = divmod(round(units * epochs + 0.4999), units)
    assert sorted(Counter(seen[index] for index in range(units)).items()) == sorted(
        (times, number) for times, number in ((whole, units - rest), (whole + 1, rest)) if number
    )


def test_an_epoch_of_packed_rows():
    """With packing, units are rows: every example is seen once, and the last step has fewer rows."""
    batches = make(9, 1, 3, epochs=1.0, packing=True, max_length=14)
    rows = [row for step in range(batches.steps) for row in batches.batch(step)]
    assert sorted(index for row in rows for index in held(row)) == list(range(9))
    assert len(rows) == batches.units == 4 and batches.steps == 2 and len(batches.batch(1)) == 1


def test_any_step_on_its_own_equals_the_run():
    """Resume: step 7 asked for first equals step 7 of the run, and earlier steps can be asked for later."""
    run = make(10, 2, 4)
    rows = [[held(row) for row in run.batch(step)] for step in range(12)]
    assert [held(row) for row in make(10, 2, 4).batch(7)] == rows[7]
    assert [held(row) for row in run.batch(2)] == rows[2]
    assert [[held(row) for row in make(10, 2, 4, seed=1).batch(0)]] != rows[:1]


def test_fewer_examples_than_a_batch_come_around_again():
    """3 examples are repeated to fill a batch of 8; the number of repetitions is counted."""
    batches = make(3, 1, 8)
    seen = Counter(index for row in batches.batch(0) for index in held(row))
    assert sorted(seen.values()) == [2, 3, 3]
    assert batches.passes(1) == 8 / 3


def test_without_shuffle_the_order_is_that_of_the_files():
    """data.shuffle=false keeps the order in each epoch."""
    batches = make(4, 1, 2, shuffle=False)
    assert [held(row) for step in range(4) for row in batches.batch(step)] == [[0], [1], [2], [3]] * 2


@pytest.mark.parametrize("size", [1, 2])
def test_validation_counts_each_example_once(size):
    """once: the targets of all steps are those of the examples. A rank without an example gets a row of padding."""
    every = [make(5, 1, 4, rank=rank, size=size, once=True) for rank in range(size)]
    assert every[0].steps == 2
    rows = [row for batches in every for step in range(2) for row in batches.batch(step)]
    assert len(rows) == 4 + size
    assert sorted(index for row in rows for index in held(row)) == [0, 1, 2, 3, 4]
    assert sum(row.targets for row in rows) == sum(e.targets for e in examples(5))


def test_padding_and_packing():
    """Rows are padded to the multiple. Packed rows have whole examples, up to max_length tokens."""
    batches = Batches(
        examples(6), settings=Data(packing=True, max_length=14), micro_batch_size=1, global_batch_size=1, pad_to=8
    )
    assert batches.units == 2
    rows = [batches.batch(step)[0] for step in range(2)]
    assert [len(row.tokens) for row in rows] == [16, 16]
    assert sorted(index for row in rows for index in held(row)) == [0, 1, 2, 3, 4, 5]


def test_examples_that_are_padded_one_by_one():
    """Rows of at most 12 tokens, after examples of 2 to 7 tokens were padded to 4 or 8: no example and no token is lost."""
    batches = Batches(
        examples(6),
        settings=Data(packing=True, max_length=10),
        micro_batch_size=1,
        global_batch_size=1,
        pad_to=8,
        pad_each=4,
        pad_token=99,
        once=True,
    )
    rows = [row for step in range(batches.steps) for row in batches.batch(step)]
    assert all(
        len(row.tokens) % 8 == 0 and max(row.cu_seqlens[len(row.lengths[row.lengths > 0])], 0) <= 12 for row in rows
    )
    assert all((row.cu_seqlens % 4 == 0).all() for row in rows)
    seen = Counter(token for row in rows for token in row.tokens.tolist() if token != 99)
    assert seen == {number: number + 2 for number in range(6)}
    assert sum(row.targets for row in rows) == sum(number + 1 for number in range(6))


def test_a_row_of_padding_is_as_short_as_can_be():
    """It has no label and no example; its length is the ranks' multiple of tokens, and its tokens are the pad token."""
    for pad_to, length in ((1, 2), (2, 2), (8, 8)):
        row = padding_row(pad_to, pad_token=7)
        assert row.tokens.tolist() == [7] * length and row.positions.tolist() == [0] * length
        assert (row.targets, row.lengths.tolist(), row.cu_seqlens.tolist()) == (0, [0], [0, length])


def test_sizes_that_do_not_divide():
    """One error that names the nearest sizes."""
    with pytest.raises(
        UserError, match=r"global_batch_size=10 .*micro_batch_size=2 times 4 .*\(8\); set it to 8 or 16"
    ):
        make(4, 2, 10, size=4)
    with pytest.raises(UserError, match=r"global_batch_size=3 .*set it to 8"):
        make(4, 2, 3, size=4)
    with pytest.raises(UserError, match=r"micro_batch_size=0.*at least 1"):
        make(4, 0, 3)
    with pytest.raises(UserError, match=r"data\.dataset has no examples"):
        make(0, 1, 1)
