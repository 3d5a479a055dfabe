"""An adapter of LoRA in PEFT's files: read and checked, and merged into the tensors of its base, one tensor at a time."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swift_mega.convert.check import FLOATS, check_same_head, refuse_quantised
from swift_mega.convert.files.finite import check_finite
from swift_mega.convert.files.hf_files import Checkpoint, Entry, some
from swift_mega.convert.files.quantised import written_dtypes
from swift_mega.convert.files.tensors import TensorSource
from swift_mega.convert.files.views import Untied
from swift_mega.convert.files.which_files import ADAPTER
from swift_mega.errors import UserError
from swift_mega.models.config_json import read_config
from swift_mega.models.family import Family, families, family_of
from swift_mega.models.quantization import FLAG
from swift_mega.models.translate import hf_config
from swift_mega.text_files import read_object
from swift_mega.tuners.merged import Merged

PREFIX = "base_model.model."
OUTPUT_LAYERS = frozenset(("lm_head", "embed_out", "output_layer", "output", "transformer.output_layer"))
"""Names of the output layer in various models."""
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    # The other initialisations (pissa, olora, corda, loftq, lora_ga) change the base weights when PEFT loads the adapter.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "bias": ("none",),
    **dict.fromkeys(("use_dora", "use_qalora", "lora_bias"), (False,)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), ({},)),
    **dict.fromkeys(("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication"), ([],)),
    **dict.fromkeys(
        ("alora_invocation_tokens", "arrow_config", "use_bdlora", "kasa_config", "velora_config", "monteclora_config"),
        (),
    ),
}
"""Fields of adapter_config.json -> the values, besides null, for which the adapter is just W + scale * B @ A. Others are refused."""


@dataclass(frozen=True)
class PeftAdapter:
    """A PEFT LoRA directory. modules: Hugging Face names of the linears that have factors."""

    checkpoint: TensorSource
    scale: float
    modules: frozenset[str]
    config: dict[str, object]
    copies: Mapping[str, str]
    """Module -> name of its whole weight, which PEFT saved beside the factors (save_embedding_layers)."""

    def delta(self, module: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """scale * B @ A, computed in `dtype`, [out, in]; UserError where a factor is not finite."""
        down, up = (self._factor(f"{PREFIX}{module}.lora_{letter}.weight", dtype) for letter in "AB")
        return (up @ down).mul_(self.scale)

    def _factor(self, name: str, dtype: torch.dtype) -> Tensor:
        value = self.checkpoint.read(name)
        check_finite(f"{self.checkpoint.directory}: {name}", value)
        return value.to(dtype)


def read_adapter_config(directory: str | Path) -> tuple[Path, dict[str, Any]]:
    """adapter_config.json of a PEFT directory: its path and its content. UserError where there is none."""
    path = Path(directory) / "adapter_config.json"
    if not path.is_file():
        raise UserError(
            f"{directory} has no adapter_config.json, so it is not a PEFT adapter; give the checkpoint directory of a LoRA run"
        )
    return path, read_object(path, remedy="copy it again")


def read_adapter(directory: str | Path) -> PeftAdapter:
    """Opens a PEFT LoRA directory and checks config, names and shapes of all tensors; UserError where something is wrong."""
    path, config = read_adapter_config(directory)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA can be merged")
    for key, plain in UNSUPPORTED.items():
        if config.get(key) not in (*plain, None):
            raise UserError(
                f"{path}: {key}={config[key]!r} is not supported here; merge this adapter with PEFT's merge_and_unload"
            )
    checkpoint = Checkpoint(directory, stem=ADAPTER)
    factors = {name for name in checkpoint.entries if ".lora_" in name}
    copies = {
        name.removeprefix(PREFIX).removesuffix(".weight").removesuffix(".base_layer"): name
        for name in checkpoint.entries.keys() - factors
        if name.startswith(PREFIX) and name.endswith(".weight")
    }
    modules = {name.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for name in factors}
    expected = {f"{PREFIX}{module}.lora_{letter}.weight" for module in modules for letter in "AB"} | set(
        copies.values()
    )
    if odd := sorted(expected ^ checkpoint.entries.keys()):
        raise UserError(
            f"{directory}: LoRA factors come in pairs A and B under {PREFIX}…, but {some(odd)} are missing or unknown"
        )
    try:
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(
            f"{path}: r={config.get('r')!r} and lora_alpha={config.get('lora_alpha')!r} must be numbers; copy it again"
        ) from None
    if rank < 1 or not math.isfinite(alpha):
        raise UserError(f"{path}: r={rank} and lora_alpha={alpha} are not a valid rank and scale; copy it again")
    refuse_quantised(checkpoint, checkpoint.entries)
    for module in sorted(modules):
        down, up = (checkpoint.entries[f"{PREFIX}{module}.lora_{letter}.weight"].shape for letter in "AB")
        if len(down) != 2 or len(up) != 2:
            raise UserError(
                f"{directory}: the factors of {module} are {list(down)} and {list(up)}, not matrices; copy them again"
            )
        if found := {down[0], up[1]} - {rank}:
            raise UserError(
                f"{directory}: {module} has rank {found.pop()}, {path.name} says r={rank}; use the adapter_config.json "
                "of this adapter"
            )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return PeftAdapter(checkpoint, scale, frozenset(modules), config, copies)


def untied_for(base: TensorSource, adapter: PeftAdapter) -> Untied | None:
    """`base` with a separate output layer, if it is a tied model and `adapter` has factors for the output layer; else None.

    Such an adapter only changes the logits: PEFT adds its product to them, and the embedding lookup is unchanged.
    """
    if not (base.directory / "config.json").is_file():
        return None
    if (config := read_config(base.directory))["model_type"] not in families():
        _refuse_head(base, adapter, config)
        return None
    family = family_of(base.directory).named_like(base.entries)
    if family.module(family.head) not in adapter.modules or not hf_config(base.directory).tie_word_embeddings:
        return None
    if adapter.config.get("ensure_weight_tying"):
        raise UserError(
            f"{adapter.checkpoint.directory}: ensure_weight_tying=true changes output layer and embedding alike, which is not supported "
            "here; merge this adapter with PEFT's merge_and_unload"
        )
    if family.head in base.entries:
        check_same_head(family, base)
    return Untied(base, head=family.head, embedding=family.embedding)


def _refuse_head(base: TensorSource, adapter: PeftAdapter, config: Mapping[str, object]) -> None:
    heads = sorted(adapter.modules & OUTPUT_LAYERS)
    if heads and config.get("tie_word_embeddings") is not False:
        raise UserError(
            f"the adapter changes {heads[0]}, and whether {base.directory} ties it to the embedding is not known for its model_type; "
            "say tie_word_embeddings=false in its config.json if its files hold both, or train an adapter without it"
        )


@dataclass(frozen=True)
class _Linear:
    """A weight of the base that the adapter changes: PEFT's name of its module, and whether it is stored transposed, [in, out]."""

    module: str
    transposed: bool


class MergedLora(Merged):
    """The sums W + scale * B @ A; UserError where the adapter does not fit the base.

    Where the model was tied and the adapter changes the output layer, `base` has a separate output layer.
    """

    def __init__(self, base: TensorSource, adapter: PeftAdapter) -> None:
        dtypes, apart = written_dtypes(base), untied_for(base, adapter)
        if apart is not None:
            dtypes[apart.head] = dtypes[apart.embedding]
        self.base, self.dtypes = apart or base, dtypes
        self.config_edits = {} if apart is None else {"tie_word_embeddings": False}
        self._adapter, self._linears = adapter, _linears(self.base, adapter)
        self.changed = self._linears.keys()

    def merged(self, name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
        """value + scale * B @ A for tensor `name`, computed in float32 or wider, rounded to `dtype`; UserError where it is not finite."""
        linear, wide = self._linears[name], torch.promote_types(dtype, torch.float32)
        delta = self._adapter.delta(linear.module, wide)
        total = value.to(wide) + (delta.t() if linear.transposed else delta)
        check_finite(name, total, dtype)
        return total.to(dtype)


def _linears(base: TensorSource, adapter: PeftAdapter) -> dict[str, _Linear]:
    """Tensor name of the base -> the linear that the adapter changes; UserError where the adapter does not fit the base."""
    family = _family(base, adapter)
    names = {
        name.removesuffix(".weight") if family is None else family.module(name): name
        for name in base.entries
        if name.endswith(".weight")
    }
    _check_copies(base, adapter, names)
    found = {}
    for module in sorted(adapter.modules):
        if module not in names:
            raise UserError(
                f"the adapter has factors for {module}, and {base.directory} has no such linear; give the model that "
                "it was trained on"
            )
        transposed = family is not None and family.transposed(names[module])
        found[names[module]] = _Linear(module, transposed)
        _check_fit(base.entries[names[module]], base, adapter, found[names[module]])
    return found


def _check_copies(base: TensorSource, adapter: PeftAdapter, names: Mapping[str, str]) -> None:
    """UserError where a whole weight in the adapter differs from the base's.

    PEFT saves the weights of embedding and output layer if they have factors, or if it finds them resized. It loads them in place of the
    base's, so they must be equal.
    """
    for module, copy in sorted(adapter.copies.items()):
        entry = base.entries[names[module]] if module in names else None
        theirs = adapter.checkpoint.entries[copy]
        same = entry is not None and entry.shape == theirs.shape
        if not same or not torch.equal(base.read(names[module]).double(), adapter.checkpoint.read(copy).double()):
            raise UserError(
                f"{adapter.checkpoint.directory} holds {copy}, a weight {list(theirs.shape)} that is not the one in {base.directory}: the "
                "adapter was trained on a model with another one (a resized vocabulary, perhaps); give that model with --model"
            )


def _family(base: TensorSource, adapter: PeftAdapter) -> Family | None:
    """The family of the base, or None: models without a family are merged by name, where all weights are stored [out, in]."""
    # fan_in_fan_out is not needed for a known family. PEFT also sets it from the type of the module.
    if known := known_family(base):
        return known
    if adapter.config.get("fan_in_fan_out"):
        raise UserError(
            f"the adapter has fan_in_fan_out=True, and which weights of {base.directory} are stored [in, out] is not known for "
            "its model_type; merge this adapter with PEFT's merge_and_unload"
        )
    return None


def known_family(base: TensorSource) -> Family | None:
    if (base.directory / "config.json").is_file() and read_config(base.directory)["model_type"] in families():
        return family_of(base.directory).named_like(base.entries)
    return None


def _check_fit(entry: Entry, base: TensorSource, adapter: PeftAdapter, linear: _Linear) -> None:
    down, up = (adapter.checkpoint.entries[f"{PREFIX}{linear.module}.lora_{letter}.weight"].shape for letter in "AB")
    want = entry.shape[::-1] if linear.transposed else entry.shape
    if (up[0], down[1]) != want:
        raise UserError(
            f"the adapter's {linear.module} is for a linear of {[up[0], down[1]]}, the model's is {list(want)}; give the "
            "model of this adapter"
        )
    if entry.dtype not in FLOATS:
        raise UserError(
            f"{base.directory}: {linear.module} is quantised ({entry.dtype}); merge into the bfloat16 or float32 model that it was "
            f"made from, or pass {FLAG}"
        )
