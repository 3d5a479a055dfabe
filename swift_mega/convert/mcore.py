"""Megatron-core's own checkpoints (torch_dist): this rank's part to and from one, in any layout.

The directory is laid out as Megatron-LM lays its own (`release/` and a tracker file), with the Hugging Face side beside it:
config, tokenizer, and the dtype of every source tensor, so that the way back is bit-exact.
"""

import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from swift_mega.convert.check import carried_of, refuse_quantised
from swift_mega.convert.hf_files import DTYPES as TORCH_DTYPES
from swift_mega.convert.hf_files import NAMES, Checkpoint, some
from swift_mega.convert.hf_write import Writer, copy_companions, plan_files, write_headers
from swift_mega.convert.quantised import drop_quantization
from swift_mega.convert.save import agree, on_first_rank
from swift_mega.errors import UserError
from swift_mega.models.build import ModelPart
from swift_mega.models.family import Family, Settings
from swift_mega.outputs import cannot_write, free_bytes, open_staging, publish, staging_of
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


def widest(checkpoint: Checkpoint, family: Family | None = None) -> torch.dtype:
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
    part: ModelPart, groups: Groups, directory: str | Path, source: Checkpoint, *, overwrite: bool = False
) -> None:
    """Writes the part's weights as a torch_dist checkpoint, which appears whole or not at all. Collective.

    UserError where something is there already and `overwrite` does not say to replace it.
    """
    target = Path(directory)
    staging = staging_of(target)
    needed = _bytes_in_all(part)
    agree(on_first_rank(lambda: open_staging(target, overwrite=overwrite, needed=needed)))
    agree(on_first_rank(lambda: _begin(target, staging, source, part.settings)), staging)
    state = {**_sharded(part, groups), "iteration": 0, "checkpoint_version": 3.0}
    problem = None
    try:
        dist_checkpointing.save(state, str(staging / RELEASE))
    except (OSError, CheckpointingException, CheckpointException) as error:
        free = (
            f"{free_bytes(staging):,} bytes are free"  # torch says where its writer stopped, not that the disk is full
        )
        problem = f"cannot write {target}: {_reason(error)} ({free}); free the space or choose another --output"
    agree(problem, staging)
    agree(on_first_rank(lambda: _complete(staging, target)), staging)


def _begin(target: Path, staging: Path, source: Checkpoint, settings: Settings) -> None:
    kinds = {name: NAMES[entry.dtype] for name, entry in source.entries.items()}
    try:
        (staging / RELEASE).mkdir()
        beside = staging / COMPANIONS
        beside.mkdir()
        copy_companions(source.directory, beside)
        drop_quantization(beside)
        (beside / DTYPES).write_text(json.dumps(kinds, indent=0))
        _keep(source, carried_of(settings, source.entries), beside)
    except OSError as error:
        raise UserError(cannot_write(target, error)) from None


def _bytes_in_all(part: ModelPart) -> int:
    """Of the parameters that a checkpoint of all ranks holds. Collective."""
    where, mine = part.coordinate, 0
    for held in part.held():
        replica = where.expert_data if held.expert else where.data + where.context
        whole = held.rule.pack.axis is None and part.tensor_axis(held)[0] != 0
        if not (held.copy or replica or whole):
            mine += held.parameter.nbytes
    counted = [0] * dist.get_world_size()
    dist.all_gather_object(counted, mine)
    return sum(counted)


def _keep(source: Checkpoint, names: Iterable[str], folder: Path) -> None:
    """Tensors that no parameter holds, as safetensors beside the checkpoint: they belong to the model on the way back."""
    entries = {name: source.entries[name] for name in names}
    if entries:
        planned = plan_files({name: (entry.dtype, entry.shape) for name, entry in entries.items()}, 1 << 62, "carried")
        write_headers(folder, planned)
        with Writer(folder, planned) as writer:
            for name in planned:
                writer.write(name, source.read(name))


def _complete(staging: Path, target: Path) -> None:
    try:
        (staging / TRACKER).write_text(RELEASE)
        publish(staging, target)
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
        weights = any(Path(model).glob("*.safetensors"))
        return Path(model), {name: e.dtype for name, e in Checkpoint(model).entries.items()} if weights else None
    folder = Path(directory) / COMPANIONS
    if not folder.is_dir():
        raise UserError(
            f"{directory} has no folder {COMPANIONS}/, so its Hugging Face config and tokenizer are unknown; give them with "
            "--model DIR (the Hugging Face model that it started from)"
        )
    try:
        named = json.loads((folder / DTYPES).read_text())
        found = {name: TORCH_DTYPES[kind] for name, kind in named.items()}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError):
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
    return {
        key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in zip(_keys(part), part.chunks, strict=True)
    }
