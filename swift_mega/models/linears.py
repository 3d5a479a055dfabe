"""Which Hugging Face modules are linears of attention and MLP: what adapters go to, and what FP8 checkpoints quantise."""

import re

from swift_mega.models.family import Family, Settings

LINEAR = re.compile(r".*\.linear_[a-z0-9_]+\.weight")
EXPERTS = re.compile(r"\.mlp\.(shared_)?experts\.")


def modules_of(family: Family, settings: Settings) -> set[str]:
    """Hugging Face names of every linear of attention and MLP; not norms, embeddings, the output layer and routers."""
    found: set[str] = set()
    for rule in family.rules:
        if LINEAR.fullmatch(rule.megatron):
            experts = range(settings.shape.experts or 0) if "{e}" in rule.megatron else range(1)
            layers = [
                i
                for i, moe in enumerate(settings.moe_layers)
                if ".mlp." not in rule.megatron or moe == (EXPERTS.search(rule.megatron) is not None)
            ]
            found.update(
                part.removesuffix(".weight").format(i=i, e=e) for part in rule.parts for i in layers for e in experts
            )
    return found
