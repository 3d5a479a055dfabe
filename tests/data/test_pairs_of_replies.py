"""Columns that an objective reads: pairs of replies that stay together, packed or not, and numbers of an example."""

import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from swift_mega.config.schema import Data
from swift_mega.data.batches import Batches
from swift_mega.data.loader import Prepared, prepare
from swift_mega.errors import UserError

FIELDS = ("rejected_response", "margin")


def rows(path: Path, **changes: Any) -> Path:
    made = [
        {
            "query": "Q" * (1 + n % 3),
            "response": f"good {n}",
            "rejected_response": f"bad {n}" + " no" * (n % 4),
            "margin": n / 4,
        }
        for n in range(12)
    ]
    made[5] |= changes
    path.write_text("\n".join(map(json.dumps, made)))
    return path


def prepared(path: Path, fields: tuple[str, ...] = FIELDS, **settings: Any) -> tuple[Prepared, Any]:
    words = tiny.tokenizer(tiny.CHATML, "<|im_start|>", "<|im_end|>")
    return prepare(Data(dataset=(str(path),), **settings), words, fields=fields), words


def test_a_row_is_two_examples(tmp_path: Path) -> None:
    found, words = prepared(rows(tmp_path / "rows.jsonl"))
    assert len(found.train) == 24 and found.report.train.rows == 12
    for n, (good, bad) in enumerate(zip(found.train[0::2], found.train[1::2], strict=True)):
        texts = [words.decode(example.tokens[example.trained]) for example in (good, bad)]
        assert texts[0].startswith(f"good {n}") and texts[1].startswith(f"bad {n}" + " no" * (n % 4))
        assert dict(good.numbers) == dict(bad.numbers) == {"margin": n / 4}


@pytest.mark.parametrize("packing", [False, True])
def test_pairs_stay_in_one_microbatch(packing: bool, tmp_path: Path) -> None:
    """In their order, on two data ranks and over an epoch; a row of padding alone has the same columns."""
    path = rows(tmp_path / "rows.jsonl")
    found, _ = prepared(path, max_length=160, packing=packing)
    pairs = {
        (good.tokens.tobytes(), bad.tokens.tobytes()): good.numbers["margin"]
        for good, bad in zip(found.train[0::2], found.train[1::2], strict=True)
    }
    seen = []
    for rank in range(2):
        batches = Batches(found.train, settings=Data(max_length=160, packing=packing), micro_batch_size=1, global_batch_size=4,
                          data_rank=rank, data_size=2, epochs=1.0, together=2, pad_to=8)  # fmt: skip
        assert packing == (batches.units < len(pairs))
        for step in range(batches.steps):
            for row in batches.batch(step):
                ends = zip(row.cu_seqlens.tolist(), row.lengths.tolist(), strict=False)
                examples = [row.tokens[start : start + n].int().numpy().tobytes() for start, n in ends if n]
                assert len(examples) == row.examples == len(row.numbers["margin"]) and row.examples % 2 == 0
                mine = list(zip(examples[0::2], examples[1::2], strict=True))
                assert [pairs[pair] for pair in mine] == row.numbers["margin"][0::2].tolist()
                seen += mine
    assert sorted(seen) == sorted(pairs)


def test_a_pair_is_dropped_and_counted_once(tmp_path: Path) -> None:
    found, _ = prepared(
        rows(tmp_path / "rows.jsonl", response="x " * 200, rejected_response="y " * 200), max_length=128
    )
    assert len(found.train) == 22 and found.report.train.dropped.total() == 1
    longest = max(len(a) + len(b) for a, b in zip(found.train[0::2], found.train[1::2], strict=True))
    packed, _ = prepared(rows(tmp_path / "rows.jsonl"), max_length=longest - 1, packing=True)
    assert packed.report.train.dropped[f"pair longer than a packed row of {longest - 1}"] > 0
    assert len(packed.train) == 2 * (12 - packed.report.train.dropped.total())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rejected_response": ""}, "rows.jsonl:6: column 'rejected_response' is missing or empty, and the objective needs it"),
        ({"margin": "much"}, r"rows.jsonl:6: column 'margin' is a string \('much'\); write a number"),
        ({"margin": None}, "rows.jsonl:6: column 'margin' is missing or empty"),
    ],
)  # fmt: skip
def test_what_a_row_lacks(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        prepared(rows(tmp_path / "rows.jsonl", **changes))


def test_text_has_no_second_reply(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "plain", "rejected_response": "no"}))
    with pytest.raises(UserError, match="is a second reply, and plain text has no first"):
        prepared(path, ("rejected_response",))
