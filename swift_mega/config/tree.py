"""The settings tree as a flat table: one `Setting` per leaf, found by its dotted key or by a SWIFT flag.

Everything that reads settings (recipe, overrides, flags, help, the `config` verb) goes through `settings()` and `find()`. So a field
added to `schema` is at once a YAML key, an override, a flag and a line of help.

The fields of the sections `tuner` and `objective` depend on the tuner and the objective (`Kinds`): each has a class of settings.
"""

import difflib
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from swift_mega.config import schema
from swift_mega.discover import choose
from swift_mega.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Kinds:
    """The tuner and the objective of a run, which decide what settings it has."""

    tuner: str = "lora"
    objective: str = "next_token"


DEFAULTS = Kinds()
KIND_KEYS = {"tuner": "tuner.type", "objective": "objective.name"}
"""Section -> the setting that decides which other settings the section has."""
LIGHT: dict[str, dict[str, type]] = {
    "tuner": {"lora": schema.Lora, "full": schema.Full},
    "objective": {"next_token": schema.Objective},
}
"""Classes of settings that are known without importing torch. Those of other kinds are in their own modules (`_settings_class`)."""


def _settings_class(section: str, kind: str) -> type:
    """The class of settings of a tuner or an objective: `Settings` of the class that its module has as TUNER or OBJECTIVE."""
    if kind in LIGHT[section]:
        return LIGHT[section][kind]
    from swift_mega.device import device

    # Before a module imports Megatron.
    device.setup(starts_ranks=True)
    made = choose(f"swift_mega.{section}s", section.upper(), kind, setting=KIND_KEYS[section])
    settings = getattr(made, "Settings", None)
    if not (isinstance(settings, type) and issubclass(settings, getattr(schema, section.capitalize()))):
        raise UserError(
            f"{KIND_KEYS[section]}={kind!r}: its {section.upper()} is no subclass of {section.capitalize()}; derive it from "
            f"swift_mega.{section}s.{section}.{section.capitalize()}"
        )
    return settings


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One leaf. hint: its type without `| None`. optional: whether None is allowed. default: a fresh copy where it is a dict."""

    key: str
    hint: Any
    optional: bool
    default: Any
    flags: tuple[str, ...]
    help: str
    empty: bool = False
    """Whether empty text is a valid value."""
    limit: schema.Limit | None = None
    """Which values are possible; None: as for every number of its type."""

    @property
    def section(self) -> str:
        return self.key.split(".", 1)[0]

    @property
    def many(self) -> bool:
        """Takes several values."""
        return get_origin(self.hint) is tuple

    @property
    def table(self) -> bool:
        """Takes keys of its own: `key.name=value`."""
        return get_origin(self.hint) is dict

    @property
    def item(self) -> Any:
        """The type of one value of a list or a table."""
        return get_args(self.hint)[1 if self.table else 0] if self.many or self.table else self.hint

    @property
    def switch(self) -> bool:
        """True or false, so a bare flag means true."""
        return self.hint is bool

    @property
    def choices(self) -> tuple[str, ...]:
        return get_args(self.item) if get_origin(self.item) is Literal else ()


@cache
def settings(kinds: Kinds = DEFAULTS) -> dict[str, Setting]:
    """Dotted key -> setting, in the order of the schema."""
    found: dict[str, Setting] = {}
    for section, kind in sections(kinds).items():
        hints = get_type_hints(kind)
        for leaf in fields(kind):
            key = f"{section}.{leaf.name}"
            hint, optional = _without_none(hints[leaf.name])
            default = leaf.default_factory() if leaf.default_factory is not MISSING else leaf.default
            # A class of settings gives the field of its kind another default, and nothing else.
            metadata = leaf.metadata or _declared(kind, leaf.name)
            if key == KIND_KEYS.get(section):
                default = getattr(DEFAULTS, section)
            found[key] = Setting(
                key=key,
                hint=hint,
                optional=optional,
                default=default,
                flags=metadata.get("flag", ()),
                help=metadata.get("help", ""),
                empty=metadata.get("empty", False),
                limit=metadata.get("limit"),
            )
    return found


def _declared(kind: type, name: str) -> Mapping[str, Any]:
    """Metadata of a field where a parent class declares it with any."""
    for parent in kind.__mro__[1:]:
        if is_dataclass(parent) and (found := {leaf.name: leaf.metadata for leaf in fields(parent)}.get(name)):
            return found
    return {}


@cache
def sections(kinds: Kinds = DEFAULTS) -> dict[str, type]:
    """Section name -> its dataclass."""
    chosen = {section: _settings_class(section, getattr(kinds, section)) for section in KIND_KEYS}
    return {**get_type_hints(schema.Run), **chosen}


@cache
def _by_name(kinds: Kinds = DEFAULTS) -> dict[str, Setting]:
    names = dict(settings(kinds))
    for setting in settings(kinds).values():
        for flag in setting.flags:
            assert flag not in names, f"two settings have the flag --{flag}"
            names[flag] = setting
    return names


def find(name: str, kinds: Kinds = DEFAULTS) -> tuple[Setting, str] | None:
    """The setting with this dotted key or flag name (dashes or underscores), and the key inside its table."""
    names = _by_name(kinds)
    if (setting := names.get(name) or names.get(name.replace("-", "_"))) is not None:
        return setting, ""
    for setting in settings(kinds).values():
        if setting.table and name.startswith(setting.key + ".") and name != setting.key + ".":
            return setting, name.removeprefix(setting.key + ".")
    return None


def kinds_in(given: Iterable[tuple[str, str]], before: Kinds = DEFAULTS) -> Kinds:
    """The kinds that (name, value) pairs choose, the last one of each; `before` where they choose none."""
    keys = {key: section for section, key in KIND_KEYS.items()}
    for name, value in given:
        found = _by_name().get(name.replace("-", "_"))
        if found is not None and found.key in keys and value.strip():
            before = replace(before, **{keys[found.key]: value.strip()})
    return before


def suggest(name: str, candidates: Iterable[str]) -> str:
    """ " (did you mean …?)" when something is near, else ""."""
    candidates = list(candidates)
    wanted = name.replace("-", "_")
    same_leaf = [c for c in candidates if c.rpartition(".")[2] == wanted.rpartition(".")[2]]
    near = same_leaf or difflib.get_close_matches(wanted, candidates, n=2, cutoff=0.6)
    if not near:  # for example `lr_rate`, which has a word in common
        near = difflib.get_close_matches(wanted.rpartition(".")[2], candidates, n=1, cutoff=0.5)
    return f" (did you mean {' or '.join(near[:2])}?)" if near else ""


def unknown(name: str, *, flag: bool, extra: Iterable[str] = (), kinds: Kinds = DEFAULTS) -> UserError:
    """The error for a name of no setting. extra: other names that would have been valid here."""
    if name in sections(kinds):
        leaves = ", ".join(s.key for s in settings(kinds).values() if s.section == name)
        return UserError(f"{name} is a section, not a setting: it has {leaves}")
    dashes = "--" if flag else ""
    for section, key in KIND_KEYS.items():
        mine = getattr(kinds, section)
        for other in LIGHT[section]:
            if other != mine and (found := find(name, replace(kinds, **{section: other}))) is not None:
                return UserError(
                    f"{dashes}{name} has no effect: {found[0].key} is a setting of {key}={other}, and this run has {key}={mine}; "
                    f"remove it, or set {key}={other}"
                )
    names = _by_name(kinds)
    candidates = [*extra, *names] if flag else [*settings(kinds), *(n for n in names if n not in settings(kinds))]
    hint = suggest(name, candidates)
    if flag:
        hint = hint.replace("mean ", "mean --").replace(" or ", " or --")
    return UserError(
        f"unknown {'flag' if flag else 'setting'} {dashes}{name}{hint}; `swift-mega config` lists every setting"
    )


def _without_none(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) in (Union, types.UnionType):
        rest = [a for a in get_args(hint) if a is not type(None)]
        assert len(rest) == 1, hint
        return rest[0], True
    return hint, False
