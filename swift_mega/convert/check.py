"""Coverage: every name, shape and dtype is checked before any weight is read.

Each rank knows which Hugging Face tensors its parameters need. All ranks together must need every tensor of the checkpoint, except
carried ones and those that the family lists as derived. The checkpoint must contain every needed tensor, at the expected shape.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from swift_mega.convert.causes import Misfit, cause_of
from swift_mega.convert.files.hf_files import read_json, some
from swift_mega.convert.files.tensors import TensorSource
from swift_mega.convert.slices import together
from swift_mega.errors import UserError
from swift_mega.models.build import ModelPart
from swift_mega.models.family import Family
from swift_mega.models.quantization import FLAG
from swift_mega.models.settings import Settings

VALUE_HEAD = re.compile(r"v_head\..*|score\.weight")
"""The value head that TRL adds to a language model, and the reward head of transformers."""
PREDICT_FIELDS = ("num_nextn_predict_layers", "num_mtp_layers")
"""Fields of config.json that count layers of multi-token prediction. transformers does not compute these layers, and does not save them."""
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def needs(part: ModelPart) -> dict[str, tuple[int, ...]]:
    """The Hugging Face tensors that this rank's parameters need, with their unsharded shapes."""
    wanted: dict[str, tuple[int, ...]] = {}
    doubled: Counter[str] = Counter()
    for named in part.named_parameters():
        for name, shape in zip(named.parts, part.part_shapes(named), strict=True):
            if not named.copy:
                doubled[name] += 1
            wanted[name] = shape
    twice = [name for name, count in doubled.items() if count > 1]
    assert not twice, f"rules use {twice} for two parameters"
    return wanted


@dataclass(frozen=True)
class Coverage:
    """What happens to each tensor of a checkpoint in which no needed tensor is missing."""

    read: tuple[str, ...]
    """Names that are read into parameters."""
    carried: Mapping[str, str]
    """Read into no parameter, but kept unchanged in every Hugging Face directory made from this one; name -> what it is."""
    left: Mapping[str, str]
    """Left out; name -> why no information is lost."""


def check_coverage(
    family: Family, settings: Settings, checkpoint: TensorSource, wanted: Mapping[str, tuple[int, ...]]
) -> Coverage:
    """What happens to each tensor. UserError unless the names and shapes match `wanted`, and all that is read is plain floating point.

    wanted: name -> unsharded shape, over all ranks.
    """
    wanted = together(wanted)
    missing = sorted(wanted.keys() - checkpoint.entries.keys())
    rest = sorted(checkpoint.entries.keys() - wanted.keys())
    carried = carried_of(settings, rest)
    left = {name: "follows from config.json" for name in rest if family.derived(name)}
    if settings.tied and family.head in rest:
        check_same_head(family, checkpoint)
        left[family.head] = "the embedding again (tie_word_embeddings)"
    extra = [name for name in rest if name not in left and name not in carried]
    if missing or extra:
        raise UserError("; ".join(_differences(family, settings, checkpoint, missing, extra)))
    shapes = [
        f"{name} is {list(checkpoint.entries[name].shape)}, config.json says {list(shape)}"
        for name, shape in wanted.items()
        if checkpoint.entries[name].shape != tuple(shape)
    ]
    if shapes:
        raise UserError(
            f"{checkpoint.directory}: shapes differ from config.json: {some(shapes, 4)}; {_rows_cause(family, checkpoint, wanted)}"
            "use the config.json of this checkpoint"
        )
    refuse_quantised(checkpoint, (*wanted, *carried))
    return Coverage(tuple(wanted), carried, left)


def carried_of(settings: Settings, names: Iterable[str]) -> dict[str, str]:
    """The carried ones of these tensors: nothing computes them, and outputs keep them. name -> what it is."""
    found, layers = {}, settings.shape.layers
    for name in names:
        layer = re.match(r"(?:.*\.)?layers\.(\d+)\.", name)
        if layer and layers <= int(layer[1]) < layers + settings.predict_layers:
            found[name] = "a layer of multi-token prediction"
        elif settings.predict_prefix is not None and name.startswith(
            (settings.predict_prefix, settings.predict_prefix.removeprefix("model."))
        ):
            found[name] = "multi-token prediction"
        elif VALUE_HEAD.fullmatch(name):
            found[name] = "a value head"
    return found


def count_predicted(path: Path, settings: Settings, names: Collection[str]) -> str | None:
    """Lowers the count of multi-token prediction layers in a config.json to those that are present; returns a notice where it changed.

    names: of the tensors that the model does not compute with.
    """
    layers = {int(found[1]) for name in names if (found := re.match(r"(?:.*\.)?layers\.(\d+)\.", name))}
    there = sum(layer >= settings.shape.layers for layer in layers)
    config = read_json(path) if path.is_file() else {}
    counts = [key for key in PREDICT_FIELDS if isinstance(config.get(key), int) and config[key] > there]
    if not counts or (settings.predict_prefix and any(name.startswith(settings.predict_prefix) for name in names)):
        return None
    said = ", ".join(f"{key}={config[key]}" for key in counts)
    path.write_text(json.dumps({**config, **dict.fromkeys(counts, there)}, indent=2) + "\n")
    return (
        f"config.json says {said}, and {there or 'none'} of these layers of multi-token prediction {'is' if there == 1 else 'are'} in "
        f"the files; the written config.json says {there}"
    )


def _rows_cause(family: Family, checkpoint: TensorSource, wanted: Mapping[str, tuple[int, ...]]) -> str:
    """A remedy where the vocabulary sizes differ, the most frequent case: padding for speed, or added tokens. "" for other cases."""
    for name in (family.embedding, family.head):
        shape = wanted.get(name, ())
        found = checkpoint.entries[name].shape if name in wanted else ()
        if found[1:] == shape[1:] and found[:1] != shape[:1]:
            more, word = found[0] - shape[0], "more" if found[0] > shape[0] else "fewer"
            return f"the likely cause: {name} has {abs(more)} rows {word} than vocab_size={shape[0]}; set vocab_size={found[0]} or "
    return ""


def refuse_quantised(checkpoint: TensorSource, names: Iterable[str]) -> None:
    """UserError where the dtype of one of these tensors is not plain floating point (`FLOATS`)."""
    strange = [
        f"{name} ({checkpoint.entries[name].dtype})" for name in names if checkpoint.entries[name].dtype not in FLOATS
    ]
    if strange:
        raise UserError(
            f"{checkpoint.directory}: {some(strange, 4)} are quantised; convert the checkpoint to bfloat16 or float32 "
            f"with its own tools first, or pass {FLAG} where config.json states their format"
        )


def check_same_head(family: Family, checkpoint: TensorSource) -> None:
    """UserError where a tied model's checkpoint contains an output layer that is not an exact copy of the embedding."""
    head, embedding = checkpoint.read(family.head), checkpoint.read(family.embedding)
    if head.shape != embedding.shape or head.dtype != embedding.dtype or not torch.equal(head, embedding):
        raise UserError(
            f"{checkpoint.directory}: config.json says tie_word_embeddings=true, but {family.head} differs from "
            f"{family.embedding}; set tie_word_embeddings=false, or delete {family.head}"
        )


def _differences(
    family: Family, settings: Settings, checkpoint: TensorSource, missing: list[str], extra: list[str]
) -> list[str]:
    said = []
    if missing:
        said.append(f"{checkpoint.directory} lacks {len(missing)} tensors that config.json asks for: {some(missing)}")
    if extra:
        said.append(f"{checkpoint.directory} holds {len(extra)} tensors that nothing reads: {some(extra)}")
    said.append(cause_of(Misfit(family, settings, checkpoint, missing, extra)))
    return said
