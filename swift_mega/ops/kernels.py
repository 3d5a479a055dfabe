"""The registry of kernels: which form of each op runs, and why.

The forms of an op compute the same. `fused` is a kernel that was written for this op. `tuned` is torch's operators with a gradient of our
own. `reference` is plain torch: it runs everywhere, and tests compare with it. The file of an op declares them as an `Op`, best first,
each with what it needs in a given case. A run asks for forms by train.kernels (`Kernels`). The first form that is allowed and lacks
nothing runs. The answer is kept for every op, device, dtype and case, so that a call pays for one lookup in a table.
"""

import functools
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from swift_mega.config.schema import KernelForm, Train
from swift_mega.errors import UserError

Kind = Literal["fused", "tuned", "reference"]
Given = tuple[torch.device, torch.dtype, Any]
"""Device, dtype, and what else decides about an op: its `case`."""


def _nothing(*given: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Form:
    """One form of an op."""

    kind: Kind
    name: str | Callable[[torch.device, torch.dtype, Any], str]
    """Shown in the header of a run."""
    run: Callable[..., Any] = _nothing
    """The function. An op of several functions (ops/blocks.py) has none here, and asks for the kind."""
    lacks: Callable[[torch.device, torch.dtype, Any], str | None] = _nothing
    """(device, dtype, case) -> what the form needs and does not have there; None: it can run."""


@dataclass(frozen=True, eq=False)
class Op:
    """An op and its forms, best first; the last one is the reference. Two ops are never equal."""

    name: str
    forms: tuple[Form, ...]

    def __post_init__(self) -> None:
        assert [form.kind for form in self.forms].count("reference") == 1 and self.forms[-1].kind == "reference"


@dataclass(frozen=True)
class Use:
    """An op that a model runs, and its case."""

    op: Op
    case: Hashable = None


@dataclass(frozen=True)
class Chosen:
    """The form that runs in a case."""

    form: Form
    given: Given
    passed_over: tuple[str, ...]
    """The better forms that a run allows, and what they need: "fused needs CUDA"."""

    @property
    def text(self) -> str:
        """Name, kind and why it is no better one: "torch (reference; fused needs CUDA)"."""
        name = self.form.name if isinstance(self.form.name, str) else self.form.name(*self.given)
        return f"{name} ({'; '.join((self.form.kind, *self.passed_over))})"


@functools.lru_cache(maxsize=4096)
def resolve(op: Op, asked: KernelForm, device: torch.device, dtype: torch.dtype, case: Hashable) -> Chosen:
    """The form of `op` that runs; UserError where a fused form is asked for and there is none, or it lacks something."""
    passed_over: list[str] = []
    for form in op.forms:
        if asked in ("auto", form.kind):
            lack = form.lacks(device, dtype, case)
            if lack is None:
                return Chosen(form, (device, dtype, case), tuple(passed_over))
            passed_over.append(f"{form.kind} needs {lack}")
    raise UserError(f"{op.name} has no {asked} form here: {'; '.join(passed_over) or 'there is none'}")


@dataclass(frozen=True)
class Kernels:
    """What a run asks for: train.kernels, and train.kernels_by_op for single ops."""

    asked: KernelForm = "auto"
    by_op: Mapping[str, KernelForm] = field(default_factory=dict)

    def of(self, op: Op) -> KernelForm:
        """What is asked for this op."""
        return self.by_op.get(op.name, self.asked)

    def form(self, op: Op, device: torch.device, dtype: torch.dtype, case: Hashable = None) -> Form:
        """The form of `op` that runs."""
        return resolve(op, self.by_op.get(op.name, self.asked), device, dtype, case).form

    def text(self, use: Use, device: torch.device, dtype: torch.dtype) -> str:
        """The form that runs, in words: name, kind, and what better forms need."""
        return resolve(use.op, self.of(use.op), device, dtype, use.case).text

    def check(self, uses: Iterable[Use], device: torch.device | None, dtype: torch.dtype) -> None:
        """UserError where these ops do not have the forms that are asked for, with the list of them; or for an op that is not among them.

        device: None where it must not be touched yet; then only ops without any such form are found.
        """
        uses = list(uses)
        names = dict.fromkeys(use.op.name for use in uses)
        for name, form in self.by_op.items():
            if name not in names:
                raise UserError(
                    f"train.kernels_by_op.{name}={form}: this run has no such op; it has {', '.join(names)}"
                )
        lacking = {}
        for use in uses:
            if self.of(use.op) == "fused" and (lack := _lack(use, device, dtype)) is not None:
                lacking[use.op.name] = lack
        if lacking:
            where = "" if device is None else f" on {device.type.upper()} in {str(dtype).removeprefix('torch.')}"
            listed = ", ".join(f"{name} ({lack})" for name, lack in lacking.items())
            source = "train.kernels=fused" if self.asked == "fused" else "train.kernels_by_op asks for fused forms"
            raise UserError(
                f"{source}, and these ops have none{where}: {listed}; set train.kernels=auto, which takes the best form that each op "
                "has, and train.kernels_by_op.OP=fused for those that must be fused"
            )


def _lack(use: Use, device: torch.device | None, dtype: torch.dtype) -> str | None:
    """Why `use` has no fused form; None: it has one."""
    fused = [form for form in use.op.forms if form.kind == "fused"]
    if not fused:
        return "there is none"
    if device is None:
        return None
    lacks = [form.lacks(device, dtype, use.case) for form in fused]
    return None if None in lacks else "; ".join(f"needs {lack}" for lack in lacks)


AUTO = Kernels()
"""The best form of every op."""


def kernels_of(train: Train) -> Kernels:
    """What the settings of a run ask for."""
    return Kernels(train.kernels, train.kernels_by_op)
