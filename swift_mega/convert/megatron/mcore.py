"""Saves and loads this rank's part of a model as a Megatron-core checkpoint (torch_dist), in any layout.

The directory has the structure of Megatron-LM's own (`release/` and a tracker file), plus a folder `hf/`: config, tokenizer, and the
dtype of every source tensor, so that converting back to Hugging Face is bit-exact.
"""

import itertools
import json
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.safe_globals import SAFE_GLOBALS
from torch.distributed.checkpoint.api import CheckpointException

from swift_mega.convert.check import carried_of, refuse_quantised
from swift_mega.convert.files.hf_files import DTYPES as TORCH_DTYPES
from swift_mega.convert.files.hf_files import NAMES, some
from swift_mega.convert.files.hf_write import Writer, copy_companions, plan_files, write_headers
from swift_mega.convert.files.quantised import drop_quantization, open_checkpoint, written_dtypes
from swift_mega.convert.files.tensors import TensorSource
from swift_mega.convert.files.which_files import CARRIED, has_weights
from swift_mega.convert.megatron.places import spellings
from swift_mega.convert.megatron.torch_dist import read_metadata
from swift_mega.convert.save import staged_together
from swift_mega.errors import UserError
from swift_mega.models.build import ModelPart
from swift_mega.models.family import Family
from swift_mega.models.quantization import quantization_of
from swift_mega.models.settings import Settings
from swift_mega.outputs import free_bytes
from swift_mega.parallel.agree import agree, gather, on_every_rank, on_first_rank
from swift_mega.parallel.groups import Groups
from swift_mega.text_files import read_object

TRACKER, RELEASE, COMPANIONS, DTYPES = "latest_checkpointed_iteration.txt", "release", "hf", "source_dtypes.json"
UNREADABLE = (
    CheckpointingException,
    CheckpointException,
    OSError,
    ValueError,
    RuntimeError,
    EOFError,
    KeyError,
    pickle.UnpicklingError,
)
LONGEST_REASON = 300
FP8_STATE = re.compile(r"_extra_state\d*$")
"""Objects that modules store beside their tensors. Transformer Engine's modules and Megatron's own differ in which of them have one."""
TRAINING = ("optimizer", "rng_state", "rerun_state", "opt_param_scheduler", "chained_")
"""Prefixes of the keys of optimizer and training state."""
SKIPPED = (*TRAINING, "common_state")
"""Prefixes of all keys that are not weights. Older versions of Megatron have the contents of common_state in common.pt."""


def widest(checkpoint: TensorSource, family: Family | None = None) -> torch.dtype:
    """The narrowest dtype that represents every tensor of a checkpoint exactly; UserError where one is quantised.

    family: of the checkpoint. Tensors that it derives from the config, such as masks, are not read and may have any dtype.
    """
    names = [name for name in checkpoint.entries if family is None or not family.derived(name)]
    refuse_quantised(checkpoint, names)
    kinds = {checkpoint.entries[name].dtype for name in names}
    wide = kinds.pop()
    for kind in kinds:
        wide = torch.promote_types(wide, kind)
    return wide


def save_mcore(
    part: ModelPart, groups: Groups, directory: str | Path, source: TensorSource, *, overwrite: bool = False
) -> None:
    """Writes the weights of all ranks' parts as a torch_dist checkpoint, which appears complete or not at all. Collective.

    UserError where `directory` exists already and `overwrite` is false.
    """
    target = Path(directory)
    with staged_together(target, overwrite=overwrite, needed=_bytes_in_all(part)) as staging:
        agree(on_first_rank(lambda: begin(staging, source, part.settings), target))
        agree(save_state(_sharded(part, groups), staging, target))
        agree(on_first_rank(lambda: complete(staging), target))


def save_state(state: Mapping[str, Any], staging: Path, target: Path) -> str | None:
    """Calls Megatron's own save, with iteration 0, as for a checkpoint without a training run. Returns the error message, or None."""
    try:
        dist_checkpointing.save({**state, "iteration": 0, "checkpoint_version": 3.0}, str(staging / RELEASE))
    except (OSError, CheckpointingException, CheckpointException) as error:
        # torch's error says where its writer stopped, not that the disk is full.
        free = f"{free_bytes(staging):,} bytes are free"
        return f"cannot write {target}: {reason_of(error)} ({free}); free the space or choose another --output"
    return None


def begin(staging: Path, source: TensorSource, settings: Settings) -> None:
    """Writes everything of a checkpoint except the weights and the tracker file."""
    kinds = {name: NAMES[entry.dtype] for name, entry in source.entries.items()}
    (staging / RELEASE).mkdir()
    beside = staging / COMPANIONS
    beside.mkdir()
    copy_companions(source.directory, beside)
    drop_quantization(beside)
    (beside / DTYPES).write_text(json.dumps(kinds, indent=0))
    _keep(source, carried_of(settings, source.entries), beside)


def _bytes_in_all(part: ModelPart) -> int:
    """Bytes of all parameters in the checkpoint, over all ranks, each counted once. Collective."""
    where, mine = part.coordinate, 0
    for named in part.named_parameters():
        replica = where.expert_data if named.expert else where.data + where.context
        whole = named.rule.pack.axis is None and part.tensor_axis(named)[0] != 0
        if not (named.copy or replica or whole):
            mine += named.parameter.nbytes
    return sum(gather(mine))


def _keep(source: TensorSource, names: Iterable[str], folder: Path) -> None:
    """Writes carried tensors as safetensors beside the checkpoint, so that converting back to Hugging Face restores them."""
    entries = {name: source.entries[name] for name in names}
    if entries:
        planned = plan_files({name: (entry.dtype, entry.shape) for name, entry in entries.items()}, 1 << 62, CARRIED)
        write_headers(folder, planned)
        with Writer(folder, planned) as writer:
            for name in planned:
                writer.write(name, source.read(name))


def complete(staging: Path) -> None:
    """Writes the tracker file. It is written last, since it marks the checkpoint as complete."""
    (staging / TRACKER).write_text(RELEASE)


def reason_of(error: BaseException) -> str:
    """An error as one line. torch wraps a rank's error in a CheckpointException without its text, so the inner error is used."""
    if isinstance(error, CheckpointException) and error.failures:
        error, _ = next(iter(error.failures.values()))
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else text[:LONGEST_REASON] + " …"


def load_mcore(part: ModelPart, groups: Groups, directory: str | Path) -> None:
    """Fills the part from a torch_dist checkpoint of any layout, saved with Transformer Engine's modules or Megatron's own. Collective.

    Optimizer state and FP8 scales are not read. All other keys of model and checkpoint must match, else UserError.
    """
    state = {
        key: {name: value for name, value in chunk.items() if not FP8_STATE.search(name)}
        for key, chunk in _sharded(part, groups).items()
    }
    folder = on_every_rank(lambda: iteration_directory(directory))
    try:
        # Read before Megatron does: read_metadata refuses pickles that could run code, and Megatron does not.
        stored = read_metadata(folder).state_dict_metadata
        for value in itertools.chain.from_iterable(chunk.values() for chunk in state.values()):
            value.key = next((key for key in spellings(value.key) if key in stored), value.key)
        # A training run stores its settings beside the weights, in types that torch must be told are safe.
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            # Megatron's "missing" keys are those that the model lacks, its "unexpected" ones those that the checkpoint lacks.
            # Each rank gets its own lists.
            loaded, unread, absent = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RETURN_ALL)
    except UNREADABLE as error:
        raise UserError(
            f"{folder} cannot be read as a torch_dist checkpoint: {reason_of(error)}; copy it again, with the "
            "config.json that belongs to it"
        ) from error
    unread = {key for key in unread if not key.startswith(SKIPPED) and not FP8_STATE.search(key)}
    agree(misfit(folder, absent, unread) if absent or unread else None)
    for key, chunk in zip(_keys(part), part.chunks, strict=True):
        rest = chunk.load_state_dict(loaded[key], strict=False)
        left = [name for name in (*rest.missing_keys, *rest.unexpected_keys) if not FP8_STATE.search(name)]
        assert not left, f"{folder}: {left} were not filled"


def misfit(folder: Path, absent: Iterable[str], unread: Iterable[str], more: str = "") -> str:
    """The error message for a checkpoint whose keys or shapes do not fit its config.json."""
    absent, unread = sorted(set(absent)), sorted(set(unread))
    return (
        f"{folder} does not fit its config.json: {len(absent)} tensors missing ({some(absent)}), "
        f"{len(unread)} that nothing reads ({some(unread)}){more}; use the checkpoint that belongs to this config"
    )


def iteration_directory(directory: str | Path) -> Path:
    """The folder with the tensors: the one that the tracker file names, or `directory` itself. UserError where it is not complete."""
    root = Path(directory)
    tracker = root / TRACKER
    if not tracker.is_file():
        if (root / "metadata.json").is_file():
            return root
        raise UserError(
            f"{root} has no {TRACKER}, so it is not a complete Megatron checkpoint; give the directory that swift-mega "
            "convert --to mcore wrote"
        )
    word = tracker.read_text().strip()
    folder = root / (word if word == RELEASE else f"iter_{int(word):07d}" if word.isdigit() else word)
    if not (folder / "metadata.json").is_file():
        raise UserError(
            f"{tracker} names {folder.name}, which does not exist or is not complete; copy the checkpoint again"
        )
    return folder


def is_mcore(directory: str | Path) -> bool:
    """Whether a directory has the structure of a Megatron checkpoint."""
    return (Path(directory) / TRACKER).is_file() or (Path(directory) / "metadata.json").is_file()


def companions_of(
    directory: str | Path, model: str | Path | None = None
) -> tuple[Path, Mapping[str, torch.dtype] | None]:
    """The Hugging Face side of a checkpoint: (folder with its config, dtype of every tensor by name or None if unknown).

    model: the Hugging Face directory to use, for a checkpoint that another program wrote, such as Megatron-LM.
    """
    if model is not None:
        if not has_weights(model):
            return Path(model), None
        # Megatron's weights are plain. Those of a quantised original were dequantised.
        quantised = quantization_of(model) is not None
        return Path(model), written_dtypes(open_checkpoint(model, torch.float32 if quantised else None))
    folder = Path(directory) / COMPANIONS
    if not folder.is_dir():
        raise UserError(
            f"{directory} has no folder {COMPANIONS}/, so its Hugging Face config and tokenizer are unknown; give them with "
            "--model DIR (the Hugging Face model that its training started from)"
        )
    try:
        named = read_object(folder / DTYPES)
        found = {name: TORCH_DTYPES[kind] for name, kind in named.items()}
    except (UserError, KeyError, TypeError):
        found = {}
    if not found:
        raise UserError(
            f"{folder} lacks a readable {DTYPES}, so the Hugging Face tensors and dtypes of {directory} are unknown; "
            "give a directory that swift-mega convert --to mcore wrote, or --model DIR"
        )
    return folder, found


def _keys(part: ModelPart) -> list[str]:
    return ["model"] if len(part.chunks) == 1 else [f"model{number}" for number in range(len(part.chunks))]


def _sharded(part: ModelPart, groups: Groups) -> dict[str, Any]:
    metadata = {"dp_cp_group": groups.data_context, "singleton_local_shards": False}
    found = {}
    for key, chunk in zip(_keys(part), part.chunks, strict=True):
        state = chunk.sharded_state_dict(metadata=metadata)
        # Norms are saved under the key of a norm fused into a linear (`layer_norm_`). Such a norm has no extra state in a checkpoint.
        found[key] = {name: value for name, value in state.items() if not value.key.endswith("layer_norm__extra_state")}
    return found
