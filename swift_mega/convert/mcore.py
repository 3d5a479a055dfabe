"""Megatron-core's own checkpoints (torch_dist): this rank's part to and from one, in any layout.

The directory is laid out as Megatron-LM lays its own (`release/` and a tracker file), with the Hugging Face side beside it:
config, tokenizer, and the dtype of every source tensor, so that the way back is bit-exact.
"""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from swift_mega.convert.check import refuse_quantised
from swift_mega.convert.hf_files import NAMES, Checkpoint, some
from swift_mega.convert.hf_write import copy_companions
from swift_mega.convert.quantised import drop_quantization
from swift_mega.convert.save import agree, on_first_rank
from swift_mega.errors import UserError
from swift_mega.models.build import ModelPart
from swift_mega.outputs import cannot_write, check_output
from swift_mega.parallel.groups import Groups

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
SKIPPED = ("optimizer.", "rng_state", "rerun_state", "opt_param_scheduler", "chained_")


def widest(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that holds every tensor of a checkpoint exactly; UserError where one is quantised."""
    refuse_quantised(checkpoint, checkpoint.entries)
    kinds = {entry.dtype for entry in checkpoint.entries.values()}
    wide = kinds.pop()
    for kind in kinds:
        wide = torch.promote_types(wide, kind)
    return wide


def save_mcore(part: ModelPart, groups: Groups, directory: str | Path, source: Checkpoint) -> None:
    """Writes the part's weights as a torch_dist checkpoint, where nothing is yet; UserError where something is.

    Collective; the tracker file, written last, makes it complete.
    """
    target = Path(directory)
    agree(on_first_rank(lambda: _begin(target, source)))
    state = {**_sharded(part, groups), "iteration": 0, "checkpoint_version": 3.0}
    try:
        dist_checkpointing.save(state, str(target / RELEASE))
    except (OSError, CheckpointingException, CheckpointException) as error:
        raise UserError(
            f"cannot write {target}: {_reason(error)}; free the space or choose another --output"
        ) from error
    dist.barrier()
    agree(on_first_rank(lambda: _complete(target)))


def _begin(target: Path, source: Checkpoint) -> None:
    check_output(target, overwrite=False)
    kinds = {name: NAMES[entry.dtype] for name, entry in source.entries.items()}
    try:
        (target / RELEASE).mkdir(parents=True)
        (target / COMPANIONS).mkdir()
        copy_companions(source.directory, target / COMPANIONS)
        drop_quantization(target / COMPANIONS)
        (target / COMPANIONS / DTYPES).write_text(json.dumps(kinds, indent=0))
    except OSError as error:
        raise UserError(cannot_write(target, error)) from None


def _complete(target: Path) -> None:
    try:
        (target / TRACKER).write_text(RELEASE)
    except OSError as error:
        raise UserError(cannot_write(target, error)) from None


def _reason(error: BaseException) -> str:
    """One line; torch wraps what a rank met, and says only that there was something."""
    if isinstance(error, CheckpointException) and error.failures:
        error, _ = next(iter(error.failures.values()))
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else text[:LONGEST_REASON] + " …"


def load_mcore(part: ModelPart, groups: Groups, directory: str | Path) -> None:
    """Fills the part from a torch_dist checkpoint that was saved in any layout. Collective; optimizer state is skipped."""
    state = _sharded(part, groups)
    folder = iteration_directory(directory)
    try:
        loaded, missing, unexpected = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RETURN_ALL)
    except UNREADABLE as error:
        raise UserError(
            f"{folder} cannot be read as a torch_dist checkpoint: {_reason(error)}; copy it again, with the "
            "config.json that belongs to it"
        ) from error
    extra = sorted(key for key in unexpected if not key.startswith(SKIPPED))
    if missing or extra:
        raise UserError(
            f"{folder} does not fit its config.json: {len(missing)} tensors missing ({some(sorted(missing))}), "
            f"{len(extra)} that nothing reads ({some(extra)}); use the checkpoint that belongs to this config"
        )
    for key, chunk in zip(_keys(part), part.chunks, strict=True):
        chunk.load_state_dict(loaded[key], strict=True)


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


def companions_of(directory: str | Path) -> tuple[Path, Mapping[str, torch.dtype]]:
    """The Hugging Face side of a checkpoint: the folder with its config, and the dtype of every tensor."""
    from swift_mega.convert.hf_files import DTYPES as kinds

    folder = Path(directory) / COMPANIONS
    try:
        named = json.loads((folder / DTYPES).read_text())
        found = {name: kinds[kind] for name, kind in named.items()}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError):
        found = {}
    if not found:
        raise UserError(
            f"{folder} lacks a readable {DTYPES}, so the Hugging Face side of {directory} is unknown; "
            "give a directory that swift-mega convert --to mcore wrote"
        )
    return folder, found


def _keys(part: ModelPart) -> list[str]:
    return ["model"] if len(part.chunks) == 1 else [f"model{number}" for number in range(len(part.chunks))]


def _sharded(part: ModelPart, groups: Groups) -> dict[str, Any]:
    metadata = {"dp_cp_group": groups.data_context, "singleton_local_shards": False}
    return {
        key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in zip(_keys(part), part.chunks, strict=True)
    }
