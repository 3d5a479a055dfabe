"""Which fields of a config.json transformers does not read: those change nothing that it computes.

A field counts as read if its name occurs in transformers' code for the model type: as a field of the config class or an alias of one, as
an attribute of a config, or as a string that `getattr` or a dict of keyword arguments is called with. The code is parsed and never
imported. This takes some milliseconds per model, and happens only where config.json has a field that its family does not know.
"""

import ast
import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from swift_mega.errors import UserError
from swift_mega.models.config_json import read_config
from swift_mega.models.family import Family

FUNCTIONS = frozenset({"getattr", "hasattr", "setattr"})
METHODS = frozenset({"pop", "get", "setdefault"})
"""Functions, and methods of a dict, that take a field's name as a string."""
SHARED = (
    "configuration_utils.py", "modeling_rope_utils.py", "masking_utils.py", "modeling_layers.py", "cache_utils.py",
    "integrations/sdpa_attention.py", "integrations/flash_attention.py", "integrations/flex_attention.py",
    "integrations/eager_paged.py", "integrations/moe.py", "modeling_flash_attention_utils.py",
)  # fmt: skip
"""Files of transformers that get the config of every model."""


def unread_fields(directory: str | Path, family: Family, known: Set[str], others: Mapping[str, Any]) -> dict[str, Any]:
    """Of `others`, which the family does not know, the fields that transformers does not read; UserError where it reads one, or may."""
    if not others:
        return {}
    raw = read_config(directory)
    read_as = family.read_as.get(raw["model_type"], raw["model_type"])
    same = {alias for alias, field in aliases(read_as).items() if field in known}
    same |= {field for alias, field in aliases(read_as).items() if alias in known}
    rest = {key: value for key, value in others.items() if key not in same}
    newer = _newer(raw.get("transformers_version"))
    if read := sorted(key for key in rest if newer or key in read_by_transformers(read_as)):
        listed = ", ".join(f"{key}={rest[key]!r}" for key in read)
        who = (
            f"transformers {newer}, which wrote it and is newer than the one here, may read"
            if newer
            else "transformers reads"
        )
        raise UserError(
            f"{directory}/config.json has fields that family {'/'.join(family.hf_types)} does not know: {listed}; {who} them, so "
            "they may change what the model computes. Remove them if they don't, or add them to the family's file"
        )
    return rest


def _newer(written_by: object) -> str | None:
    """The version of transformers that wrote a config, where it is newer than the installed one; else None."""
    from packaging.version import InvalidVersion, Version
    from transformers import __version__

    try:
        return str(written_by) if Version(str(written_by)).release > Version(__version__).release else None
    except InvalidVersion:
        return None


def aliases(model_type: str) -> dict[str, str]:
    """transformers' aliases of fields, and the fields that they mean."""
    return dict(_config_class(model_type).attribute_map)


@functools.cache
def read_by_transformers(model_type: str) -> frozenset[str]:
    """Names of fields that transformers declares for a model type or that its code reads."""
    import transformers

    config = _config_class(model_type)
    declared = {field.name for field in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else set()
    declared |= set(inspect.signature(config.__init__).parameters)  # before transformers 5 a config was not a dataclass
    declared |= config.attribute_map.keys() | set(config.attribute_map.values())
    classes = [
        Path(inspect.getfile(base)) for base in config.__mro__ if base.__module__.startswith("transformers.models.")
    ]
    folder, root = classes[0].parent, Path(inspect.getfile(transformers)).parent
    models = [*folder.glob("modeling_*.py"), *(root / name for name in SHARED if (root / name).is_file())]
    return frozenset(declared).union(*map(_names, [*classes, *models]))


def _config_class(model_type: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]


@functools.cache
def _names(file: Path) -> frozenset[str]:
    """Names that a file reads from a config. In a file of config classes, `self` is a config."""
    of_configs = file.name.startswith("configuration_") or file.name == "modeling_rope_utils.py"
    return frozenset(_asked(ast.parse(file.read_text(encoding="utf-8")), of_configs))


def _asked(tree: ast.Module, of_configs: bool) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_config(node.value, of_configs):
            yield node.attr
        elif isinstance(node, ast.Call):
            yield from _asked_by_string(node, of_configs)
        elif isinstance(node, ast.Subscript) and _is_kwargs(node.value, of_configs):
            yield from _strings([node.slice])


def _asked_by_string(call: ast.Call, of_configs: bool) -> Iterator[str]:
    name = call.func
    if isinstance(name, ast.Name) and name.id in FUNCTIONS and _is_config(call.args[0], of_configs):
        yield from _strings(call.args[1:2])
    elif isinstance(name, ast.Attribute) and name.attr in METHODS and _is_kwargs(name.value, of_configs):
        yield from _strings(call.args[:1])


def _is_config(owner: ast.expr, of_configs: bool) -> bool:
    word = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
    return word.lower().endswith("config") or (of_configs and word == "self")


def _is_kwargs(owner: ast.expr, of_configs: bool) -> bool:
    return of_configs and isinstance(owner, ast.Name) and owner.id.endswith(("kwargs", "config_dict"))


def _strings(found: Sequence[ast.expr]) -> Iterator[str]:
    yield from (one.value for one in found if isinstance(one, ast.Constant) and isinstance(one.value, str))
