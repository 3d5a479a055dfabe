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


def choose(folder: ModuleType, attribute: str, name: str, *, setting: str) -> Any:
    """The entry `name`. Where there is none: UserError that names the setting and the known entries."""
    known = scan(folder, attribute)
    if name not in known:
        raise UserError(f"{setting}={name!r} is not known; known: {', '.join(sorted(known))}")
    return known[name]
