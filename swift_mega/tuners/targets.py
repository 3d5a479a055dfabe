"""Which linears get an adapter: names of Hugging Face and PEFT are matched to Megatron's fused linears.

A fused linear (query, key and value; gate and up) contains several Hugging Face linears, and a name may select only some of them.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from swift_mega.errors import UserError
from swift_mega.models.build import ModelPart, NamedParameter
from swift_mega.models.family import Family
from swift_mega.models.linears import LINEAR, STACKED, modules_of
from swift_mega.models.settings import Settings

ALL = "all-linear"


@dataclass(frozen=True)
class Target:
    """A Megatron linear of this rank, its weight, and which of its Hugging Face linears get an adapter."""

    linear: Any
    """An nn.Module. Typed as Any, because attributes are added to it that its class does not declare."""
    named: NamedParameter
    parts: tuple[bool, ...]
    index: int | None
    """Number of the expert on this rank, in a grouped linear; None for a linear that is not grouped."""


def linear_names(family: Family, settings: Settings) -> list[str]:
    """The last parts of the names of a model's linears, as in PEFT's target_modules."""
    return sorted({module.rsplit(".", 1)[1] for module in modules_of(family, settings)})


def wanted(module: str, targets: Collection[str]) -> bool:
    """Whether `targets` selects a Hugging Face module by PEFT's rule: by its full name or by the last parts of it."""
    words = module.split(".")
    return ALL in targets or any(".".join(words[first:]) in targets for first in range(len(words)))


def check_targets(family: Family, settings: Settings, targets: Sequence[str]) -> None:
    """UserError where a target selects no linear of this model."""
    modules, names = modules_of(family, settings), linear_names(family, settings)
    if not targets:
        raise UserError(f"tuner.target_modules is empty; choose all-linear, or from {', '.join(names)}")
    for target in targets:
        if target not in modules and not any(wanted(module, (target,)) for module in modules):
            raise UserError(
                f"tuner.target_modules: {target!r} names no linear of this model; choose all-linear, or from {', '.join(names)}"
            )


_PARTS = {
    ("linear_qkv", 3): ("query", "key", "value"), ("linear_qkv", 1): ("joined_qkv",), ("linear_proj", 1): ("output",),
    ("linear_fc1", 2): ("gate", "up"), ("linear_fc1", 1): ("joined_gate_up",), ("linear_fc2", 1): ("down",),
}  # fmt: skip


def adapted_linears(family: Family, settings: Settings, targets: Sequence[str]) -> tuple[tuple[str, ...], ...] | None:
    """For each layer, the linears that `targets` selects, in the names of memory/weights.py; None where the model has other linears."""
    found: list[list[str]] = [[] for _ in settings.layer_kinds]
    present = modules_of(family, settings)
    for rule in family.rules:
        parts = _PARTS.get((rule.megatron.split(".")[-2], len(rule.parts))) if LINEAR.fullmatch(rule.megatron) else ()
        if parts is None:
            return None
        for layer, chosen in enumerate(found):
            for part, name in zip(parts, rule.parts, strict=False):
                module = family.module(name).format(i=layer, e=0)
                if module in present and wanted(module, targets):
                    chosen.append(part)
    return tuple(map(tuple, found))


def find_targets(part: ModelPart, targets: Sequence[str]) -> Iterator[Target]:
    """This rank's linears that get an adapter."""
    owners = {
        id(parameter): module
        for chunk in part.chunks
        for module in chunk.modules()
        for parameter in module.parameters(recurse=False)
    }
    # A set, since an adapter may name thousands of experts.
    asked = frozenset(targets)
    for named in part.named_parameters():
        if not LINEAR.fullmatch(named.name) or STACKED.fullmatch(named.rule.parts[0]):
            continue
        chosen = tuple(wanted(part.family.module(name), asked) for name in named.parts)
        if any(chosen):
            linear = owners[id(named.parameter)]
            local = next(name for name, value in linear.named_parameters(recurse=False) if value is named.parameter)
            yield Target(linear, named, chosen, int(local.removeprefix("weight")) if local != "weight" else None)
