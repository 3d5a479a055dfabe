"""Every name, shape and dtype accounted for, before any byte moves.

Each rank knows which Hugging Face tensors its parameters need. Together they must need every tensor of the checkpoint but those
that the family lists as derived, and the checkpoint must hold every tensor they need, at the shape they expect.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

import torch

from swift_mega.convert.hf_files import Checkpoint, some
from swift_mega.convert.slices import together
from swift_mega.errors import UserError
from swift_mega.models.build import ModelPart
from swift_mega.models.family import Family
from swift_mega.models.quantization import FLAG

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def needs(part: ModelPart) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensors that this rank's parameters are made of, with their whole shapes; each exactly once."""
    wanted: dict[str, tuple[int, ...]] = {}
    doubled: Counter[str] = Counter()
    for held in part.held():
        for name, shape in zip(held.parts, part.part_shapes(held), strict=True):
            if not held.copy:
                doubled[name] += 1
            wanted[name] = shape
    twice = [name for name, count in doubled.items() if count > 1]
    assert not twice, f"rules use {twice} for two parameters"
    return wanted


def check_coverage(
    family: Family, checkpoint: Checkpoint, wanted: Mapping[str, tuple[int, ...]], *, tied: bool
) -> None:
    """UserError unless `wanted`, of all ranks together, and the checkpoint are the same tensors."""
    wanted = together(wanted)
    missing = sorted(wanted.keys() - checkpoint.entries.keys())
    extra = [name for name in sorted(checkpoint.entries.keys() - wanted.keys()) if not _derived(family, name)]
    if tied and "lm_head.weight" in extra:
        _same_head(checkpoint)
        extra.remove("lm_head.weight")
    if missing or extra:
        raise UserError("; ".join(_differences(checkpoint, missing, extra)))
    shapes = [
        f"{name} is {list(checkpoint.entries[name].shape)}, config.json says {list(shape)}"
        for name, shape in wanted.items()
        if checkpoint.entries[name].shape != tuple(shape)
    ]
    if shapes:
        raise UserError(
            f"{checkpoint.directory}: shapes differ from config.json: {some(shapes, 4)}; use the config.json of this checkpoint"
        )
    refuse_quantised(checkpoint, wanted)


def refuse_quantised(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """UserError where one of these tensors is not of a plain floating-point dtype."""
    strange = [
        f"{name} ({checkpoint.entries[name].dtype})" for name in names if checkpoint.entries[name].dtype not in FLOATS
    ]
    if strange:
        raise UserError(
            f"{checkpoint.directory}: {some(strange, 4)} are quantised; convert the checkpoint to bfloat16 or float32 "
            f"with its own tools first, or pass {FLAG} where config.json says how they are"
        )


def _derived(family: Family, name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in family.absent)


def _same_head(checkpoint: Checkpoint) -> None:
    """A tied model's checkpoint may hold the output layer too, but only as a copy of the embedding."""
    head, embedding = checkpoint.read("lm_head.weight"), checkpoint.read("model.embed_tokens.weight")
    if head.shape != embedding.shape or head.dtype != embedding.dtype or not torch.equal(head, embedding):
        raise UserError(
            f"{checkpoint.directory}: config.json says tie_word_embeddings=true, but lm_head.weight differs from "
            "model.embed_tokens.weight; set tie_word_embeddings=false, or delete lm_head.weight"
        )


def _differences(checkpoint: Checkpoint, missing: list[str], extra: list[str]) -> list[str]:
    said = []
    if missing:
        said.append(f"{checkpoint.directory} lacks {len(missing)} tensors that config.json asks for: {some(missing)}")
    if extra:
        said.append(f"{checkpoint.directory} holds {len(extra)} tensors that nothing reads: {some(extra)}")
    layers = {int(found[1]) for name in extra if (found := re.search(r"layers\.(\d+)\.", name))}
    if missing == ["lm_head.weight"]:
        said.append("the likely cause: config.json should say tie_word_embeddings=true")
    elif extra == ["lm_head.weight"]:
        said.append("the likely cause: config.json should say tie_word_embeddings=false")
    elif layers and not missing:
        said.append(f"the likely cause: config.json's number of layers is too small (layer {max(layers)} is there)")
    else:
        said.append("use the config.json that belongs to these weights, or copy the weights again")
    return said
