"""From the names in data.dataset to data rows: which files, which of their rows, and which rows are for validation.

Samples and splits are chosen by a hash of (seed, index), so a choice depends only on the file and the seed. `path#N` takes N rows as
SWIFT does: a sample in file order; where N is larger than the file, all rows several times and a sample of the rest. Validation rows
are chosen once for each file on disk (device and inode), even if data.dataset names it several times. So no row is in both splits.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swift_mega.config.schema import Data
from swift_mega.data.dataset_info import File, find
from swift_mega.data.formats import COLUMNS, Reply, Row, Tags, Turn, kind, to_row
from swift_mega.data.shuffle import shuffled
from swift_mega.errors import UserError
from swift_mega.text_files import parse_json, read_text

_PLACEHOLDER = re.compile(r"\{\{(NAME|AUTHOR)\}\}")
_SPLIT, _SAMPLE = 1, 2
"""Streams of the hash: a sample and a split of one file are independent."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a run. ignored: column -> number of rows that had it."""

    train: list[Row]
    validation: list[Row]
    ignored: dict[str, int] = field(default_factory=dict)


def load(settings: Data, fields: Sequence[str] = ()) -> Rows:
    """Reads, samples and splits every data set of `settings`; fills in placeholders and the default system message.

    fields: columns that the run's objective reads beside the conversation (`formats.to_row`).

    Raises UserError (file:line, what was found, what would work) for data that cannot be used.
    """
    if not settings.dataset:
        raise UserError("data.dataset is empty: nothing to train on; name at least one JSONL file")
    ratio = settings.split_dataset_ratio
    if not 0 <= ratio < 1:
        raise UserError(f"data.split_dataset_ratio={ratio}: expected a fraction of the rows, at least 0 and below 1")
    if ratio and settings.val_dataset:
        raise UserError(
            f"data.split_dataset_ratio={ratio} and data.val_dataset are both set: the validation rows come from one of "
            "them; unset the other"
        )
    ignored: Counter[str] = Counter()
    sets = [_open_set(name, settings, fields) for name in settings.dataset]
    held = _held(sets, ratio, settings.seed)
    train: list[Row] = []
    validation: list[Row] = []
    for number, one in enumerate(sets):
        chosen, length = held[one.identity], len(one.records)
        train += one.rows(_train(length, one.file.rows, chosen, ratio=ratio, key=(settings.seed, number)), ignored)
        if not any(one.reads_as(before) for before in sets[:number]):
            validation += one.rows(chosen.tolist(), ignored)
    validation += _validation_sets(settings, sets, ignored, fields)
    if ratio and not (train and validation):
        raise UserError(
            f"data.split_dataset_ratio={ratio} of {len(train) + len(validation)} rows leaves {len(train)} to train and "
            f"{len(validation)} to validate; choose a ratio that leaves at least one of each"
        )
    rows = Rows(train=train, validation=validation, ignored=dict(ignored))
    return _fill(rows, settings)


def load_questions(name: str, settings: Data, *, reply: Reply) -> list[tuple[dict[str, Any], Row]]:
    """(record of the file, its row) for each row of one data set, read as for training, in file order.

    reply: whether the last reply of a row is required, optional or dropped. Raises UserError as `load` does.
    """
    one = _open_set(name, settings)
    key, nothing = (settings.seed, 0), np.zeros(0, dtype=np.int64)
    chosen = _train(len(one.records), one.file.rows, nothing, ratio=0.0, key=key)
    rows = Rows(train=one.rows(chosen, Counter(), reply=reply), validation=[])
    return list(zip((one.records[index][1] for index in chosen), _fill(rows, settings).train, strict=True))


@dataclass(frozen=True, kw_only=True)
class _Set:
    """One entry of data.dataset with its records. identity: (device, inode), the same for all names of one file."""

    name: str
    file: File
    records: list[tuple[str, dict[str, Any]]]
    identity: tuple[int, int]
    fields: tuple[str, ...] = ()
    """Columns that the run's objective reads."""

    def reads_as(self, other: "_Set") -> bool:
        """Whether `other` reads the same file into the same rows."""
        mine, theirs = ((dict(one.file.columns), one.file.tags or Tags()) for one in (self, other))
        return self.identity == other.identity and mine == theirs

    def rows(self, indices: list[int], ignored: Counter[str], *, reply: Reply = "required") -> list[Row]:
        """The rows at `indices`. An index that occurs several times is read and counted once."""
        made = {index: self._row(index, ignored, reply) for index in sorted(set(indices))}
        return [made[index] for index in indices]

    def _row(self, index: int, ignored: Counter[str], reply: Reply) -> Row:
        where, record = self.records[index]
        unused: Counter[str] = Counter()
        row = to_row(
            _rename(record, self.file, where),
            where=where,
            ignored=unused,
            tags=self.file.tags,
            reply=reply,
            fields=self.fields,
        )
        for source, target in self.file.columns.items():
            # A column with one of our own names may be mapped to an unused name, to make room for another column.
            if target in unused and source in record and source not in COLUMNS:
                raise UserError(
                    f"{where}: data.columns maps {source!r} to {target!r}, which is not used beside the row's other columns "
                    f"({', '.join(sorted(record))}); map it elsewhere, or map or remove those"
                )
        ignored.update(unused)
        return row


def _open_set(name: str, settings: Data, fields: Sequence[str] = ()) -> _Set:
    file = find(name, settings)
    _check_columns(file, fields)
    records = list(read_records(file.path))
    for column in file.columns:
        if not any(column in record for _, record in records):
            found = sorted({key for _, record in records[:100] for key in record})
            raise UserError(
                f"{file.path}: data.columns maps {column!r}, which no row has; its columns are {', '.join(found)}"
            )
    status = file.path.stat()
    return _Set(name=name, file=file, records=records, identity=(status.st_dev, status.st_ino), fields=tuple(fields))


def _check_columns(file: File, fields: Sequence[str]) -> None:
    """UserError where data.columns maps to a name that is not read, or maps two columns to one name: only one of them could be kept."""
    first: dict[str, str] = {}
    for source, target in file.columns.items():
        if target not in (*COLUMNS, *fields):
            raise UserError(
                f"data.columns maps {source!r} to {target!r}, which is not a known column; choose among "
                f"{', '.join((*COLUMNS, *fields))}"
            )
        if target in first:
            raise UserError(
                f"{file.path}: data.columns maps {first[target]!r} and {source!r} both to {target!r}, and only one of them could "
                "be read; map one of them elsewhere"
            )
        first[target] = source


def _validation_sets(settings: Data, trained: list[_Set], ignored: Counter[str], fields: Sequence[str]) -> list[Row]:
    """All rows of data.val_dataset; UserError for a file that is also in data.dataset."""
    names = {one.identity: one.name for one in trained}
    rows: list[Row] = []
    for number, name in enumerate(settings.val_dataset):
        one = _open_set(name, settings, fields)
        if one.identity in names:
            raise UserError(
                f"data.val_dataset={name} is the file of data.dataset={names[one.identity]}: its rows would be trained and "
                "validated on; name another file, or remove it and set data.split_dataset_ratio"
            )
        nothing = np.zeros(0, dtype=np.int64)
        key = (settings.seed, (-1 - number) % 2**32)
        rows += one.rows(_train(len(one.records), one.file.rows, nothing, ratio=0.0, key=key), ignored)
    return rows


def _held(sets: list[_Set], ratio: float, seed: int) -> dict[tuple[int, int], NDArray[np.int64]]:
    """Indices of the validation rows of each file (key: identity): the share `ratio` of the largest number of rows that a name takes."""
    held: dict[tuple[int, int], NDArray[np.int64]] = {}
    for number, one in enumerate(sets):
        if one.identity not in held:
            length = len(one.records)
            most = max(other.file.rows or length for other in sets if other.identity == one.identity)
            base = np.sort(shuffled(length, seed, number, _SAMPLE)[:most])
            held[one.identity] = np.sort(base[shuffled(len(base), seed, number, _SPLIT)[: _share(len(base), ratio)]])
    return held


def _share(rows: int, ratio: float) -> int:
    return int(rows * ratio + 0.5)


def _train(
    length: int, wanted: int | None, held: NDArray[np.int64], *, ratio: float, key: tuple[int, int]
) -> list[int]:
    """Indices of the training rows. length: rows of the file. wanted: rows to take. held: indices of its validation rows."""
    wanted = wanted or length
    distinct = min(wanted, length)
    share = _share(distinct, ratio)
    order = shuffled(length, *key, _SAMPLE)
    train = np.sort(order[~np.isin(order, held)][: distinct - share])
    times, rest = divmod(wanted - share, len(train)) if len(train) else (0, 0)
    extra = np.sort(train[shuffled(len(train), *key, _SAMPLE)[:rest]])
    return [*np.tile(train, times).tolist(), *extra.tolist()]


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line or file[index], object) of each row of a .jsonl file, or of a .json file with a list."""
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
    content = read_text(path, what=f"data set {path}")
    if not content.strip():
        raise UserError(f"{path} is empty; write one JSON object per line")
    if path.suffix == ".json" and content.lstrip().startswith("["):
        yield from _read_list(path, content)
    else:
        yield from _read_lines(path, content)


def _read_lines(path: Path, content: str) -> Iterator[tuple[str, dict[str, Any]]]:
    # Only \n ends a row: str.splitlines would also split at U+2028, which may occur in JSON strings.
    for number, line in enumerate(content.rstrip().split("\n"), 1):
        where = f"{path}:{number}"
        if not line.strip():
            raise UserError(f"{where}: an empty line between rows; remove it (a row may be missing)")
        yield where, _object(_parse(line, where), where)


def _read_list(path: Path, content: str) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = _parse(content, str(path))
    if not rows:
        raise UserError(f"{path} has an empty list; write at least one row")
    for index, row in enumerate(rows):
        where = f"{path}[{index}]"
        yield where, _object(row, where)


def _parse(text: str, where: str) -> Any:
    try:
        return parse_json(text, pairs=_no_duplicates)
    except json.JSONDecodeError as error:
        around = text[max(0, error.pos - 20) : error.pos + 20]
        raise UserError(
            f"{where}: not valid JSON at character {error.pos + 1} ({error.msg}), near {around!r}; write one complete JSON "
            "object per line"
        ) from error
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except ValueError as error:
        raise UserError(f"{where}: not read as JSON: {error}; write one complete JSON object per line") from error


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
    """The record with our column names. All columns are renamed at once, so the order of data.columns has no effect."""
    for source, target in file.columns.items():
        if source in record and source != target and target in record and target not in file.columns:
            raise UserError(
                f"{where}: data.columns maps {source!r} to {target!r}, but the row has a column {target!r} already; map that "
                "one elsewhere or drop it"
            )
    return {file.columns.get(name, name): value for name, value in record.items()}


def _fill(rows: Rows, settings: Data) -> Rows:
    """Fills in placeholders and the default system message. Text rows are documents and are not changed."""
    values = {"NAME": settings.model_name, "AUTHOR": settings.model_author}
    option = {"NAME": "data.model_name", "AUTHOR": "data.model_author"}
    used: set[str] = set()
    effect: set[bool] = set()

    def fill_turn(turn: Turn, where: str) -> Turn:
        names = set(_PLACEHOLDER.findall(turn.content))
        for name in names:
            if values[name] is None:
                raise UserError(
                    f"{where}: the row has {{{{{name}}}}}, and {option[name]} is not set; set it to the text to put there"
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
        effect.add(turns[0].role != "system" or turns[0].content == settings.system)
        if settings.system is not None and turns[0].role != "system":
            turns = (Turn(role="system", content=settings.system), *turns)
        rejected = row.rejected
        if rejected is not None:
            rejected = fill_turn(Turn(role="assistant", content=rejected), row.where).content
        return replace(row, turns=tuple(fill_turn(turn, row.where) for turn in turns), rejected=rejected)

    filled = Rows(
        train=[fill_row(row) for row in rows.train],
        validation=[fill_row(row) for row in rows.validation],
        ignored=rows.ignored,
    )
    if settings.system is not None and True not in effect:
        raise UserError(
            f"data.system={settings.system!r} has no effect: every conversation has a system text of its own (an empty one is one), or "
            "there is none; remove it"
        )
    for name, value in values.items():
        if value is not None and name not in used:
            raise UserError(
                f"{option[name]}={value!r} is set, but no row has {{{{{name}}}}}; unset it, or check the data set"
            )
    return filled
