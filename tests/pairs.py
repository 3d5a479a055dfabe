"""A cover of pairs in place of a product: the cheapest cases in which every two features that can occur together do occur together.

A case's features are the kind of model, the axes of the layout (tp, pp, sp), the tuner, and settings. A cover of pairs finds faults of one
feature, or of two together. The whole product runs with --full.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import Any

import pytest

from swift_mega.parallel.layout import parse_layout

Case = tuple[Any, ...]


def pairs(features: Iterable[str]) -> set[frozenset[str]]:
    """Every feature, and every two of them."""
    named = set(features)
    return {frozenset((one,)) for one in named} | {frozenset(two) for two in combinations(named, 2)}


def cover(
    cases: Sequence[Case], features: Callable[[Case], set[frozenset[str]]], cost: Callable[[Case], float]
) -> set[int]:
    """Indices of cases that together have every feature and pair of all cases. Greedy: by what a case adds divided by its cost.

    features: what a case counts for, usually `pairs` of its words.
    """
    held = [features(case) for case in cases]
    missing, chosen = set().union(*held), set()
    while missing:
        best = max(range(len(cases)), key=lambda place: (len(held[place] & missing) / cost(cases[place]), -place))
        chosen.add(best)
        missing -= held[best]
    needed = set(chosen)
    # Drops cases that later choices made unnecessary.
    for place in sorted(chosen, key=lambda place: -cost(cases[place])):
        if held[place] <= set().union(*(held[other] for other in needed - {place}), set()):
            needed.discard(place)
    return needed


def both_tuners(cases: Iterable[tuple[str, str]]) -> list[Case]:
    """Cases (family, layout), each with full fine-tuning and with LoRA."""
    return [(*case, tuner) for case in cases for tuner in ("full", "lora")]


def covering(
    cases: Sequence[Case], features: Callable[[Case], set[frozenset[str]]], cost: Callable[[Case], float] | None = None
) -> list[Any]:
    """All cases as pytest's parameters; those outside the cover are marked `full`."""
    chosen = cover(cases, features, cost or cost_of)
    return [
        pytest.param(*case, marks=() if place in chosen else (pytest.mark.full,), id="-".join(map(str, case)))
        for place, case in enumerate(cases)
    ]


def of_layouts(kinds: Callable[[str], str]) -> Callable[[Case], set[frozenset[str]]]:
    """Features of cases (family, layout, tuner, ...): each family and each layout at least once, and all pairs of: the family's kind,
    the axes of the layout (whatever their sizes), the tuner and further settings."""

    def features(case: Case) -> set[frozenset[str]]:
        family, layout, *rest = case
        axes = {word if word.startswith("etp") else word.rstrip("0123456789") for word in layout.split("-")}
        words = {kinds(family), *axes, *(f"{place}:{value}" for place, value in enumerate(rest))}
        return pairs(words) | {frozenset((f"family {family}",)), frozenset((f"layout {layout}",))}

    return features


def all_pairs(case: Case) -> set[frozenset[str]]:
    """Features of cases in which every value is a setting."""
    return pairs(f"{place}:{value}" for place, value in enumerate(case))


def once(case: Case) -> set[frozenset[str]]:
    """Features of cases (family, layout, tuner): each once, for tests whose claim is about the layout alone."""
    return {frozenset((f"{place}:{value}",)) for place, value in enumerate(case)}


def cost_of(case: Case) -> float:
    """Rough CPU seconds of a case (family, layout, tuner, ...). The number of messages grows with the square of the ranks."""
    world = parse_layout(case[1])[1]
    return (1 + world + world**2 / 2) * (1.4 if "lora" in case else 1.0)


def kind(family: str) -> str:
    """The features by which the parallel code of families differs."""
    for words, name in _KINDS:
        if any(word in family for word in words.split()):
            return name
    return "dense"


_KINDS = (
    ("qwen3_next", "delta"),
    ("deepseek kimi", "latent"),
    ("moe mixtral gpt_oss dots minimax", "experts"),
    ("tied gpt2 bloom", "tied"),
    ("falcon bigcode neox phi3 mpt", "joined"),  # one Hugging Face tensor for queries, keys and values
)
