"""What a model family is, and how the one for a Hugging Face directory is found.

A family is a table: which config fields it understands, which settings of Megatron they become, and which Hugging Face tensors fill
which Megatron parameter. The registry is the folder families/: every module with a `FAMILY` is one.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import swift_mega.models.families as folder
from swift_mega.discover import scan
from swift_mega.errors import UserError
from swift_mega.models.config_json import read_config
from swift_mega.models.packs import Pack, Transposed
from swift_mega.models.settings import Settings
from swift_mega.models.transformers_version import check_transformers


@dataclass(frozen=True)
class Rule:
    """`megatron` is one parameter name, `parts` the Hugging Face tensors that fill it; {i} is the layer, {e} the expert."""

    megatron: str
    parts: tuple[str, ...]
    pack: Pack


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: `translate` makes Settings from a transformers config, `rules` name the tensors."""

    hf_types: tuple[str, ...]
    translate: Callable[[Any], Settings]
    rules: tuple[Rule, ...]
    reads: frozenset[str]
    """Fields of config.json that `translate` understands; any other one that is not neutral stops the run."""
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Fields that are understood for these values only; any other value stops the run."""
    by_layer: frozenset[str] = frozenset()
    """Sizes for which config.json may have a list with a number per layer; `translate` checks them."""
    absent: tuple[str, ...] = ()
    """Regular expressions for tensors that a checkpoint may have and no parameter reads (derived buffers)."""
    prefix: str = ""
    """transformers' base_model_prefix. Tensor names lack it where a checkpoint was saved from the bare model, without its head."""
    bare: bool = False
    """Whether the rules are for such a checkpoint, without the prefix (`named_like`)."""
    variant: Callable[[Mapping[str, Any]], "Family"] | None = None
    """Returns this family with other rules, where names or layouts of tensors depend on fields of config.json."""
    pad_without_gradient: bool = True
    """Whether transformers passes pad_token_id as torch's padding_idx: this row of the embedding gets no gradient from lookups."""
    read_as: Mapping[str, str] = field(default_factory=dict)
    """For those of `hf_types` that transformers has no model for: its name of the same model."""

    def __post_init__(self) -> None:
        """Takes the prefix from the embedding's name, if none is given."""
        if self.rules and not self.prefix:
            object.__setattr__(self, "prefix", self.embedding.split(".")[0] + ".")

    @functools.cached_property
    def patterns(self) -> tuple[tuple[re.Pattern[str], Rule], ...]:
        """The rules as regular expressions over Megatron's names."""
        return tuple((_pattern(rule.megatron), rule) for rule in self.rules)

    def named_like(self, names: Iterable[str]) -> "Family":
        """This family, with rules for a checkpoint whose tensors have these names, with the prefix or without.

        The checkpoint is bare if no name has the prefix and at least one is a name of this family without it. So an empty list, or names of
        another model, change nothing.
        """
        names = list(names)
        if any(name.startswith(self.prefix) for name in names) or not any(self._is_bare(name) for name in names):
            return self
        rules = tuple(
            dataclasses.replace(rule, parts=tuple(part.removeprefix(self.prefix) for part in rule.parts))
            for rule in self.rules
        )
        return dataclasses.replace(self, rules=rules, bare=True)

    def _is_bare(self, name: str) -> bool:
        """Whether `name` with the prefix is a name of this family."""
        return any(pattern.fullmatch(self.prefix + name) for pattern in self.part_patterns)

    @functools.cached_property
    def part_patterns(self) -> tuple[re.Pattern[str], ...]:
        """Regular expressions for the names of Hugging Face tensors that start with the prefix."""
        parts = {part.partition("[")[0] for rule in self.rules for part in rule.parts}
        return tuple(_pattern(part) for part in sorted(parts) if part.startswith(self.prefix))

    def module(self, tensor: str) -> str:
        """The name in transformers and PEFT of the module whose weight is `tensor` in a checkpoint."""
        name = tensor.removesuffix(".weight")
        return self.prefix + name if self.bare and tensor != self.head else name

    def on_disk(self, name: str) -> str:
        """The name in the checkpoint of the tensor that is `name` in transformers' model."""
        return name.removeprefix(self.prefix) if self.bare else name

    def derived(self, tensor: str) -> bool:
        """Whether `tensor` follows from the config: checkpoints may have it, and nothing reads it."""
        names = (tensor, self.prefix + tensor) if self.bare else (tensor,)
        return any(re.fullmatch(pattern, name) for pattern in self.absent for name in names)

    def transposed(self, tensor: str) -> bool:
        """Whether `tensor` is a linear's weight that is stored transposed: [in, out]."""
        return any(pattern.fullmatch(tensor) for pattern in self.transposed_weights)

    @functools.cached_property
    def transposed_weights(self) -> tuple[re.Pattern[str], ...]:
        """Names of the weights that are stored [in, out], as regular expressions."""
        return tuple(_pattern(part) for rule in self.rules if isinstance(rule.pack, Transposed) for part in rule.parts)

    @functools.cached_property
    def embedding(self) -> str:
        """Hugging Face name of the embedding of tokens."""
        return self._alone("embedding.word_embeddings.weight")

    @functools.cached_property
    def head(self) -> str:
        """Hugging Face name of the output layer's weight; a checkpoint of a tied model may lack it."""
        return self._alone("output_layer.weight")

    def _alone(self, megatron: str) -> str:
        ((name,),) = (rule.parts for rule in self.rules if rule.megatron == megatron)
        return name

    def match(self, name: str) -> tuple[Rule, dict[str, int]]:
        """The rule that covers Megatron's parameter `name` (global layer and expert numbers), and those numbers."""
        for pattern, rule in self.patterns:
            if found := pattern.fullmatch(name):
                return rule, {key: int(value) for key, value in found.groupdict().items()}
        raise UserError(
            f"no rule of family {'/'.join(self.hf_types)} covers Megatron's parameter {name}; this combination of config fields "
            f"builds a parameter that the family does not know: remove settings of model.megatron, or add a rule to the family's file"
        )


def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{e\}", r"(?P<e>\d+)")
    return re.compile(escaped)


@functools.cache
def families() -> dict[str, Family]:
    """Every family, by Hugging Face model_type."""
    found: dict[str, Family] = {}
    for family in scan(folder, "FAMILY").values():
        for hf_type in family.hf_types:
            assert hf_type not in found, f"two families claim {hf_type}"
            found[hf_type] = family
    return found


def family_of(directory: str | Path) -> Family:
    """The family of a Hugging Face directory.

    UserError where its model_type is not supported (it lists those that are), or where the installed transformers is outside its range.
    """
    raw = read_config(directory)
    hf_type = raw["model_type"]
    if hf_type not in families():
        raise UserError(
            f"model_type {hf_type!r} of {directory} is not supported; supported: {', '.join(sorted(families()))}"
        )
    check_transformers()
    family = families()[hf_type]
    return family if family.variant is None else family.variant(raw)
