"""From the names in data.dataset to rows: which files, which of their rows, and which of those are validation.

Everything that chooses (samples, splits) goes by a hash of (seed, index), so a choice depends on nothing but the file
and the seed. `path#N` takes N rows as SWIFT does: a sample in file order, or, beyond the length of the file, whole
repetitions and a sample of the rest. The validation split is taken first, so no repeated row lands on both sides.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from swift_mega.config.schema import Data
from swift_mega.data.dataset_info import File, find
from swift_mega.data.formats import COLUMNS, Row, Turn, kind, to_row
from swift_mega.data.shuffle import shuffled
from swift_mega.errors import UserError

_PLACEHOLDER = re.compile(r"\{\{(NAME|AUTHOR)\}\}")
_SPLIT, _SAMPLE = 1, 2
"""Streams of the hash, so that a sample and a split of one file are independent."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a run. ignored: column -> number of rows that had it."""

    train: list[Row]
    validation: list[Row]
    ignored: dict[str, int] = field(default_factory=dict)


def load(settings: Data) -> Rows:
    """Reads, samples and splits every data set of `settings`; placeholders and the default system are filled in.

    Raises UserError (file:line, what was found, what would work) for anything unusable.
    """
    if not settings.dataset:
        raise UserError("data.dataset is empty: nothing to train on; name at least one JSONL file")
    ratio = settings.split_dataset_ratio
    if not 0 <= ratio < 1:
        raise UserError(f"data.split_dataset_ratio={ratio}: a share of the rows; give at least 0 and less than 1")
    if ratio and settings.val_dataset:
        raise UserError(
            f"data.split_dataset_ratio={ratio} and data.val_dataset are both set: the validation rows come from one of "
            "them; unset the other"
        )
    ignored: Counter[str] = Counter()
    train: list[Row] = []
    validation: list[Row] = []
    for number, name in enumerate(settings.dataset):
        kept, held = _read_set(name, settings, ratio=ratio, stream=number, ignored=ignored)
        train += kept
        validation += held
    for number, name in enumerate(settings.val_dataset):
        validation += _read_set(name, settings, ratio=0.0, stream=-1 - number, ignored=ignored)[0]
    if ratio and not (train and validation):
        raise UserError(
            f"data.split_dataset_ratio={ratio} of {len(train) + len(validation)} rows leaves {len(train)} to train and "
            f"{len(validation)} to validate; choose a ratio that leaves at least one of each"
        )
    rows = Rows(train=train, validation=validation, ignored=dict(ignored))
    return _fill(rows, settings)


def _read_set(
    name: str, settings: Data, *, ratio: float, stream: int, ignored: Counter[str]
) -> tuple[list[Row], list[Row]]:
    file = find(name, settings)
    records = list(read_records(file.path))
    for column in file.columns:
        if not any(column in record for _, record in records):
            found = sorted({key for _, record in records[:100] for key in record})
            raise UserError(
                f"{file.path}: data.columns maps {column!r}, which no row has; its columns are {', '.join(found)}"
            )
    train, held = _choose(len(records), file.rows, ratio=ratio, key=(settings.seed, stream % 2**32))
    rows: dict[int, Row] = {}
    for index in sorted({*train, *held}):
        where, record = records[index]
        rows[index] = to_row(_rename(record, file, where), where=where, ignored=ignored, tags=file.tags)
    return [rows[index] for index in train], [rows[index] for index in held]


def _choose(length: int, wanted: int | None, *, ratio: float, key: tuple[int, int]) -> tuple[list[int], list[int]]:
    """Indices to train on and to validate on, out of `length` rows of which `wanted` are asked for."""
    if wanted is None:
        wanted = length
    base = np.sort(shuffled(length, *key, _SAMPLE)[:wanted])
    held = np.sort(base[shuffled(len(base), *key, _SPLIT)[: int(len(base) * ratio + 0.5)]])
    train = base[~np.isin(base, held)]
    times, rest = divmod(wanted - len(held), len(train)) if len(train) else (0, 0)
    extra = np.sort(train[shuffled(len(train), *key, _SAMPLE)[:rest]])
    return [*np.tile(train, times).tolist(), *extra.tolist()], held.tolist()


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line or file[index], object) of each row of a .jsonl file, or of a .json file that holds a list."""
    if path.is_dir():
        inside = ", ".join(sorted(p.name for p in path.glob("*.json*"))[:5]) or "no .jsonl file"
        raise UserError(f"data set {path} is a directory (with {inside}); name the files in it")
    if not path.is_file():
        near = ", ".join(sorted(p.name for p in path.parent.glob("*.json*"))[:5]) if path.parent.is_dir() else ""
        raise UserError(
            f"data set {path} does not exist{f'; beside it are {near}' if near else ''}: give the path of a .jsonl file, or a "
            "name of data.dataset_info"
        )
    if path.suffix not in (".jsonl", ".json"):
        raise UserError(f"data set {path}: files of kind {path.suffix or 'none'!r} are not read; convert it to .jsonl")
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"data set {path} cannot be read: {error.strerror}; check its permissions") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.start} is not UTF-8 ({error.reason}); convert the file to UTF-8"
        ) from error
    if not content.strip():
        raise UserError(f"{path} is empty; write one JSON object per line")
    if path.suffix == ".json" and content.lstrip().startswith("["):
        yield from _read_list(path, content)
    else:
        yield from _read_lines(path, content)


def _read_lines(path: Path, content: str) -> Iterator[tuple[str, dict[str, Any]]]:
    # Only \n ends a row: str.splitlines would also cut at U+2028, which JSON strings may hold.
    for number, line in enumerate(content.rstrip().split("\n"), 1):
        where = f"{path}:{number}"
        if not line.strip():
            raise UserError(f"{where}: an empty line between rows; remove it (a row may be missing)")
        yield where, _object(_parse(line, where), where)


def _read_list(path: Path, content: str) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = _parse(content, str(path))
    if not rows:
        raise UserError(f"{path} holds an empty list; write at least one row")
    for index, row in enumerate(rows):
        where = f"{path}[{index}]"
        yield where, _object(row, where)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        around = text[max(0, error.pos - 20) : error.pos + 20]
        raise UserError(
            f"{where}: not valid JSON at character {error.pos + 1} ({error.msg}), near {around!r}; write one complete JSON "
            "object per line"
        ) from error
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise UserError(f"key {twice!r} occurs twice in one object, and only one could be used; remove the other")
    return found


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row is {kind(row)}; write a JSON object with named columns")
    return row


def _rename(record: dict[str, Any], file: File, where: str) -> dict[str, Any]:
    renamed = dict(record)
    for source, target in file.columns.items():
        if target not in COLUMNS:
            raise UserError(
                f"data.columns maps {source!r} to {target!r}, which is no column of ours; choose among {', '.join(COLUMNS)}"
            )
        if source not in record or source == target:
            continue
        if target in record and target not in file.columns:
            raise UserError(
                f"{where}: data.columns maps {source!r} to {target!r}, but the row has a column {target!r} already; map that "
                "one elsewhere or drop it"
            )
        if renamed.get(source) is record[source]:
            del renamed[source]
        renamed[target] = record[source]
    return renamed


def _fill(rows: Rows, settings: Data) -> Rows:
    """Placeholders and the default system message. Text rows are documents, and stay as they are."""
    values = {"NAME": settings.model_name, "AUTHOR": settings.model_author}
    option = {"NAME": "data.model_name", "AUTHOR": "data.model_author"}
    used: set[str] = set()

    def fill_turn(turn: Turn, where: str) -> Turn:
        names = set(_PLACEHOLDER.findall(turn.content))
        for name in names:
            if values[name] is None:
                raise UserError(
                    f"{where}: the row holds {{{{{name}}}}}, and {option[name]} is not set; set it to what it stands for"
                )
        used.update(names)
        return (
            replace(turn, content=_PLACEHOLDER.sub(lambda found: values[found[1]] or "", turn.content))
            if names
            else turn
        )

    def fill_row(row: Row) -> Row:
        if row.text is not None:
            return row
        turns = row.turns
        if settings.system and turns[0].role != "system":
            turns = (Turn(role="system", content=settings.system), *turns)
        return replace(row, turns=tuple(fill_turn(turn, row.where) for turn in turns))

    filled = Rows(
        train=[fill_row(row) for row in rows.train],
        validation=[fill_row(row) for row in rows.validation],
        ignored=rows.ignored,
    )
    for name, value in values.items():
        if value is not None and name not in used:
            raise UserError(
                f"{option[name]}={value!r} is set, but no row holds {{{{{name}}}}}; unset it, or check the data set"
            )
    return filled
