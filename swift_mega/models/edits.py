"""An edit: what a family changes in Megatron's layers, with everything that follows from the change.

A family lists its edits in `Settings.edits`. The class of an edit is beside the module that it puts into the layers (modules/), and has its
sizes as fields. models/specs.py applies edits in order. Layouts, adapters, the memory formula and the count of operations ask them. None of
these know which edits there are, so a new kind of attention is one module and one family.
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Self

from swift_mega.ops.kernels import Kernels, Use
from swift_mega.parallel.layout import Layout, ModelShape


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What an edit may build a layer of: Transformer Engine's classes, or Megatron's local ones and ours."""

    shape: ModelShape
    norm: type
    """The norm before attention and MLP; not fused into a linear."""
    column: type
    """The column-parallel linear, without a norm."""
    row: type
    kernels: Kernels
    """Which form of each op runs (ops/kernels.py)."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A change of Megatron's layers. Every method has a default: nothing changes."""

    layers: tuple[bool, ...] | None = None
    """Per layer: whether it has this edit. None: every layer has it."""

    no_memory_formula: ClassVar[str | None] = "attention of its own kind"
    """What the memory formula (memory/memory.py) does not know, in words; None: it knows layers with this edit."""
    normalises_queries: ClassVar[bool] = False
    """Whether queries and keys are normalised, where Megatron's qk_layernorm does not say so. The memory formula reads it."""

    replaces_attention: ClassVar[bool] = False
    """Whether a layer with this edit has no attention."""
    own_norm: ClassVar[bool] = False
    """Whether it has norms of the model's kind that are ours even where the other norms are Transformer Engine's."""
    attention_case: ClassVar[Mapping[str, bool]] = MappingProxyType({})
    """Fields of AttentionCase (ops/attention.py) that it sets."""

    def ops(self) -> Sequence[Use]:
        """The ops of the registry (ops/kernels.py) that its own modules run."""
        return ()

    def edit(self, spec: Any, parts: Parts) -> None:
        """Changes the spec (Megatron's ModuleSpec) of a layer that has this edit."""

    def built(self, chunk: Any, norm: Any) -> None:
        """Changes a chunk of the model (Decoder in models/build.py) that Megatron has built. norm: as in `Parts`."""

    def limits(self, shape: ModelShape) -> ModelShape:
        """`shape` with what layouts must know: what tensor ranks share, and why they or context ranks cannot."""
        return shape

    def check_layout(self, layout: Layout) -> None:
        """UserError where the layer cannot be sharded so, for what `limits` has no field."""

    def megatron_fields(self) -> Mapping[str, Any]:
        """Fields of Megatron's TransformerConfig that make Megatron accept the edited spec."""
        return {}

    def attention_linears(self) -> Collection[str] | None:
        """Names of attention's linears in Megatron, which adapters and FP8 take; None: those of Megatron's own attention."""
        return None

    def attention_weights(self, shape: ModelShape) -> int | None:
        """Number of elements in the matrices of attention that one token is multiplied with; None: those of Megatron's own attention."""
        return None

    def more_parameters(self, shape: ModelShape, tensor: int) -> int:
        """Parameters of a layer on one of `tensor` ranks beyond those of Megatron's layer. Request where there is a memory formula."""
        return 0

    def is_in(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has this edit."""
        return self.layers is None or self.layers[layer]

    def only(self, layers: Sequence[int]) -> Self:
        """The same for a model that consists of these layers only."""
        return self if self.layers is None else replace(self, layers=tuple(self.layers[layer] for layer in layers))


def bound(module: Any, **fixed: Any) -> type:
    """A class that builds `module` with `fixed` arguments: every place of a Megatron spec takes a class."""

    def start(self: Any, *args: Any, **given: Any) -> None:
        module.__init__(self, *args, **{**given, **fixed})

    return type(module.__name__, (module,), {"__init__": start})


def attention_of(spec: Any) -> Any:
    """The submodules of a layer's attention: its linears, norms and core attention."""
    return spec.submodules.self_attention.submodules


def mlp_of(spec: Any) -> Any:
    """The submodules of a layer's MLP: its linears, or router and experts."""
    return submodules_of(spec.submodules.mlp)


def submodules_of(module: Any) -> Any:
    """Submodules of a module's spec; newer Megatron versions have a partial function in its place."""
    return module.keywords["submodules"] if isinstance(module, functools.partial) else module.submodules
