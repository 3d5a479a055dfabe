"""What a name in data.dataset means: a path, `path#N`, or an entry of dataset_info.json.

Two forms of dataset_info.json are read. LLaMA-Factory writes an object, name -> {file_name, formatting, columns (our name -> theirs),
tags}; SWIFT writes a list of {dataset_path, dataset_name, columns (theirs -> ours)}. Paths are relative to dataset_info.json.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from swift_mega.config.schema import Data
from swift_mega.data.formats import Tags, kind
from swift_mega.errors import UserError
from swift_mega.text_files import parse_json, read_text

_FACTORY_KEYS = ("file_name", "formatting", "columns", "tags", "num_samples", "ranking")
_SWIFT_KEYS = ("dataset_path", "dataset_name", "columns", "help", "tags")
_HUB_KEYS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "hf_dataset_id", "ms_dataset_id", "script_url")
_FACTORY_COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "system": "system",
    "messages": "conversations",
}
_FACTORY_ROLE_TAGS = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}


@dataclass(frozen=True, kw_only=True)
class File:
    """A file and how to read it. rows: number of data rows to take. columns: name in the file -> our name."""

    path: Path
    rows: int | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Tags | None = None


def find(name: str, settings: Data) -> File:
    """The file that `name` means; UserError where there is none, or where its entry needs something that is not supported."""
    plain, rows = _split_count(name)
    if settings.dataset_info is not None:
        info = Path(settings.dataset_info)
        entries = _read_info(info)
        if plain in entries:
            file = entries[plain]()
            return File(
                path=file.path, rows=rows or file.rows, columns={**file.columns, **settings.columns}, tags=file.tags
            )
        if not Path(plain).exists():
            raise UserError(
                f"data set {plain!r} is neither a file nor a name of {info}, which knows {', '.join(sorted(entries)) or 'none'}"
            )
    return File(path=Path(plain), rows=rows, columns=settings.columns)


def _split_count(name: str) -> tuple[str, int | None]:
    found = re.fullmatch(r"(.*)#([^#/]*)", name)
    if found is None or Path(name).exists():
        return name, None
    if not re.fullmatch(r"[0-9]{1,18}", found[2]) or int(found[2]) == 0:
        raise UserError(f"data set {name!r}: {found[2]!r} is not a number of rows; write path#500 for 500 rows")
    return found[1], int(found[2])


def _read_info(path: Path) -> dict[str, Callable[[], File]]:
    """Name -> function that reads its entry. Entries are read on use, so a damaged entry does not affect the others."""
    what = f"data.dataset_info={str(path)!r}"
    if not path.exists():
        raise UserError(f"{what} does not exist; give the path of a dataset_info.json")
    try:
        content = parse_json(read_text(path, what=what))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{what} cannot be read as JSON: {error}; correct the file") from error
    if isinstance(content, dict):
        return {
            name: partial(_factory_file, path, name, entry) for name, entry in content.items() if not _is_remote(entry)
        }
    if isinstance(content, list):
        numbered = [(index, entry) for index, entry in enumerate(content) if not _is_remote(entry)]
        if not any(_swift_name(entry) for _, entry in numbered) and numbered:
            # Raises the error of the first entry.
            _swift_file(path, *numbered[0])
        return {
            name: partial(_swift_file, path, index, entry) for index, entry in numbered if (name := _swift_name(entry))
        }
    raise UserError(f"{what} contains {kind(content)}; write an object, or a list, of data sets")


def _swift_name(entry: Any) -> str | None:
    """The name of an entry in SWIFT's list, made from its path where it has none; None where it has neither."""
    name, path = (
        (entry.get(key) for key in ("dataset_name", "dataset_path")) if isinstance(entry, dict) else (None, None)
    )
    if isinstance(name, str) and name:
        return name
    return Path(path).stem if isinstance(path, str) else None


def _is_remote(entry: Any) -> bool:
    # A name that only a hub can resolve is unknown here; using it raises the error for unknown names.
    return (
        isinstance(entry, dict)
        and any(key in entry for key in _HUB_KEYS)
        and not {"file_name", "dataset_path"} & set(entry)
    )


def _factory_file(info: Path, name: str, entry: Any) -> File:
    where = f"{info}: {name!r}"
    _check_keys(entry, where, _FACTORY_KEYS + _HUB_KEYS, needs="file_name")
    if entry.get("ranking"):
        raise UserError(f"{where}: ranking is preference data, which is not supported yet; choose another data set")
    if entry.get("formatting", "alpaca") not in ("alpaca", "sharegpt"):
        raise UserError(f"{where}: formatting {entry['formatting']!r} is unknown; write alpaca or sharegpt")
    columns: dict[str, str] = {}
    for ours, theirs in _names(entry, "columns", where).items():
        if ours not in _FACTORY_COLUMNS:
            raise UserError(f"{where}: column {ours!r} is not supported; known are {', '.join(_FACTORY_COLUMNS)}")
        if theirs in columns:
            raise UserError(
                f"{where}: column {theirs!r} is named for two of ours, {columns[theirs]!r} and {_FACTORY_COLUMNS[ours]!r}; it can "
                "be only one of them"
            )
        columns[theirs] = _FACTORY_COLUMNS[ours]
    tags = _names(entry, "tags", where)
    roles = {tags.pop(tag): role for tag, role in _FACTORY_ROLE_TAGS.items() if tag in tags}
    read = Tags(role=tags.pop("role_tag", "from"), content=tags.pop("content_tag", "value"), roles=roles)
    # A data row that uses one of these roles is refused later.
    tags.pop("observation_tag", None)
    tags.pop("function_tag", None)
    if tags:
        raise UserError(
            f"{where}: tags {', '.join(tags)} are unknown; known are role_tag, content_tag, {', '.join(_FACTORY_ROLE_TAGS)}"
        )
    rows = entry.get("num_samples")
    if rows is not None and (type(rows) is not int or rows < 1):
        raise UserError(f"{where}: num_samples is {kind(rows)}; write a whole number of at least 1")
    return File(path=info.parent / entry["file_name"], rows=rows, columns=columns, tags=read)


def _swift_file(info: Path, index: int, entry: Any) -> File:
    where = f"{info}: entry {index}"
    _check_keys(entry, where, _SWIFT_KEYS + _HUB_KEYS, needs="dataset_path")
    return File(path=info.parent / entry["dataset_path"], columns=_names(entry, "columns", where))


def _names(entry: dict[str, Any], key: str, where: str) -> dict[str, str]:
    """The object (name -> name) at `key`, without null values; empty where there is none."""
    found = entry.get(key)
    if found is not None and not isinstance(found, dict):
        raise UserError(f"{where}: {key} is {kind(found)}; write an object of names")
    for name, value in (found or {}).items():
        if value is not None and not isinstance(value, str):
            raise UserError(f"{where}: {key}: {name!r} is {kind(value)}; write a name")
    return {name: value for name, value in (found or {}).items() if value is not None}


def _check_keys(entry: Any, where: str, known: tuple[str, ...], *, needs: str) -> None:
    if not isinstance(entry, dict) or not isinstance(entry.get(needs), str) or not entry[needs]:
        raise UserError(f"{where} has no {needs}; write the path of its file there")
    if unknown := [key for key in entry if key not in known]:
        raise UserError(
            f"{where} has keys that are not known: {', '.join(unknown)}; supported are {', '.join(known[:6])}"
        )
