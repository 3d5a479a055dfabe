"""The interface of a tuner, and how the tuner that the settings name is found.

A tuner decides which parameters are trained and what a checkpoint of the run contains. Its methods are called in this order: `check`
before ranks start; `reshape` before the model is built; `prepare` while its weights are loaded; `attach` once they are; `trainable` before
every step; `optimizer` whenever DDP and optimizer are made; `reference` for frozen passes of an objective; `exported`, `config_edits` and
`adapter_config` for every checkpoint.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from swift_mega.config import schema
from swift_mega.convert.files.tensors import TensorSource
from swift_mega.convert.source import Source
from swift_mega.discover import choose
from swift_mega.errors import UserError
from swift_mega.models import settings as model_settings
from swift_mega.models.build import ModelPart, NamedParameter
from swift_mega.models.family import Family
from swift_mega.tuners.merged import Merged


class Tuner(ABC):
    """One per run and rank, made from its settings. A subclass overrides what it needs; the defaults train nothing and change nothing.

    What a run needs to know of it before the model is built stands in class attributes.
    """

    Settings: ClassVar[type[schema.Tuner]] = schema.Tuner
    trains_model: ClassVar[bool] = True
    """Whether parameters of the model itself may be trained. False: they are frozen, and only added parameters are trained."""
    reads_inputs: ClassVar[bool] = False
    """Whether its hooks need the real input of linears. Norms are then not fused into linears (models/specs.py)."""
    own_optimizer: ClassVar[bool] = False
    """Whether `optimizer` steps some parameters. Their gradients must be whole, so the distributed optimizer is refused."""

    peft_type: ClassVar[str | None] = None
    """PEFT's name of the adapters that it writes; None: it writes none."""

    @classmethod
    def merge(cls, base: TensorSource, adapter: str | Path) -> Merged:
        """A model with the adapter of a directory (of `peft_type`) merged in, for the writers of export/. Needs neither run nor ranks."""
        raise NotImplementedError(f"{cls.__name__} has a peft_type and no merge")

    def __init__(self, settings: schema.Tuner) -> None:
        self.settings = settings

    def check(self, family: Family, settings: model_settings.Settings) -> None:  # noqa: B027  # a tuner may have nothing to check
        """UserError where its settings do not fit the model. Before ranks start."""

    def adapted_linears(self, family: Family, settings: model_settings.Settings) -> tuple[tuple[str, ...], ...] | None:
        """For each layer, the linears that get an adapter, in the names of memory/weights.py; None: no adapters of linears."""
        return None

    def reshape(self, source: Source) -> Source:
        """The model to build and load: the source itself, or one with other settings and a view of its tensors (more layers, …)."""
        return source

    def prepare(self, named: NamedParameter) -> Callable[[Tensor], None] | None:
        """How a weight of the model is kept. None: as a plain parameter. Else a function that takes this rank's value when it is loaded.

        The function keeps the value in a form of its own (quantised, say), and the plain parameter stays empty.
        """
        return None

    @abstractmethod
    def attach(self, part: ModelPart, *, seed: int) -> None:
        """Freezes, adds and initialises parameters of this rank's part. Initial values depend only on seed and names, never on the layout.

        Called once, before Megatron's DDP wraps the chunks.
        """

    def trainable(self, step: int) -> tuple[str, ...] | None:
        """Which of the parameters in `exported` are trained in optimizer step `step` (from 1), as shell patterns of their names.

        Depends on the step alone, so that all ranks change at once. Where the answer changes, DDP and optimizer are made anew: the
        optimizer's state starts from zero. None: all that `attach` left trainable.
        """
        return None

    def owns(self, named: NamedParameter) -> bool:
        """Whether the tuner's own optimizer steps this parameter (with `own_optimizer`)."""
        return False

    def optimizer(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of the parameters that it `owns`: a torch optimizer over `groups`.

        Each group has one parameter (`params`), its NamedParameter (`named`), and the rates that Megatron's scheduler sets (`lr`,
        `weight_decay`). Clipping by the norm over all parameters, and float32 copies of bfloat16 weights, are the framework's.
        """
        raise NotImplementedError(f"{type(self).__name__} has own_optimizer and no optimizer")

    def reference(self, part: ModelPart) -> AbstractContextManager[None] | None:
        """Within it, `part` computes what the loaded model does, without the tuner. None: only a second copy of the model can."""
        return None

    def config_edits(self) -> Mapping[str, Any]:
        """Fields of config.json that differ in a checkpoint that is the whole model (after `reshape`)."""
        return {}

    @abstractmethod
    def exported(self, part: ModelPart) -> Iterator[NamedParameter]:
        """This rank's parameters that a checkpoint contains: the whole model, or the added parameters."""

    def adapter_config(self, part: ModelPart, base: str) -> dict[str, Any] | None:
        """Contents of PEFT's adapter_config.json; None where a checkpoint is the whole model (`Settings.makes_adapter`)."""
        return None


def find_tuner(settings: schema.Tuner) -> Tuner:
    """The tuner of type `settings.type`; UserError with the known types where it is unknown."""
    made = choose("swift_mega.tuners", "TUNER", settings.type, setting="tuner.type")
    if not isinstance(settings, made.Settings):
        raise UserError(
            f"tuner.type={settings.type!r} has settings of class {made.Settings.__name__}, not {type(settings).__name__}; make "
            "the run's tuner an instance of it"
        )
    return made(settings)  # type: ignore[no-any-return]
