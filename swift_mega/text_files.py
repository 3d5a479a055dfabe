"""Text files as users write them: UTF-8, with or without a byte order mark; only \\n and \\r\\n end a line.

Everything that reads a user's text (templates, recipes, data sets, prompts) reads it here, so that a file means the same everywhere.
Python's `read_text` keeps the mark as the first character. Python's `splitlines` also ends a line at U+2028 or a form feed, which JSON
strings and prompts may contain.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from swift_mega.errors import UserError

BOM = "\ufeff"
DEEPEST = 100
"""Levels of nesting in a JSON value. A deeper one could exceed Python's stack, also later, when it is printed or copied."""
LONGEST_INTEGER = 4000
"""Digits of an integer. Python reads at most 4300, because reading more takes long."""


def read_text(path: str | Path, *, what: str) -> str:
    """The text of a file, with its line ends unchanged. `what` begins every error: which setting or file this is."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{what} does not exist; give the path of a file") from None
    except OSError as error:
        raise UserError(f"{what} cannot be read: {error.strerror}; check its path and its permissions") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{what}: not UTF-8 text (byte {error.start}); convert the file to UTF-8") from None


def lines(text: str) -> list[str]:
    """The lines of `text` without their ends. Where the text ends with a line end, no empty line follows it."""
    found = [line.removesuffix("\r") for line in text.split("\n")]
    return found[:-1] if found[-1] == "" else found


Pairs = Callable[[list[tuple[str, Any]]], dict[str, Any]]
"""json's object_pairs_hook."""


def parse_json(text: str | bytes, *, pairs: Pairs | None = None) -> Any:
    """The value of a JSON text; ValueError for any fault in it. Integers beyond LONGEST_INTEGER digits are read as floats.

    pairs: makes a dict of an object's pairs, like json's object_pairs_hook.
    """
    try:
        value = json.loads(text, parse_int=_integer, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} levels deep") from None
    brackets = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    if sum(map(text.count, brackets)) > DEEPEST and _depth(value) > DEEPEST:  # type: ignore[arg-type]
        raise ValueError(f"nested more than {DEEPEST} levels deep")
    return value


def read_object(
    path: str | Path, *, remedy: str = "copy it from the source again", pairs: Pairs | None = None
) -> dict[str, Any]:
    """The JSON object in a file of a model or an adapter. Where there is none: UserError that ends with `remedy`.

    pairs: as for `parse_json`. A UserError that it raises gets the path before it and the remedy after it.
    """
    try:
        value = parse_json(Path(path).read_bytes().decode("utf-8-sig"), pairs=pairs)
    except UserError as error:
        raise UserError(f"{path}: {error}; {remedy}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} contains a {type(value).__name__}, not an object; {remedy}")
    return value


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= LONGEST_INTEGER else float(digits)


def _depth(value: Any) -> int:
    """Levels of nested lists and dicts, counted level by level."""
    level, depth = [value], 0
    while level:
        level = [item for one in level if isinstance(one, list | dict) for item in _items(one)]
        depth += 1
    return depth


def _items(value: list[Any] | dict[str, Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value
