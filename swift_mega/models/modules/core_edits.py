"""Edits of our core attention (modules/attention.py): what some families compute between the projections of a layer."""

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from swift_mega.models.edits import Edit, Parts, attention_of, bound
from swift_mega.models.modules.layer import NoNorm
from swift_mega.parallel.layout import ModelShape


@dataclass(frozen=True, kw_only=True)
class Alibi(Edit):
    """A score grows by its head's slope times the position of its key (ops/alibi.py). slopes: one per head."""

    slopes: tuple[float, ...]
    no_memory_formula = "ALiBi in attention"
    attention_case = MappingProxyType({"alibi": True})

    def edit(self, spec: Any, parts: Parts) -> None:
        """Gives the slopes to the core attention, which takes those of its tensor rank."""
        _tell_core(spec, alibi=self.slopes)

    def limits(self, shape: ModelShape) -> ModelShape:
        return replace(
            shape,
            no_context_parallel="adds biases to scores by position (ALiBi), which is not supported over context ranks",
        )


@dataclass(frozen=True, kw_only=True)
class Sinks(Edit):
    """Each head has a learned logit that takes part in its softmax (ops/sinks.py)."""

    no_memory_formula = "sinks in attention"
    attention_case = MappingProxyType({"sinks": True})

    def edit(self, spec: Any, parts: Parts) -> None:
        """The core attention gets a parameter with the logits of its heads."""
        _tell_core(spec, sinks=True)

    def limits(self, shape: ModelShape) -> ModelShape:
        return replace(shape, no_te_context="has attention sinks, which only some of its kernels support")


@dataclass(frozen=True, kw_only=True)
class LateQKNorm(Edit):
    """Queries and keys are normalised after the rotation, in the core attention. Megatron's own norms, before it, are left out."""

    no_memory_formula = None
    normalises_queries = True
    own_norm = True

    def edit(self, spec: Any, parts: Parts) -> None:
        """Moves the two norms into the core attention."""
        attention = attention_of(spec)
        attention.q_layernorm = attention.k_layernorm = NoNorm
        _tell_core(spec, late_norm=True)


def _tell_core(spec: Any, **options: Any) -> None:
    attention = attention_of(spec)
    attention.core_attention = bound(attention.core_attention, **options)
