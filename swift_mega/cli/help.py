"""The text of `--help`. It is made from the options of the verbs and the tree of settings, so it agrees with what is parsed."""

import json
import textwrap
from collections.abc import Iterable

from swift_mega.cli.arguments import Option, Verb
from swift_mega.config.tree import DEFAULTS, Kinds, Setting, sections, settings

WIDTH = 100
INDENT = 30
RECIPE_HELP = "Settings go into a recipe by section and name, or follow it as section.name=value or --flag value."


def overview(verbs: Iterable[Verb]) -> str:
    """The verbs, one line each."""
    lines = [
        "usage: swift-mega VERB …",
        "",
        "Trains Hugging Face checkpoints with Megatron-core in any layout, and writes Hugging Face files.",
        "",
    ]
    lines += [f"  {verb.name:<10}{verb.summary}" for verb in verbs]
    lines += ["", "swift-mega VERB --help shows a verb's options and settings; --version the version."]
    return "\n".join(lines) + "\n"


def verb_help(verb: Verb, kinds: Kinds = DEFAULTS) -> str:
    """Usage, the verb's own options, then its settings by section, each with flags, type, default and help.

    kinds: the tuner and the objective whose settings are shown.
    """
    lines = [line for usage in verb.usage for line in _wrapped(f"usage: swift-mega {usage}", indent=8)]
    lines += ["", *_wrapped(verb.description)]
    if verb.options:
        lines += ["", "options:"]
        for option in verb.options:
            lines += _entry(_option_name(option), option.help)
    taken = [setting for key, setting in settings(kinds).items() if verb.takes(key)]
    if verb.recipe:
        lines += ["", *_wrapped(RECIPE_HELP)]
    section = ""
    for setting in taken:
        if setting.section != section:
            section = setting.section
            lines += ["", f"{section}: {(sections(kinds)[section].__doc__ or '').splitlines()[0]}"]
        lines += _setting_entry(setting, defaults=dict(verb.defaults))
    return "\n".join(lines) + "\n"


def _wrapped(text: str, *, indent: int = 0) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def _option_name(option: Option) -> str:
    return f"--{option.name} {option.value}".rstrip()


def _setting_entry(setting: Setting, *, defaults: dict[str, str]) -> list[str]:
    flags = [f"--{flag}" for flag in setting.flags] or [f"--{setting.key}"]
    default = defaults.get(setting.key) or _default(setting)
    what = setting.help or setting.key.partition(".")[2].replace("_", " ")
    kind = " | ".join(setting.choices) or _kind(setting)
    return _entry(", ".join(flags), f"{what}. [{setting.key}: {kind}{default and f'; default {default}'}]")


def _default(setting: Setting) -> str:
    if setting.default is None or setting.default in ((), {}):
        return ""
    if isinstance(setting.default, tuple):
        return ",".join(setting.default)
    return setting.default if isinstance(setting.default, str) else json.dumps(setting.default)


def _kind(setting: Setting) -> str:
    if setting.table:
        return f"mapping, or {setting.key}.NAME=value"
    return {bool: "true | false", int: "whole number", float: "number", str: "text"}[setting.item] + " …" * setting.many


def _entry(name: str, text: str) -> list[str]:
    wrapped = textwrap.wrap(text, WIDTH - INDENT, break_long_words=False, break_on_hyphens=False)
    if len(name) + 2 >= INDENT:
        return [f"  {name}", *(" " * INDENT + line for line in wrapped)]
    first, *rest = wrapped
    return [f"  {name}".ljust(INDENT) + first, *(" " * INDENT + line for line in rest)]
