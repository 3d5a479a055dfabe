"""A replacement in another package's module, with its reason. It fails with its own name where its target does not exist."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One reason to replace things, and the replacements: target -> function from the old value to the new one.

    A target is "module:attribute" or "module:Class.attribute". "a|b" means whichever of the two names exists. A target with a trailing
    "?" may be absent.
    """

    name: str
    reason: str
    targets: Mapping[str, Callable[[Any], Any]]

    def install(self) -> None:
        """Looks up every target, then replaces each. RuntimeError with this patch's name if one does not exist."""
        found = [(*self._find(target), make) for target, make in self.targets.items()]
        for owner, attribute, make in found:
            setattr(owner, attribute, make(getattr(owner, attribute, None)))

    def _find(self, target: str) -> tuple[Any, str]:
        module, _, path = target.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, names = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        for name in names.rstrip("?").split("|"):
            if hasattr(owner, name) or names.endswith("?"):
                return owner, name
        raise RuntimeError(
            f"the patch {self.name!r} (swift_mega/device) replaces {target}, which is not there: this version of Megatron-core or "
            f"torch is not supported. The patch is for: {self.reason}"
        )


def replaced_by(value: Any) -> Callable[[Any], Any]:
    """A replacement that does not depend on what it replaces."""
    return lambda original: value
