"""Finds the cause of a misfit between a checkpoint and its config.json, from the names of its tensors.

Each function in `CAUSES` looks at the missing and the unread names. It returns a message only where the names prove the cause.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from swift_mega.convert.files.hf_files import some
from swift_mega.convert.files.tensors import TensorSource
from swift_mega.models.config_json import read_config
from swift_mega.models.family import Family
from swift_mega.models.settings import Settings

WRAPPERS = {
    r"base_model\.model\.|.*\.base_layer\.|.*\.lora_[AB]\.|.*\.modules_to_save\.": "PEFT's (save what merge_and_unload returns)",
    r"(.*\.)?_orig_mod\.": "torch.compile's (save the model that was compiled)",
    r"(.*\.)?_fsdp_wrapped_module\.": "FSDP's (save a full state dict)",
    r"(.*\.)?_checkpoint_wrapped_module\.": "activation checkpointing's (save the model inside)",
    r"module\.": "DistributedDataParallel's or DeepSpeed's (save model.module)",
}
"""Pattern of the names that a wrapper of the model produces -> which wrapper it is, and what to save instead."""
OTHER_HEADS = re.compile(r"(score|classifier|qa_outputs|reward_head|value_head|multiple_choice_head)\..*")
QUANTISED = re.compile(
    r".*(\.qweight|\.qzeros|\.g_idx|\.SCB|\.absmax|quant_state\..*|\.weight_packed|_scale_inv|\.weight_scale|_blocks|_scales)"
)
MTP = re.compile(r".*\.(eh_proj|enorm|hnorm|shared_head)\..*")
"""Modules that only a layer of multi-token prediction has."""
OF_IMAGES = re.compile(
    r"(.*\.)?(vision_tower|visual|vision_model|multi_modal_projector|audio_tower|vision_embed_tokens)\..*"
)
LAYER = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)\.")
EXPERT = re.compile(r".*\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Misfit:
    """A checkpoint, the model that its config.json describes, and the tensor names in which the two differ."""

    family: Family
    settings: Settings
    checkpoint: TensorSource
    missing: Sequence[str]
    extra: Sequence[str]


def cause_of(found: Misfit) -> str:
    """The first cause that applies, with its remedy; a general remedy where none applies."""
    said = (cause(found) for cause in CAUSES)
    return next(filter(None, said), "use the config.json that belongs to these weights, or copy the weights again")


def _wrapped(found: Misfit) -> str | None:
    for pattern, whose in WRAPPERS.items():
        if any(re.match(pattern, name) for name in found.extra):
            return f"the names have the prefix of a wrapper, {whose}; save the model again without it"
    return None


def _quantised(found: Misfit) -> str | None:
    if parts := [name for name in found.extra if QUANTISED.fullmatch(name)]:
        return (
            f"{some(parts, 3)} are parts of quantised weights, and config.json states no quantization_config for them; use the "
            "config.json that belongs to these weights"
        )
    return None


def _of_images(found: Misfit) -> str | None:
    if names := [name for name in found.extra if OF_IMAGES.fullmatch(name)]:
        return f"{some(names, 2)} belong to a model of images or audio, and only its text decoder is supported; save the text decoder alone"
    return None


def _other_prefix(found: Misfit) -> str | None:
    """Every missing tensor is present under its name with one common prefix."""
    names = set(found.extra)
    plain = min(found.missing, key=len, default="")
    for name in found.extra:
        prefix = name.removesuffix(plain)
        if prefix not in ("", name) and all(prefix + one in names for one in found.missing):
            return f"every missing tensor is there under a name that begins with {prefix!r}; rename them without it"
    return None


def _headless(found: Misfit) -> str | None:
    head = found.family.head
    if list(found.missing) != [head]:
        return None
    if heads := [name for name in found.checkpoint.entries if OTHER_HEADS.fullmatch(name)]:
        return (
            f"in place of the output layer {head} there is {some(heads, 2)}: this is a reward model or a classifier, not a causal language "
            "model; give the model that it was trained from"
        )
    made = read_config(found.checkpoint.directory).get("architectures") or []
    if any(isinstance(name, str) and name.endswith("Model") and not name.endswith("HeadModel") for name in made):
        return (
            f"architectures={made} is the decoder without an output layer, and tie_word_embeddings is false: transformers would make "
            f"{head} of random values; give the *ForCausalLM model, or set tie_word_embeddings=true where it was trained so"
        )
    return (
        f"{head} is the output layer, and config.json says tie_word_embeddings=false, so the files must have it; copy the weights "
        "again, or set tie_word_embeddings=true where the model was trained so"
    )


def _predicting(found: Misfit) -> str | None:
    layers = found.settings.shape.layers
    beyond = [name for name in found.extra if (layer := LAYER.match(name)) and int(layer[1]) >= layers]
    numbers = sorted({int(LAYER.match(name)[1]) for name in beyond if MTP.fullmatch(name)})  # type: ignore[index]
    if not numbers:
        return None
    several = f"layers {numbers[0]} to {numbers[-1]} are" if len(numbers) > 1 else f"layer {numbers[0]} is"
    said = f"{several} of multi-token prediction, beyond the {layers} layers that config.json states"
    count = numbers[-1] + 1 - layers
    for field in ("num_nextn_predict_layers", "num_mtp_layers"):
        if field in found.family.reads:
            return f"{said}; set {field}={count} in config.json, and they are kept unchanged"
    return f"{said}, and nothing computes them for this model_type; remove them from the files"


def _layers(found: Misfit) -> str | None:
    """The only difference is whole layers at the end."""
    layers = found.settings.shape.layers
    numbers = {False: set[int](), True: set[int]()}
    for names, there in ((found.missing, False), (found.extra, True)):
        for name in names:
            layer = LAYER.match(name)
            if layer is None:
                return None
            numbers[there].add(int(layer[1]))
    if not numbers[False] and min(numbers[True], default=0) >= layers:
        return (
            f"config.json states {layers} layers, and layers up to {max(numbers[True])} are there; use the config.json that belongs to "
            "these weights"
        )
    held = {int(layer[1]) for name in found.checkpoint.entries if (layer := LAYER.match(name))}
    if not numbers[True] and numbers[False] == set(range(len(held), layers)) and held == set(range(len(held))):
        return (
            f"config.json states {layers} layers, and the files end with layer {len(held) - 1}; copy the rest of the weights, or use the "
            "config.json that belongs to these"
        )
    return None


def _experts(found: Misfit) -> str | None:
    experts = found.settings.shape.experts
    numbers = [int(expert[1]) for name in (*found.missing, *found.extra) if (expert := EXPERT.match(name))]
    if experts is None or not numbers or len(numbers) < len(found.missing) + len(found.extra):
        return None
    if not found.missing and min(numbers) >= experts:
        return f"config.json states {experts} experts, and expert {max(numbers)} is there; use the config.json of these weights"
    return None


CAUSES: tuple[Callable[[Misfit], str | None], ...] = (
    _wrapped, _of_images, _quantised, _other_prefix, _headless, _predicting, _layers, _experts
)  # fmt: skip
