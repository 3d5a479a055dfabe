"""Which files of a directory are its weights: exactly those that transformers and PEFT read.

transformers reads the file that config.json's `transformers_weights` names, else model.safetensors, else the files listed in
model.safetensors.index.json; it ignores all others (its modeling_utils, `_get_resolved_checkpoint_files`). PEFT reads
adapter_model.safetensors. In addition, a complete set of numbered files without an index is read. Pickles are never read.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from swift_mega.convert.files.header import read_json, some
from swift_mega.errors import UserError

MODEL, ADAPTER, CARRIED = "model", "adapter_model", "carried"
"""How the names of weight files begin: of a model, of a PEFT adapter, and of carried tensors beside a Megatron checkpoint."""
INDEX = ".safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
NAMED_BY_CONFIG = "transformers_weights"
"""The field of config.json that names the weight file, or its index."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Found:
    """The files to read, and the index that lists them, if there is one."""

    files: tuple[Path, ...]
    index: Path | None = None


def has_weights(directory: str | Path, stem: str = MODEL) -> bool:
    """Whether there are files that `weight_files` would read; the set may be incomplete."""
    folder = Path(directory)
    names = _named(folder) if stem == MODEL else None
    present = [folder / name for name in (names or f"{stem}.safetensors", f"{stem}{INDEX}")]
    return any(file.is_file() or file.is_symlink() for file in present) or bool(_numbered(folder, stem))


def stem_of(directory: str | Path) -> str:
    """ADAPTER for a directory with a PEFT adapter and neither config.json nor weights of a model; else MODEL."""
    folder = Path(directory)
    alone = (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").exists() and not has_weights(folder)
    return ADAPTER if alone and has_weights(folder, ADAPTER) else MODEL


def weight_files(directory: Path, stem: str = MODEL) -> Found:
    """The files that contain the weights; UserError with the reason where there is no usable set."""
    if not directory.is_dir():
        raise UserError(
            f"model directory {directory} does not exist; give the path of a Hugging Face checkpoint directory"
        )
    named = _named(directory) if stem == MODEL else None
    whole, index = directory / (named or f"{stem}.safetensors"), directory / (named or f"{stem}{INDEX}")
    if named is None or not named.endswith(INDEX):
        check_link(whole)
        if whole.exists() or named is not None:
            return Found((whole,))
    check_link(index)
    if index.is_file() or named is not None:
        return Found(_listed(directory, index), index)
    numbered = _numbered(directory, stem)
    if not numbered:
        raise UserError(_nothing(directory, stem))
    if len(set(numbered.values())) > 1 or len(numbered) != next(iter(numbered.values())):
        raise UserError(
            f"{directory} has {len(numbered)} of {max(numbered.values())} numbered safetensors files and no index; copy the "
            "missing ones"
        )
    return Found(tuple(numbered))


def unread(directory: str | Path) -> str | None:
    """One line on further weight files and adapters in a model directory that are neither read nor copied; None: there are none."""
    folder = Path(directory)
    if not has_weights(folder):
        return None
    found = weight_files(folder)
    used = {file.name for file in (*found.files, *([found.index] if found.index else []))}
    beside = sorted(
        path.name
        for path in folder.iterdir()
        if path.name not in used
        and path.name.endswith((".safetensors", INDEX, ".gguf", ".h5", ".msgpack", *PICKLES))
        and not re.match(r"(optimizer|scheduler|scaler|training_args|rng_state)", path.name)
    )
    said = []
    if beside:
        read = some([file.name for file in found.files], 2)
        said.append(
            f"the weights of {folder} are {read}, as for transformers; {some(beside)} beside them: not read, not copied"
        )
    if (folder / ADAPTER_CONFIG).exists():
        said.append(
            f"{folder} holds an adapter too ({ADAPTER_CONFIG}), which is neither applied nor copied; give --adapters {folder} "
            "to apply it"
        )
    return "; ".join(said) or None


def check_link(path: Path) -> None:
    """UserError where `path` is a broken symbolic link."""
    if path.is_symlink() and not path.exists():
        raise UserError(
            f"{path} is a link to {os.readlink(path)}, which does not exist; copy the file that it pointed to, or delete the link"
        )


def _named(directory: Path) -> str | None:
    """The file that config.json's `transformers_weights` names, or None; UserError unless it is a safetensors file or index in there."""
    path = directory / "config.json"
    name = read_json(path).get(NAMED_BY_CONFIG) if path.is_file() else None
    if name is None:
        return None
    if not _inside(name) or not name.endswith((".safetensors", INDEX)):
        raise UserError(
            f"{path}: {NAMED_BY_CONFIG}={name!r} is neither a *.safetensors file nor an index of such in {directory}; name the "
            "file that holds the weights"
        )
    if not (directory / name).exists() and not (directory / name).is_symlink():
        raise UserError(
            f"{directory} lacks {name}, which {path.name} names ({NAMED_BY_CONFIG}); copy it from the source"
        )
    return str(name)


def _listed(directory: Path, index: Path) -> tuple[Path, ...]:
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"{index} has no weight_map; copy it from the source again")
    if odd := sorted({repr(file) for file in listed.values() if not _inside(file)}):
        raise UserError(f"{index} names {some(odd)}, which is not a file of {directory}; copy it from the source again")
    files = sorted({directory / file for file in listed.values()})
    for file in files:
        check_link(file)
    if missing := [str(file.relative_to(directory)) for file in files if not file.is_file()]:
        raise UserError(
            f"{directory} lacks {some(missing)}, which {index.name} lists; copy the missing files from the source"
        )
    return tuple(files)


def _inside(file: object) -> bool:
    """Whether `file` is a relative path that stays inside its directory."""
    if not isinstance(file, str) or not file:
        return False
    parts = PurePosixPath(file)
    return not parts.is_absolute() and ".." not in parts.parts and str(parts) == file


def _numbered(directory: Path, stem: str) -> dict[Path, int]:
    """Numbered files (stem-00001-of-00005.safetensors) -> the total that the name states."""
    found = {}
    for file in sorted(directory.glob(f"{stem}-*.safetensors")) if directory.is_dir() else ():
        if number := re.fullmatch(rf"{stem}-\d{{5}}-of-(\d{{5}})\.safetensors", file.name):
            found[file] = int(number[1])
    return found


def _nothing(directory: Path, stem: str) -> str:
    others: Sequence[str] = sorted(file.name for file in directory.glob("*.safetensors"))
    pickles = sorted(file.name for file in directory.iterdir() if file.suffix in PICKLES)
    if others:
        return (
            f"{directory} holds no {stem}.safetensors and no index of one; {some(others)} would not be read by "
            f"{'PEFT' if stem == ADAPTER else 'transformers'} either: rename it to {stem}.safetensors if it is the one to read"
        )
    if pickles:
        return (
            f"{directory} holds pickle files only ({some(pickles)}), which can run code when read and are refused; "
            "convert them to safetensors with transformers' save_pretrained first"
        )
    return f"{directory} holds no *.safetensors file; give the directory of a complete Hugging Face checkpoint"
