"""Text to typed values. A YAML scalar, an override and a flag are all text here, so a value means the same in each of them.

YAML is read as nodes, not as Python values: PyYAML would make `1e-4` a string, `no` a boolean and `007` the number 7. Nodes also have
line numbers, which errors and the `config` verb show.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_origin

import yaml

from swift_mega.config.tree import DEFAULTS, Kinds, Setting, sections, settings, suggest
from swift_mega.errors import UserError
from swift_mega.text_files import parse_json, read_text

# SWIFT's names of choices, where ours differ.
SWIFT_VALUES = {"data.loss_on": {"default": "assistant", "last_round": "last"}}
INTEGER = re.compile(r"[+-]?\d{1,300}")
"""At most 300 digits: no setting needs more, and Python refuses more than 4300."""
SIZE = re.compile(r"(\d{1,30}(?:\.\d{1,30})?)\s*([KMGT]?i?)B?", re.IGNORECASE)


@dataclass(frozen=True)
class Scalar:
    """One value as it was written. plain: it was written without quotes, so it may be a number or null."""

    text: str
    plain: bool = True


Value = Scalar | list["Value"] | dict[str, "Value"]


@dataclass(frozen=True, kw_only=True)
class Given:
    """A value that the user gave. where: how an error begins. source: what the `config` verb shows."""

    name: str
    value: Value
    where: str
    source: str


def read_recipe(path: str, kinds: Kinds = DEFAULTS) -> list[Given]:
    """The keys of a YAML file (they may be dotted) with their values and lines; sections are flattened. Raises UserError with file:line."""
    text = read_text(path, what=f"recipe {path}")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}:{_line(root)}: a recipe is a mapping of settings (key: value), not a {_shape(root)}")
    return _open(root, path, prefix="", tables=_nested(kinds))


def _nested(kinds: Kinds) -> frozenset[str]:
    """Names whose mappings are opened: sections, and settings that are tables."""
    return frozenset([*sections(kinds), *(key for key, setting in settings(kinds).items() if setting.table)])


def _open(node: yaml.MappingNode, path: str, *, prefix: str, tables: frozenset[str]) -> list[Given]:
    found: list[Given] = []
    for key, line, child in _pairs(node, path):
        name = prefix + key
        if isinstance(child, yaml.MappingNode) and name in tables:
            found += _open(child, path, prefix=name + ".", tables=tables)
            continue
        value = _value(child, path)
        found.append(Given(name=name, value=value, where=f"{path}:{line}: {name}", source=f"{path}:{line}"))
    return found


def _pairs(node: yaml.MappingNode, path: str) -> list[tuple[str, int, yaml.Node]]:
    pairs: dict[str, tuple[str, int, yaml.Node]] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{path}:{_line(key)}: a key must be a word, not a {_shape(key)}")
        if key.value in pairs:
            raise UserError(f"{path}:{_line(key)}: duplicate key {key.value!r}, first on line {pairs[key.value][1]}")
        pairs[key.value] = (key.value, _line(key), value)
    return list(pairs.values())


def _value(node: yaml.Node, path: str) -> Value:
    if isinstance(node, yaml.ScalarNode):
        text = "null" if node.style is None and node.value == "" else node.value
        return Scalar(text, plain=node.style is None)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, path) for item in node.value]
    assert isinstance(node, yaml.MappingNode)
    return {key: _value(child, path) for key, _, child in _pairs(node, path)}


def _shape(node: yaml.Node) -> str:
    return {yaml.ScalarNode: "single value", yaml.SequenceNode: "list"}.get(type(node), "mapping")


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def from_words(words: Sequence[str], setting: Setting, *, inside: str) -> Value:
    """The words after a flag or an override as a value. Lists may also be separated by commas, and tables are JSON."""
    if setting.many and not inside:
        return [Scalar(part.strip()) for word in words for part in word.split(",") if part.strip()]
    if setting.table and not inside and len(words) == 1:
        try:
            table = parse_json(words[0])
        except ValueError:
            return Scalar(words[0])
        return _from_json(table)
    if len(words) == 1:
        return Scalar(words[0])
    return [Scalar(word) for word in words]


def _from_json(value: Any) -> Value:
    if isinstance(value, dict):
        return {str(key): _from_json(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return Scalar(value, plain=False) if isinstance(value, str) else Scalar(json.dumps(value))


def convert(setting: Setting, value: Value, *, inside: str, where: str) -> Any:
    """The typed value of a setting, or of one key (`inside`) of its table. Raises a UserError that begins with `where`."""
    if _is_null(value) and not inside:
        if setting.optional:
            return None
        if setting.many:
            return ()
        raise UserError(f"{where}: needs a value, {_expected(setting)}")
    if setting.table and not inside:
        if not isinstance(value, dict):
            raise UserError(f"{where}={_shown(value)}: expected {_expected(setting)}, or {setting.key}.NAME=value")
        return {key: convert(setting, child, inside=key, where=f"{where}.{key}") for key, child in value.items()}
    if setting.many:
        items: list[Value] = value if isinstance(value, list) else [value]
        if isinstance(value, Scalar) and value.plain:
            items = [Scalar(part.strip()) for part in value.text.split(",") if part.strip()]
        return tuple(_one(setting, item, where=where) for item in items)
    return _one(setting, value, where=where)


def _one(setting: Setting, value: Value, *, where: str) -> Any:
    if setting.item is Any:
        return _free(value)
    if not isinstance(value, Scalar):
        several = "several values" if isinstance(value, list) else "a mapping"
        raise UserError(f"{where}={_shown(value)}: expected {_expected(setting)}, not {several}")
    text = SWIFT_VALUES.get(setting.key, {}).get(value.text, value.text)
    if setting.choices:
        if text not in setting.choices:
            raise UserError(f"{where}={text}: expected {' | '.join(setting.choices)}{suggest(text, setting.choices)}")
        return text
    readers: dict[Any, Callable[[str], Any]] = {bool: _boolean, int: _integer, float: _number, str: str}
    parsed = readers[setting.item](text)
    if parsed is None:
        raise UserError(f"{where}={text}: expected {_expected(setting)}")
    return parsed


def _boolean(text: str) -> bool | None:
    return {"true": True, "false": False}.get(text.lower())


def _integer(text: str) -> int | None:
    if INTEGER.fullmatch(text):
        return int(text)
    number = _number(text)
    return int(number) if number is not None and number % 1 == 0 else None


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _free(value: Value) -> Any:
    """A value whose type only its reader knows (Megatron's own settings): null, boolean, number, or text."""
    if isinstance(value, list):
        return [_free(item) for item in value]
    if isinstance(value, dict):
        return {key: _free(child) for key, child in value.items()}
    if not value.plain:
        return value.text
    if _is_null(value):
        return None
    if (truth := _boolean(value.text)) is not None:
        return truth
    if INTEGER.fullmatch(value.text):
        return int(value.text)
    number = _number(value.text)
    return value.text if number is None else number


def _is_null(value: Value) -> bool:
    return isinstance(value, Scalar) and value.plain and value.text.lower() in ("null", "none", "~")


def _expected(setting: Setting) -> str:
    if setting.choices:
        return " | ".join(setting.choices)
    kind = get_origin(setting.item) or setting.item
    if setting.table:
        return 'a mapping such as {"name": "value"}'
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]


def to_plain(value: Value) -> Any:
    """Texts, in lists and dicts as they were written."""
    if isinstance(value, Scalar):
        return value.text
    return [to_plain(item) for item in value] if isinstance(value, list) else {k: to_plain(v) for k, v in value.items()}


def _shown(value: Value) -> str:
    shown = to_plain(value)
    return shown if isinstance(shown, str) else json.dumps(shown)


def size_in_bytes(text: str) -> int | None:
    """'5GB' -> 5 * 10^9, '512MiB' -> 512 * 2^20, '1000' -> 1000; None where the text is not a size of at least one byte."""
    match = SIZE.fullmatch(text.strip())
    if match is None:
        return None
    unit = match[2].lower()
    power = "kmgt".index(unit[0]) + 1 if unit and unit[0] in "kmgt" else 0
    if unit == "i":
        return None
    size = int(float(match[1]) * (1024 if unit.endswith("i") else 1000) ** power)
    return size if size >= 1 else None


def parse_size(text: str) -> int:
    """Bytes of '500MB', '5GB', '1GiB' or a plain number."""
    size = size_in_bytes(text)
    if size is None:
        raise UserError(f"size {text!r} is not valid; write it like 500MB, 5GB or 2GiB")
    return size
