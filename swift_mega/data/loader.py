"""From data settings to examples: read, tokenise, truncate or drop, count.

Every loss is counted: an example that is too long, or has no trained token left, appears in the report.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from swift_mega.config.schema import Data
from swift_mega.data.batches import Batches
from swift_mega.data.chat import Encoder
from swift_mega.data.ends import Ends
from swift_mega.data.formats import Row
from swift_mega.data.pack import Example, rounded_up
from swift_mega.data.report import Report, SplitReport
from swift_mega.data.sources import load
from swift_mega.errors import UserError
from swift_mega.export.companions import UNCHANGED, Trained

Progress = Callable[[int, int], None]
"""Called with (rows done, all rows) while rows are tokenised."""

_CHUNK = 512
"""Rows tokenised at once: enough to keep the tokenizer's threads busy, few enough for a smooth progress bar."""
_NO_LOSS = "no trained token (left)"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Examples of both splits, and the report on the rows that were read."""

    train: list[Example]
    validation: list[Example]
    report: Report
    trained: Trained = UNCHANGED
    """What checkpoints store beside the weights because of this data: chat template and end tokens."""
    ends: Ends | None = None
    """How the replies of both splits end."""
    modes: Mapping[str, int] = field(default_factory=dict)
    """Number of replies that follow a generation prompt other than the default, by the template's setting that gives this prompt."""


def prepare(
    settings: Data,
    tokenizer: Any,
    *,
    progress: Progress | None = None,
    pad_each: int = 1,
    vocab: int | None = None,
    before: Trained = UNCHANGED,
    fields: Sequence[str] = (),
) -> Prepared:
    """All examples of a run, the same on every rank, in the order of the files.

    tokenizer: a fast transformers tokenizer (`chat.load_tokenizer`). pad_each: tokens; examples in packed rows are padded to a multiple.
    vocab: number of embeddings in the model; every token id has to be below it. None: not checked.
    before: how the adapter was trained that this run continues; its template stays in use unless the settings name another.
    fields: columns that the run's objective reads beside the conversation (`formats.to_row`). With rejected_response every row gives two
    examples, one after the other: with the preferred reply, and with the rejected one.
    Raises UserError where rows, template and settings do not fit together, or no example is left to train on.
    """
    if settings.max_length < 2:
        raise UserError(
            f"data.max_length={settings.max_length}: a trained token and the one before it need 2; give at least 2"
        )
    rows = load(settings, fields)
    encoder = Encoder(
        tokenizer,
        chat_template=settings.chat_template,
        template=before.chat_template,
        loss_on=settings.loss_on,
        vocab=vocab,
    )
    total = len(rows.train) + len(rows.validation)
    train, train_report = _encode(rows.train, settings, encoder, progress, 0, total, pad_each)
    validation, validation_report = _encode(
        rows.validation, settings, encoder, progress, len(rows.train), total, pad_each
    )
    trained = {(row.turns, row.text) for row in rows.train}
    validation_report.also_trained = sum((row.turns, row.text) in trained for row in rows.validation)
    report = Report(train=train_report, validation=validation_report, ignored=rows.ignored)
    for name, given, kept in (("train", rows.train, train), ("validate", rows.validation, validation)):
        if not kept and (given or name == "train"):
            reasons = train_report.dropped if name == "train" else validation_report.dropped
            why = ", ".join(f"{count} dropped: {reason}" for reason, count in reasons.items()) or "no row was kept"
            raise UserError(
                f"none of {len(given)} rows can be used to {name} ({why}); raise data.max_length={settings.max_length}, or "
                f"choose another data.truncation than {settings.truncation}"
            )
    ends = encoder.ends.tokens
    if settings.loss_on == "all" and train_report.conversations:
        ends = encoder.end_of_turn()
    beside = Trained(chat_template=encoder.new_template, end_tokens=tuple(dict.fromkeys([*ends, *before.end_tokens])))
    return Prepared(
        train=train, validation=validation, report=report, trained=beside, ends=encoder.ends, modes=dict(encoder.modes)
    )


def _encode(
    rows: Sequence[Row],
    settings: Data,
    encoder: Encoder,
    progress: Progress | None,
    done: int,
    total: int,
    pad_each: int,
) -> tuple[list[Example], SplitReport]:
    documents = sum(row.text is not None for row in rows)
    report = SplitReport(conversations=len(rows) - documents, documents=documents, max_length=settings.max_length)
    examples: list[Example] = []
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        encoded = iter(encoder.encode([version for row in chunk for version in _versions(row)]))
        for row in chunk:
            versions, kept = [next(encoded) for _ in _versions(row)], list[Example]()
            # A row is dropped, and counted, once.
            while (
                len(kept) < len(versions) and (fitted := _fit(versions[len(kept)], row, settings, report)) is not None
            ):
                kept.append(replace(fitted, numbers=dict(row.numbers)) if row.numbers else fitted)
            if len(kept) == len(versions) and _pair_fits(kept, settings, report, pad_each):
                examples += kept
        if progress is not None:
            progress(done + start + len(chunk), total)
    report.examples = len(examples)
    report.tokens = sum(len(example) for example in examples)
    report.targets = sum(example.targets for example in examples)
    report.longest = max((len(example) for example in examples), default=0)
    if settings.packing and examples:
        report.packed_rows = Batches(
            examples,
            settings=settings,
            micro_batch_size=1,
            global_batch_size=1,
            pad_each=pad_each,
            together=len(_versions(rows[0])),
        ).units
    return examples, report


def _versions(row: Row) -> tuple[Row, ...]:
    """The conversations of a row: itself, and with a rejected reply also the one that ends with it."""
    if row.rejected is None:
        return (row,)
    return row, replace(row, turns=(*row.turns[:-1], replace(row.turns[-1], content=row.rejected)))


def _pair_fits(pair: Sequence[Example], settings: Data, report: SplitReport, pad_each: int) -> bool:
    """Whether examples that stay together fit into a packed row; counted as dropped where they do not."""
    if len(pair) < 2 or not settings.packing:
        return True
    fits = sum(rounded_up(len(example), pad_each) for example in pair) <= rounded_up(settings.max_length, pad_each)
    if not fits:
        report.dropped[f"pair longer than a packed row of {settings.max_length}"] += 1
    return bool(fits)


def _fit(example: Example, row: Row, settings: Data, report: SplitReport) -> Example | None:
    """The example, truncated to max_length if needed; None where it is dropped. Truncated and dropped rows are counted."""
    limit = settings.max_length
    if len(example) > limit:
        if settings.truncation == "raise":
            raise UserError(
                f"{row.where}: {len(example)} tokens, more than data.max_length={limit}; raise it, or set data.truncation to "
                "delete, left or right"
            )
        if settings.truncation == "delete":
            report.dropped[f"longer than max_length {limit}"] += 1
            return None
        report.truncated += 1
        cut = slice(-limit, None) if settings.truncation == "left" else slice(limit)
        example = replace(example, tokens=example.tokens[cut].copy(), trained=example.trained[cut].copy())
    if example.targets == 0:
        report.dropped[_NO_LOSS] += 1
        return None
    return example
