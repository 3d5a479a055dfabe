"""Which Hugging Face modules are linears of attention and MLP: these get adapters, and FP8 checkpoints quantise these."""

import re

from swift_mega.models.family import Family, Rule
from swift_mega.models.settings import LayerKind, Settings

LINEAR = re.compile(r".*\.linear_[a-z0-9_]+\.weight")
EXPERTS = re.compile(r"\.mlp\.(shared_)?experts\.")
ATTENTION = ("linear_qkv", "linear_proj")
"""The linears of Megatron's own attention."""
STACKED = re.compile(r".*\[(\d+|\{e\})\]")
"""A slice of a tensor that stacks all experts. It is not a linear of its own in Hugging Face and PEFT, and gets no adapter."""


def modules_of(family: Family, settings: Settings) -> set[str]:
    """Hugging Face names of every linear of attention and MLP, without norms, embeddings, the output layer and routers."""
    found: set[str] = set()
    for rule in family.rules:
        if LINEAR.fullmatch(rule.megatron) and not STACKED.fullmatch(rule.parts[0]) and _is_there(rule, settings):
            experts = range(settings.shape.experts or 0) if "{e}" in rule.megatron else range(1)
            layers = [i for i, kind in enumerate(settings.layer_kinds) if _in_layer(rule, kind)]
            found.update(family.module(part).format(i=i, e=e) for part in rule.parts for i in layers for e in experts)
    return found


def _in_layer(rule: Rule, kind: LayerKind) -> bool:
    """Whether a layer of this kind has the linear of a rule."""
    if ".mlp." in rule.megatron:
        return kind.moe == (EXPERTS.search(rule.megatron) is not None)
    replaced = [names for edit in kind.edits if (names := edit.attention_linears()) is not None]
    return rule.megatron.split(".")[-2] in (replaced[0] if replaced else ATTENTION)


def _is_there(rule: Rule, settings: Settings) -> bool:
    """Whether this model has the linear of a rule: a family's rules cover parts that only some of its models have."""
    return bool(settings.shape.shared_ffn) or ".shared_experts." not in rule.megatron
