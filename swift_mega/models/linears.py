"""Which Hugging Face modules are linears of attention and MLP: these get adapters, and FP8 checkpoints quantise these."""

import re

from swift_mega.models.family import Family, Rule
from swift_mega.models.modules.mla import unused
from swift_mega.models.settings import Settings

LINEAR = re.compile(r".*\.linear_[a-z0-9_]+\.weight")
EXPERTS = re.compile(r"\.mlp\.(shared_)?experts\.")
DELTA = ".linear_delta_"
"""Occurs in the parameter names of a gated delta net's linears (models/modules/gated_delta.py)."""
STACKED = re.compile(r".*\[(\d+|\{e\})\]")
"""A slice of a tensor that stacks all experts. It is not a linear of its own in Hugging Face and PEFT, and gets no adapter."""


def modules_of(family: Family, settings: Settings) -> set[str]:
    """Hugging Face names of every linear of attention and MLP, without norms, embeddings, the output layer and routers."""
    found: set[str] = set()
    for rule in family.rules:
        if LINEAR.fullmatch(rule.megatron) and not STACKED.fullmatch(rule.parts[0]) and _is_there(rule, settings):
            experts = range(settings.shape.experts or 0) if "{e}" in rule.megatron else range(1)
            layers = [i for i, (moe, delta) in enumerate(settings.layer_kinds) if _in_layer(rule, moe, delta)]
            found.update(family.module(part).format(i=i, e=e) for part in rule.parts for i in layers for e in experts)
    return found


def _in_layer(rule: Rule, moe: bool, delta: bool) -> bool:
    """Whether a layer of this kind has the linear of a rule."""
    if ".mlp." in rule.megatron:
        return moe == (EXPERTS.search(rule.megatron) is not None)
    return delta == (DELTA in rule.megatron)


def _is_there(rule: Rule, settings: Settings) -> bool:
    """Whether this model has the linear of a rule: a family's rules cover parts that only some of its models have."""
    if ".shared_experts." in rule.megatron:
        return bool(settings.shape.shared_ffn)
    return rule.megatron.split(".")[-2] not in unused(settings)
