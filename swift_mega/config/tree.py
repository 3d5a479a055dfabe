"""The settings tree as a flat table: one `Setting` per leaf, found by its dotted key or by a SWIFT flag.

Everything that reads settings (recipe, overrides, flags, help, the `config` verb) goes through `settings()` and `find()`. So a field
added to `schema` is at once a YAML key, an override, a flag and a line of help.
"""

import difflib
import types
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from swift_mega.config import schema
from swift_mega.errors import UserError


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
def settings() -> dict[str, Setting]:
    """Dotted key -> setting, in the order of the schema."""
    found: dict[str, Setting] = {}
    for section in fields(schema.Run):
        kind = get_type_hints(schema.Run)[section.name]
        hints = get_type_hints(kind)
        for leaf in fields(kind):
            hint, optional = _without_none(hints[leaf.name])
            default = leaf.default_factory() if leaf.default_factory is not MISSING else leaf.default
            key = f"{section.name}.{leaf.name}"
            found[key] = Setting(
                key=key,
                hint=hint,
                optional=optional,
                default=default,
                flags=leaf.metadata.get("flag", ()),
                help=leaf.metadata.get("help", ""),
                empty=leaf.metadata.get("empty", False),
            )
    return found


@cache
def sections() -> dict[str, type]:
    """Section name -> its dataclass."""
    return get_type_hints(schema.Run)


@cache
def _by_name() -> dict[str, Setting]:
    names = dict(settings())
    for setting in settings().values():
        for flag in setting.flags:
            assert flag not in names, f"two settings answer to --{flag}"
            names[flag] = setting
    return names


def find(name: str) -> tuple[Setting, str] | None:
    """The setting with this dotted key or flag name (dashes or underscores), and the key inside its table."""
    names = _by_name()
    if (setting := names.get(name) or names.get(name.replace("-", "_"))) is not None:
        return setting, ""
    for setting in settings().values():
        if setting.table and name.startswith(setting.key + ".") and name != setting.key + ".":
            return setting, name.removeprefix(setting.key + ".")
    return None


def suggest(name: str, candidates: Iterable[str]) -> str:
    """ " (did you mean …?)" when something is near, else ""."""
    candidates = list(candidates)
    wanted = name.replace("-", "_")
    same_leaf = [c for c in candidates if c.rpartition(".")[2] == wanted.rpartition(".")[2]]
    near = same_leaf or difflib.get_close_matches(wanted, candidates, n=2, cutoff=0.6)
    if not near:  # for example `lr_rate`, which has a word in common
        near = difflib.get_close_matches(wanted.rpartition(".")[2], candidates, n=1, cutoff=0.5)
    return f" (did you mean {' or '.join(near[:2])}?)" if near else ""


def unknown(name: str, *, flag: bool, extra: Iterable[str] = ()) -> UserError:
    """The error for a name of no setting. extra: other names that would have been valid here."""
    if name in sections():
        leaves = ", ".join(s.key for s in settings().values() if s.section == name)
        return UserError(f"{name} is a section, not a setting: it has {leaves}")
    dashes = "--" if flag else ""
    candidates = [*extra, *_by_name()] if flag else [*settings(), *(n for n in _by_name() if n not in settings())]
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
