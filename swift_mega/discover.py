"""A registry is a folder. Every module in it that defines a given attribute is an entry, under the module's own name."""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from swift_mega.errors import UserError


def scan(folder: ModuleType, attribute: str) -> dict[str, Any]:
    """Module name -> `attribute`, for every module of a package that has it."""
    names = [info.name for info in pkgutil.iter_modules(folder.__path__)]
    modules = {name: importlib.import_module(f"{folder.__name__}.{name}") for name in names}
    return {name: getattr(module, attribute) for name, module in modules.items() if hasattr(module, attribute)}


def choose(folder: str, attribute: str, name: str, *, setting: str) -> Any:
    """The entry `name` of a package: `attribute` of its module of that name, or of any module where `name` is dotted.

    folder: name of the package. UserError that names the setting, and the known entries or what is wrong with the module.
    """
    module = name if "." in name else f"{folder}.{name}"
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        problem = f"{type(error).__name__}: {error}"
    else:
        if hasattr(found, attribute):
            return getattr(found, attribute)
        problem = f"module {module} has no {attribute}"
    if "." in name:
        raise UserError(
            f"{setting}={name!r} cannot be used ({problem}); name a module on PYTHONPATH that has {attribute}"
        )
    known = sorted(scan(importlib.import_module(folder), attribute))
    raise UserError(
        f"{setting}={name!r} is not known; known: {', '.join(known)}, or the dotted name of a module of yours"
    )
