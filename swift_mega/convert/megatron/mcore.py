"""Megatron-core's own checkpoints (torch_dist): this rank's part to and from one, in any layout.

The directory is laid out as Megatron-LM lays its own (`release/` and a tracker file), with the Hugging Face side beside it:
config, tokenizer, and the dtype of every source tensor, so that the way back is bit-exact.
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
"""What modules keep beside their tensors. Which of them have one differs between Transformer Engine and Megatron's own modules."""
TRAINING = ("optimizer", "rng_state", "rerun_state", "opt_param_scheduler", "chained_")
"""How keys of a training run's state begin."""
SKIPPED = (*TRAINING, "common_state")
"""How keys begin that hold no weight; the last is what older Megatrons have in common.pt."""


def widest(checkpoint: TensorSource, family: Family | None = None) -> torch.dtype:
    """The dtype that holds every tensor of a checkpoint exactly; UserError where one is quantised.

    family: of the checkpoint; what it derives from the config, such as masks, is not read, and may be of any dtype.
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
    """Writes the part's weights as a torch_dist checkpoint, which appears whole or not at all. Collective.

    UserError where something is there already and `overwrite` does not say to replace it.
    """
    target = Path(directory)
    with staged_together(target, overwrite=overwrite, needed=_bytes_in_all(part)) as staging:
        agree(on_first_rank(lambda: begin(staging, source, part.settings), target))
        agree(save_state(_sharded(part, groups), staging, target))
        agree(on_first_rank(lambda: complete(staging), target))


def save_state(state: Mapping[str, Any], staging: Path, target: Path) -> str | None:
    """Megatron's own save, with what marks a checkpoint without a training run; returns what went wrong."""
    try:
        dist_checkpointing.save({**state, "iteration": 0, "checkpoint_version": 3.0}, str(staging / RELEASE))
    except (OSError, CheckpointingException, CheckpointException) as error:
        free = (
            f"{free_bytes(staging):,} bytes are free"  # torch says where its writer stopped, not that the disk is full
        )
        return f"cannot write {target}: {reason_of(error)} ({free}); free the space or choose another --output"
    return None


def begin(staging: Path, source: TensorSource, settings: Settings) -> None:
    """All of a checkpoint but its weights and its tracker file."""
    kinds = {name: NAMES[entry.dtype] for name, entry in source.entries.items()}
    (staging / RELEASE).mkdir()
    beside = staging / COMPANIONS
    beside.mkdir()
    copy_companions(source.directory, beside)
    drop_quantization(beside)
    (beside / DTYPES).write_text(json.dumps(kinds, indent=0))
    _keep(source, carried_of(settings, source.entries), beside)


def _bytes_in_all(part: ModelPart) -> int:
    """Of the parameters that a checkpoint of all ranks holds. Collective."""
    where, mine = part.coordinate, 0
    for held in part.held():
        replica = where.expert_data if held.expert else where.data + where.context
        whole = held.rule.pack.axis is None and part.tensor_axis(held)[0] != 0
        if not (held.copy or replica or whole):
            mine += held.parameter.nbytes
    return sum(gather(mine))


def _keep(source: TensorSource, names: Iterable[str], folder: Path) -> None:
    """Tensors that no parameter holds, as safetensors beside the checkpoint: they belong to the model on the way back."""
    entries = {name: source.entries[name] for name in names}
    if entries:
        planned = plan_files({name: (entry.dtype, entry.shape) for name, entry in entries.items()}, 1 << 62, CARRIED)
        write_headers(folder, planned)
        with Writer(folder, planned) as writer:
            for name in planned:
                writer.write(name, source.read(name))


def complete(staging: Path) -> None:
    """The tracker file, which comes last."""
    (staging / TRACKER).write_text(RELEASE)


def reason_of(error: BaseException) -> str:
    """One line; torch wraps what a rank met, and says only that there was something."""
    if isinstance(error, CheckpointException) and error.failures:
        error, _ = next(iter(error.failures.values()))
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else text[:LONGEST_REASON] + " …"


def load_mcore(part: ModelPart, groups: Groups, directory: str | Path) -> None:
    """Fills the part from a torch_dist checkpoint that was saved in any layout, by Transformer Engine's modules or Megatron's own.

    Collective. Optimizer state and the scales of FP8 are left where they are; everything else must be asked for, and be there.
    """
    state = {
        key: {name: value for name, value in chunk.items() if not FP8_STATE.search(name)}
        for key, chunk in _sharded(part, groups).items()
    }
    folder = on_every_rank(lambda: iteration_directory(directory))
    try:
        stored = read_metadata(folder).state_dict_metadata  # Megatron would run whatever is pickled there
        for value in itertools.chain.from_iterable(chunk.values() for chunk in state.values()):
            value.key = next((key for key in spellings(value.key) if key in stored), value.key)
        with torch.serialization.safe_globals(SAFE_GLOBALS):  # a training run keeps its settings beside the weights
            # Megatron calls missing what the model lacks, and unexpected what the checkpoint does (each rank its own).
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
    """What to tell the user of a checkpoint that is not of its config.json's model."""
    absent, unread = sorted(set(absent)), sorted(set(unread))
    return (
        f"{folder} does not fit its config.json: {len(absent)} tensors missing ({some(absent)}), "
        f"{len(unread)} that nothing reads ({some(unread)}){more}; use the checkpoint that belongs to this config"
    )


def iteration_directory(directory: str | Path) -> Path:
    """The folder with the tensors: the one that the tracker names, or `directory` itself."""
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
        raise UserError(f"{tracker} names {folder.name}, which is not there or not complete; copy the checkpoint again")
    return folder


def is_mcore(directory: str | Path) -> bool:
    """Whether a directory is laid out as a Megatron checkpoint."""
    return (Path(directory) / TRACKER).is_file() or (Path(directory) / "metadata.json").is_file()


def companions_of(
    directory: str | Path, model: str | Path | None = None
) -> tuple[Path, Mapping[str, torch.dtype] | None]:
    """The Hugging Face side of a checkpoint: the folder with its config, and the dtype of every tensor (None: unknown).

    model: the folder, for a checkpoint that something else wrote, such as a Megatron-LM run.
    """
    if model is not None:
        if not has_weights(model):
            return Path(model), None
        # Megatron's weights are plain: of a quantised original they are what it dequantises to.
        quantised = quantization_of(model) is not None
        return Path(model), written_dtypes(open_checkpoint(model, torch.float32 if quantised else None))
    folder = Path(directory) / COMPANIONS
    if not folder.is_dir():
        raise UserError(
            f"{directory} has no folder {COMPANIONS}/, so its Hugging Face config and tokenizer are unknown; give them with "
            "--model DIR (the Hugging Face model that it started from)"
        )
    try:
        named = read_object(folder / DTYPES)
        found = {name: TORCH_DTYPES[kind] for name, kind in named.items()}
    except (UserError, KeyError, TypeError):
        found = {}
    if not found:
        raise UserError(
            f"{folder} lacks a readable {DTYPES}, so the Hugging Face side of {directory} is unknown; "
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
        # A norm that is written under the name of one in a linear has no state of its own there.
        found[key] = {name: value for name, value in state.items() if not value.key.endswith("layer_norm__extra_state")}
    return found
