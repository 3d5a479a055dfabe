"""The arguments of a verb: its own options, and the settings that have an effect in it."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from swift_mega.config.load import Flag, Resolved, kinds_of, load, split_arguments
from swift_mega.config.peers import PEERS
from swift_mega.config.tree import Kinds, Setting, find, unknown
from swift_mega.errors import UserError
from swift_mega.launch.torchrun import is_first_rank

RECIPE_ENDINGS = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True)
class Option:
    """An option of a verb that is not a setting. kind: how many words it takes. value: its placeholder in the help text."""

    name: str
    value: str = ""
    help: str
    kind: Literal["one", "many", "switch"] = "one"
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    """Older names, which are accepted too."""


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One command. takes: whether a setting (dotted name) has an effect here. defaults: its defaults that differ from the schema's."""

    name: str
    summary: str
    description: str
    usage: tuple[str, ...]
    options: tuple[Option, ...] = ()
    takes: Callable[[str], bool]
    recipe: bool = False
    defaults: tuple[tuple[str, str], ...] = ()
    run: Callable[["Arguments"], int]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The words given to a verb, split, with checked names; `resolved` converts settings to their types."""

    verb: Verb
    options: dict[str, tuple[str, ...]] = field(default_factory=dict)
    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    flags: tuple[Flag, ...] = ()

    def resolved(self) -> Resolved:
        tokens = [token for flag in self.flags for token in flag.tokens()]
        resolved = load(
            self.recipe,
            self.overrides,
            tokens,
            defaults=dict(self.verb.defaults),
            defaults_source=f"default of {self.verb.name}",
        )
        for note in resolved.notes if is_first_rank() else ():
            print(note, file=sys.stderr)
        return resolved

    def text(self, name: str) -> str | None:
        words = self.options.get(name)
        return words[0] if words else None

    def switch(self, name: str) -> bool:
        word = self.text(name)
        if word is not None and word.lower() not in ("true", "false"):
            raise UserError(f"--{name}={word}: expected true or false")
        return word is not None and word.lower() == "true"

    def whole(self, name: str) -> int | None:
        """A whole number of at least 1, or None where the option was not given."""
        word = self.text(name)
        if word is not None and (not word.isdecimal() or len(word) > 18 or int(word) < 1):
            raise UserError(f"--{name}={word}: expected a whole number of at least 1")
        return None if word is None else int(word)

    def positive(self, name: str) -> float | None:
        """A number above 0, or None where the option was not given."""
        word = self.text(name)
        if word is None:
            return None
        try:
            number = float(word)
        except ValueError:
            number = 0.0
        if not 0 < number < float("inf"):
            raise UserError(f"--{name}={word}: expected a number above 0")
        return number

    def required(self, name: str) -> str:
        value = self.text(name)
        if value is None:
            raise UserError(f"{self.verb.name}: --{name} is missing; usage: swift-mega {self.verb.usage[0]}")
        return value


def read_arguments(verb: Verb, tokens: Sequence[str]) -> Arguments:
    """Splits the words given to a verb; UserError for names that the verb does not have. Values of settings are converted later."""
    own = {name: option for option in verb.options for name in (option.name, *option.aliases)}
    recipes = [word for word in tokens if verb.recipe and word.endswith(RECIPE_ENDINGS) and Path(word).is_file()]
    kinds = kinds_of(recipes, tokens, dict(verb.defaults))

    def kind(name: str) -> str | None:
        option = own.get(name.replace("-", "_"))
        if option is None and find(name, kinds) is None and not _is_peer(verb, name):
            raise unknown(name, flag=True, extra=own, kinds=kinds)
        return option.kind if option else None

    positional, given = split_arguments(tokens, own=kind, kinds=kinds)
    options: dict[str, tuple[str, ...]] = {}
    flags: list[Flag] = []
    for flag in given:
        option = own.get(flag.name.replace("-", "_"))
        if option is None:
            if find(flag.name, kinds) is not None or not _is_peer(verb, flag.name):
                _check_taken(verb, flag.name, f"--{flag.name}", kinds)
            flags.append(flag)
            continue
        _add_option(options, option, flag)
    recipe, overrides = _split_positional(verb, positional, kinds)
    return Arguments(verb=verb, options=options, recipe=recipe, overrides=tuple(overrides), flags=tuple(flags))


def _add_option(options: dict[str, tuple[str, ...]], option: Option, flag: Flag) -> None:
    words = flag.words or (("true",) if option.kind == "switch" else ())
    if not words or words == ("",):
        raise UserError(f"--{option.name} needs a value")
    if option.choices and words[0] not in option.choices:
        raise UserError(f"--{option.name}={words[0]}: expected {' | '.join(option.choices)}")
    if options.get(option.name, words) != words:
        raise UserError(f"--{option.name} is given twice, with {' '.join(options[option.name])} and {' '.join(words)}")
    options[option.name] = words


def _split_positional(verb: Verb, words: Sequence[str], kinds: Kinds) -> tuple[str | None, list[str]]:
    recipe: str | None = None
    overrides: list[str] = []
    for word in words:
        if not verb.recipe or word.startswith("-") or ("=" in word and not word.endswith(RECIPE_ENDINGS)):
            name, equals, _ = word.partition("=")
            if not equals or not name or word.startswith("-"):
                raise UserError(f"{verb.name}: {word!r} is no value of an option; usage: swift-mega {verb.usage[0]}")
            if find(name, kinds) is not None or not _is_peer(verb, name):
                _check_taken(verb, name, name, kinds)
            overrides.append(word)
        elif recipe is not None:
            raise UserError(f"{verb.name}: two recipes, {recipe} and {word}; give one, and key=value for what differs")
        elif not word.endswith(RECIPE_ENDINGS) and not Path(word).is_file():
            raise UserError(
                f"{verb.name}: {word!r} is neither a recipe (.yaml) nor a setting (key=value, --flag value)"
            )
        else:
            recipe = word
    return recipe, overrides


def _is_peer(verb: Verb, name: str) -> bool:
    """Whether a peer has this flag for the same job: only verbs that take a recipe know flags of peers."""
    return verb.recipe and name.replace("-", "_") in PEERS


def _check_taken(verb: Verb, name: str, shown: str, kinds: Kinds) -> Setting:
    found = find(name, kinds)
    if found is None:
        raise unknown(name, flag=False, kinds=kinds)
    if not verb.takes(found[0].key):
        raise UserError(f"{shown} sets {found[0].key}, which has no effect in {verb.name}; remove it")
    return found[0]
