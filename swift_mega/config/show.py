"""The resolved settings as YAML, for reading. The YAML is a valid recipe, and each line says where its value came from."""

import json
from typing import Any

from swift_mega.config.check import value_of
from swift_mega.config.load import Resolved
from swift_mega.config.tree import Kinds, settings

COMMENT_COLUMN = 56


def to_yaml(resolved: Resolved, *, only_changed: bool = False) -> str:
    """One line per setting, `key: value  # source`, under its section. Scalars are JSON, which YAML can read."""
    lines: list[str] = []
    section = ""
    kinds = Kinds(tuner=resolved.run.tuner.type, objective=resolved.run.objective.name)
    for key, setting in settings(kinds).items():
        value = value_of(resolved.run, key)
        if only_changed and value == setting.default:
            continue
        if setting.section != section:
            section = setting.section
            lines.append(f"{section}:")
        name = key.partition(".")[2]
        if setting.table and value:
            lines.append(f"  {name}:")
            lines += [_line(f"    {k}: {_text(v)}", resolved.sources[f"{key}.{k}"]) for k, v in value.items()]
        else:
            lines.append(_line(f"  {name}: {_text(value)}", resolved.sources.get(key, "default")))
    return "\n".join(lines) + "\n" if lines else "# every setting has its default\n"


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _line(text: str, source: str) -> str:
    return f"{text.ljust(COMMENT_COLUMN)}  # {source}"
