"""Merges settings from four places into one `Run`: defaults < YAML recipe < dotted overrides < SWIFT-style flags.

Each place yields (name, value, where it is written). Names are looked up, text is converted to types, and values are checked one by one
and then together. Whatever does not fit is one `UserError` that says where it was written. The source of every key's final value is
recorded.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from swift_mega.config.check import check_range, check_together
from swift_mega.config.parse import Given, Scalar, convert, from_words, read_recipe, to_plain
from swift_mega.config.peers import PEERS, PeerFlag
from swift_mega.config.schema import Run
from swift_mega.config.tree import DEFAULTS, Kinds, Setting, find, kinds_in, sections, settings, unknown
from swift_mega.errors import UserError

FLAG = re.compile(r"--|-[A-Za-z]")  # does not match a negative number
OVERRIDE = re.compile(r"[A-Za-z_][\w.-]*=")


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A run, and for every dotted key its source: "default", "FILE:LINE", "override", "--flag", or what set a command's default."""

    run: Run
    sources: dict[str, str]
    notes: tuple[str, ...] = ()
    """Lines about flags of peers that are accepted and have no effect."""


@dataclass(frozen=True)
class Flag:
    """One flag as it was given: `--name word word`. words is empty for a bare switch."""

    name: str
    words: tuple[str, ...]

    def tokens(self) -> list[str]:
        return [f"--{self.name}", *self.words]


def load(
    path: str | None,
    overrides: Sequence[str] = (),
    flags: Sequence[str] = (),
    *,
    defaults: Mapping[str, str] | None = None,
    defaults_source: str = "default",
) -> Resolved:
    """Reads a recipe (or none), `key=value` overrides and `--flag value …` tokens.

    defaults: what a command sets differently from the schema, by dotted key. All other sources override them.
    Raises UserError for unknown names (with the nearest known one), wrong types, impossible values and contradictions.
    """
    kinds = kinds_of([path] if path is not None else [], [*overrides, *flags], defaults or {})
    layers = [
        [_given(f"{key}={value}", source=defaults_source, kinds=kinds) for key, value in (defaults or {}).items()],
        read_recipe(path, kinds) if path is not None else [],
        [_given(text, source="override", kinds=kinds) for text in overrides],
        _given_flags(flags, kinds),
    ]
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    notes: dict[str, str] = {}
    for layer in layers:
        _apply([one for given in layer for one in _ours(given, notes, kinds)], values, sources, kinds)
    run = _build(values, kinds)
    for key in settings(kinds):
        if not any(known == key or known.startswith(key + ".") for known in sources):
            sources[key] = "default"
    check_together(run, sources)
    return Resolved(run=run, sources=sources, notes=tuple(notes.values()))


def _peer(name: str, kinds: Kinds) -> PeerFlag | None:
    """The entry of a name that is no setting of ours, and that a peer has."""
    return PEERS.get(name.replace("-", "_")) if find(name, kinds) is None else None


def _ours(given: Given, notes: dict[str, str], kinds: Kinds) -> list[Given]:
    """What was given, in our settings: itself; for a flag of a peer the setting that it becomes, or nothing but a line in `notes`."""
    peer, name = _peer(given.name, kinds), given.name.replace("-", "_")
    if peer is None:
        return [given]
    text = given.value.text if isinstance(given.value, Scalar) else json.dumps(to_plain(given.value))
    if peer.becomes is None:
        notes[name] = peer.note(name, text)
        return []
    value = Scalar((peer.values or {}).get(text.lower(), text))
    return [replace(given, name=peer.becomes, value=value)]


def kinds_of(recipes: Sequence[str], words: Sequence[str], defaults: Mapping[str, str]) -> Kinds:
    """The tuner and the objective that a command names: they decide which other settings there are.

    words: `key=value`, `--flag value` and `--flag=value`; they override recipes, which override `defaults`.
    """
    kinds = kinds_in(defaults.items())
    for path in recipes:
        kinds = kinds_in(
            ((one.name, one.value.text) for one in read_recipe(path) if isinstance(one.value, Scalar)), kinds
        )
    pairs = [tuple(word.removeprefix("--").split("=", 1)) for word in words if "=" in word]
    flags = [(word[2:], after) for word, after in pairwise(words) if word.startswith("--") and "=" not in word]
    return kinds_in(((name, value) for name, value in [*pairs, *flags] if not FLAG.match(value)), kinds)


def split_arguments(
    tokens: Sequence[str], *, own: Callable[[str], str | None] = lambda name: None, kinds: Kinds = DEFAULTS
) -> tuple[list[str], list[Flag]]:
    """Command-line tokens -> (positional words, flags). A flag takes as many words as its setting does.

    own: returns "one", "many" or "switch" for a name that is not a setting, or that the command takes itself; else None.
    A list of words ends at the next flag or `key=value` (write a file of such a name as ./key=value). So does a switch.
    """
    positional: list[str] = []
    flags: list[Flag] = []
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--"):
            positional.append(token)
            continue
        name, equals, value = token[2:].partition("=")
        kind = own(name) or _kind(name, kinds)
        if kind is None:
            raise unknown(name, flag=True, kinds=kinds)
        if equals:
            flags.append(Flag(name, (value,)))
            continue
        flags.append(Flag(name, tuple(_take(rest, kind))))
    return positional, flags


def _take(rest: list[str], kind: str) -> list[str]:
    """Removes from `rest` the words that belong to a flag of this kind, and returns them."""
    words: list[str] = []
    while rest and not FLAG.match(rest[0]) and (kind == "one" or not OVERRIDE.match(rest[0])):
        words.append(rest.pop(0))
        if kind != "many":
            break
    return words


def _kind(name: str, kinds: Kinds) -> str | None:
    found = find(name, kinds)
    if found is None:
        peer = _peer(name, kinds)
        return None if peer is None else peer.kind
    setting, inside = found
    return "switch" if setting.switch else "many" if setting.many and not inside else "one"


def _given(text: str, *, source: str, kinds: Kinds) -> Given:
    name, equals, word = text.partition("=")
    if not equals or not name:
        raise UserError(f"{text!r} is neither a recipe (.yaml) nor a setting: write key=value or --flag value")
    found = find(name, kinds)
    if found is None and _peer(name, kinds) is not None:
        return Given(name=name, value=Scalar(word), where=name, source=source)
    if found is None:
        raise unknown(name, flag=False, kinds=kinds)
    return Given(name=name, value=from_words([word], found[0], inside=found[1]), where=name, source=source)


def _given_flags(tokens: Sequence[str], kinds: Kinds) -> list[Given]:
    positional, flags = split_arguments(tokens, kinds=kinds)
    if positional:
        raise UserError(f"{positional[0]!r} belongs to no flag: write --flag value, or key=value as an override")
    given: list[Given] = []
    for flag in flags:
        found = find(flag.name, kinds)
        if found is None:
            text = " ".join(flag.words) or "true"
            given.append(Given(name=flag.name, value=Scalar(text), where=f"--{flag.name}", source=f"--{flag.name}"))
            continue
        setting, inside = found
        words = flag.words or (("true",) if setting.switch else ())
        if not words or (words == ("",) and not setting.empty):
            raise UserError(f"--{flag.name} needs a value")
        value = from_words(words, setting, inside=inside)
        given.append(Given(name=flag.name, value=value, where=f"--{flag.name}", source=f"--{flag.name}"))
    return given


def _apply(layer: Sequence[Given], values: dict[str, Any], sources: dict[str, str], kinds: Kinds) -> None:
    """Writes one layer's values over those of earlier layers. UserError where the layer gives a key two different values."""
    mine: dict[str, tuple[Given, Any]] = {}
    for given in layer:
        found = find(given.name, kinds)
        if found is None:
            error = unknown(given.name, flag=False, kinds=kinds)
            raise UserError(f"{given.source}: {error}") if given.where != given.name else error
        setting, inside = found
        value = convert(setting, given.value, inside=inside, where=given.where)
        if setting.table and not inside:
            entries = {f"{setting.key}.{key}": item for key, item in value.items()}
        else:
            check_range(setting, value, where=given.where)
            entries = {f"{setting.key}.{inside}" if inside else setting.key: value}
        for key, item in entries.items():
            if key in mine and mine[key][1] != item:
                raise _twice(key, mine[key][0], given, setting)
            mine[key] = (given, item)
    for key, (given, item) in mine.items():
        values[key] = item
        sources[key] = given.source


def _twice(key: str, first: Given, second: Given, setting: Setting) -> UserError:
    once = f"; give all its values after one --{second.name}" if setting.many and first.where == second.where else ""
    return UserError(f"{key} is set twice, to different values: by {_spot(first)} and by {_spot(second)}{once}")


def _spot(given: Given) -> str:
    if isinstance(given.value, Scalar):
        return f"{given.where}={given.value.text}"
    return given.where


def _build(values: Mapping[str, Any], kinds: Kinds) -> Run:
    parts: dict[str, dict[str, Any]] = {name: {} for name in sections(kinds)}
    for key, value in values.items():
        section, name, *inside = key.split(".", 2)
        if inside:
            parts[section].setdefault(name, {})[inside[0]] = value
        else:
            parts[section][name] = value
    return Run(**{name: kind(**parts[name]) for name, kind in sections(kinds).items()})


def to_dict(run: Run) -> dict[str, Any]:
    """Plain dicts, lists and scalars, by section: the content of args.json, and a valid recipe."""
    return json.loads(json.dumps(dataclasses.asdict(run)))


def to_json(run: Run) -> str:
    return json.dumps(to_dict(run), indent=2, ensure_ascii=False) + "\n"
