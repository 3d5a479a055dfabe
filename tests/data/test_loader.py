"""From settings to examples: what is truncated, what is dropped, and that all of it is counted."""

from dataclasses import replace

import pytest

from swift_mega.config.schema import Data
from swift_mega.data.loader import prepare
from swift_mega.errors import UserError

SHORT = {"query": "Hi", "response": "Yes"}
LONG = {"query": "Who are you? " * 20, "response": "I am an assistant. " * 10}


@pytest.fixture
def data(write) -> Data:
    return Data(dataset=(write(SHORT, LONG, {**SHORT, "id": 1}, {"text": "Hello there"}),), max_length=60)


def lengths(settings: Data, tokenizer: object) -> list[int]:
    return [len(example) for example in prepare(settings, tokenizer).train]


def test_counts_add_up(data, chatml):
    """Every row is an example or is counted as dropped. Tokens and trained tokens are those of the examples. The table shows them."""
    calls = []
    prepared = prepare(data, chatml, progress=lambda done, total: calls.append((done, total)))
    report = prepared.report.train
    assert (report.rows, report.conversations, report.documents, report.examples) == (4, 3, 1, 3)
    assert report.dropped == {"longer than max_length 60": 1}
    assert report.rows == report.examples + sum(report.dropped.values())
    assert report.tokens == sum(len(e) for e in prepared.train)
    assert report.targets == sum(e.targets for e in prepared.train)
    assert prepared.report.ignored == {"id": 1}
    assert calls == [(4, 4)]
    table = str(prepared.report)
    assert "dropped: longer than max_length 60" in table
    assert "unused column id" in table
    assert len({len(line) for line in table.splitlines()[:3]}) == 1


def test_rows_equal_to_a_trained_row_are_counted(write, chatml):
    """Copies of a row, in the split file or in another one, are reported: files are identified, rows are not."""
    first, copy = write(SHORT, LONG), write(LONG, {"text": "Yes"}, SHORT, name="copy.jsonl")
    report = prepare(Data(dataset=(first,), val_dataset=(copy,)), chatml).report
    assert report.validation.also_trained == 2
    assert [line.split()[-1] for line in str(report).splitlines() if "equal to a trained row" in line] == ["2"]
    assert "equal to a trained" not in str(prepare(Data(dataset=(first,)), chatml).report)


def test_truncation_right_and_left(data, chatml):
    """right keeps the first tokens and left the last ones. An example without trained tokens is dropped and counted."""
    full = prepare(replace(data, max_length=2000), chatml).train[1]
    left = prepare(replace(data, truncation="left"), chatml)
    assert left.train[1].tokens.tolist() == full.tokens[-60:].tolist()
    assert left.train[1].trained.tolist() == full.trained[-60:].tolist()
    assert left.report.train.truncated == 1
    right = prepare(replace(data, truncation="right"), chatml)
    assert right.report.train.dropped == {"no trained token (left)": 1}
    assert right.report.train.truncated == 1
    some = int(full.trained.argmax()) + 5
    kept = prepare(replace(data, truncation="right", max_length=some), chatml).train[1]
    assert kept.tokens.tolist() == full.tokens[:some].tolist()
    assert kept.targets == 5


def test_a_row_without_loss_is_dropped_and_counted(write, chatml):
    """loss: false on the only reply leaves no trained token."""
    silent = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": False}]}
    report = prepare(Data(dataset=(write(SHORT, silent),)), chatml).report.train
    assert report.dropped == {"no trained token (left)": 1}


def test_packing_is_reported(data, chatml):
    """The number of rows and how full they are."""
    prepared = prepare(replace(data, packing=True), chatml)
    report = prepared.report.train
    assert report.packed_rows == 1
    assert report.packing_efficiency == report.tokens / 60
    assert "packed rows of 60" in str(prepared.report)


def test_validation_is_prepared_alike(write, chatml):
    """Both splits are encoded, and the progress bar counts both."""
    calls = []
    settings = Data(dataset=(write(*[SHORT] * 8),), split_dataset_ratio=0.25)
    prepared = prepare(settings, chatml, progress=lambda done, total: calls.append((done, total)))
    assert (len(prepared.train), len(prepared.validation)) == (6, 2)
    assert calls == [(6, 8), (8, 8)]


def test_errors(data, write, chatml):
    """Too long under `raise`, a max_length of 0, and no rows left; each with its remedy."""
    with pytest.raises(UserError, match=r"rows.jsonl:2: \d+ tokens, more than data.max_length=60; raise it"):
        prepare(replace(data, truncation="raise"), chatml)
    with pytest.raises(UserError, match=r"data.max_length=1.*give at least 2"):
        prepare(replace(data, max_length=1), chatml)
    with pytest.raises(
        UserError, match=r"none of 4 rows can be used to train \(4 dropped: longer than max_length 2\); raise"
    ):
        prepare(replace(data, max_length=2), chatml)
    with pytest.raises(UserError, match=r"none of 1 rows can be used to validate.*raise data.max_length"):
        prepare(replace(data, val_dataset=(write(LONG, name="v.jsonl"),)), chatml)
