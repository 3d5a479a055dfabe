"""Safetensors directories, written in place.

All shapes are known first, so the headers are written before any weight. Every process then writes its tensors at their offsets.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swift_mega.convert.files.finite import check_finite, is_finite
from swift_mega.convert.files.hf_files import NAMES
from swift_mega.convert.files.spans import BUFFER, MOST, flat, stacked
from swift_mega.convert.files.which_files import NAMED_BY_CONFIG, check_link
from swift_mega.errors import UserError
from swift_mega.text_files import parse_json

NOT_COPIED = re.compile(
    # weights in any format, indexes of weight files, and settings for readers of other formats
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|ggml|onnx|onnx_data|npz|npy|ot|pkl|pickle|tflite|mlmodel|nemo|distcp|tar|zip)"
    r"|.*\.index\.json|.*\.index|.*\.data-\d+-of-\d+|(tf_model|flax_model|consolidated|ggml-model)[.-].*|params\.json"
    # an adapter: transformers would load its base, or apply it
    r"|adapter_(config|model).*"
    # the state of a training run
    r"|(optimizer|scheduler|scaler|rng_state|random_states|training_args|pytorch_model_fsdp|zero_pp_rank)([._-].*)?"
    r"|trainer_state\.json|zero_to_fp32\.py|latest(_checkpointed_iteration\.txt)?"
    # files that belong to this directory only: hidden files, compiled code, our own report
    r"|\..*|.*\.pyc|.*~|(report|source_dtypes|resized)\.json",
    re.IGNORECASE,
)
"""Files of a Hugging Face directory that are not copied into an output. All others are: config, tokenizer, chat template, processor,
generation settings, code, model card, licence."""
TEMPLATES = "additional_chat_templates"
"""The folder in which transformers looks for additional chat templates (*.jinja)."""
MODULES = "modules.json"
"""The file that sentence-transformers reads first: a list of modules, each with its folder (`path`)."""


@dataclass(frozen=True)
class Planned:
    """A tensor to write: its dtype and shape, and the file and byte offset at which it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    offset: int

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def plan_files(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], max_bytes: int, stem: str = "model"
) -> dict[str, Planned]:
    """Assigns a file and an offset (header included) to each of `tensors`, in order. A file has at most max_bytes, or one tensor."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, (dtype, shape) in tensors.items():
        size = dtype.itemsize * math.prod(shape)
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    planned = {}
    for number, names in enumerate(groups, 1):
        file = f"{stem}.safetensors" if len(groups) == 1 else f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors"
        offset = len(header_bytes({name: tensors[name] for name in names}))
        for name in names:
            dtype, shape = tensors[name]
            planned[name] = Planned(dtype, shape, file, offset)
            offset += planned[name].bytes
    return planned


def bytes_needed(planned: Mapping[str, Planned], source: Path | None = None) -> int:
    """Disk space of the planned files and of the companions of `source`, in bytes; the index and report.json are not counted."""
    ends: dict[str, int] = {}
    for place in planned.values():
        ends[place.file] = max(ends.get(place.file, 0), place.offset + place.bytes)
    return sum(ends.values()) + sum(file.stat().st_size for file in (companions(source) if source else ()))


def header_bytes(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """The header of a safetensors file with `tensors` in this order, including its 8-byte length field, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def write_headers(directory: Path, planned: Mapping[str, Planned]) -> None:
    """Creates every planned file with its header and its full size, and the index where there are several files."""
    files: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {}
    for name, tensor in planned.items():
        files.setdefault(tensor.file, {})[name] = (tensor.dtype, tensor.shape)
    for file, tensors in files.items():
        with (directory / file).open("wb") as handle:
            handle.write(header_bytes(tensors))
            handle.truncate(max(planned[name].offset + planned[name].bytes for name in tensors))
    if len(files) > 1:
        total = sum(tensor.bytes for tensor in planned.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: tensor.file for name, tensor in planned.items()},
        }
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


class Writer:
    """Writes tensors, whole or by rows, at their planned offsets. Several processes may write at once, after `write_headers`.

    sharers: how many processes on this machine write at once. A tensor that this process wrote completely is read back and hashed while
    the next ones are written. NaN and infinity are refused, except in tensors for whose name `allow_nonfinite` is true: masks that follow
    from config.json contain -inf.
    """

    def __init__(
        self,
        directory: Path,
        planned: Mapping[str, Planned],
        *,
        sharers: int = 1,
        allow_nonfinite: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self.directory, self.planned, self.allow_nonfinite = directory, planned, allow_nonfinite
        self._buffer = torch.empty(BUFFER, dtype=torch.uint8)
        self._handles: dict[str, int] = {}
        self._written: dict[str, int] = {}
        self._digests: dict[str, Future[str]] = {}
        self._pool = ThreadPoolExecutor(hashing_threads(sharers))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        while self._handles:
            os.close(self._handles.popitem()[1])

    def finish(self) -> dict[str, str]:
        """Waits until everything is on disk (fsync); returns the sha256 of each tensor that this process wrote completely."""
        with ThreadPoolExecutor(1) as disk:
            synced = [disk.submit(os.fsync, handle) for handle in self._handles.values()]
            found = {name: digest.result() for name, digest in self._digests.items()}
            for each in synced:
                each.result()
        return found

    def write(self, name: str, value: Tensor, first_row: int = 0) -> None:
        """Writes `value` as the rows of tensor `name` that begin at `first_row`. The name `X[3]` is index 3 along dim 0 of tensor X.

        UserError with the name where a number is not finite, or is outside the range of the output dtype.
        """
        whole, index = stacked(name)
        place = self.planned[whole]
        shape = place.shape if index is None else place.shape[1:]
        assert tuple(value.shape[1:]) == shape[1:], f"{name}: {tuple(value.shape)} planned as {shape}"
        assert not shape or first_row + value.shape[0] <= shape[0], f"{name}: {first_row} + {value.shape} of {shape}"
        begin = place.offset + (index or 0) * place.dtype.itemsize * math.prod(shape)
        begin += first_row * place.dtype.itemsize * math.prod(shape[1:])
        handle = self._handle(place.file)
        numbers = flat(value.detach().contiguous())
        same = numbers.dtype == place.dtype and numbers.device.type == "cpu"
        checked = not self.allow_nonfinite(whole)
        if same:
            if checked and not is_finite(numbers):
                check_finite(name, value, first_row=first_row)
            _write_all(handle, numbers, begin)
        for part in () if same else numbers.split(BUFFER // place.dtype.itemsize):
            converted = self._buffer[: part.numel() * place.dtype.itemsize].view(place.dtype)
            if not is_finite(converted.copy_(part)) and checked:
                check_finite(name, value.cpu(), place.dtype, first_row)
            begin += _write_all(handle, converted, begin)
        self._note(whole, numbers.numel() * place.dtype.itemsize)

    def _note(self, name: str, size: int) -> None:
        place = self.planned[name]
        self._written[name] = self._written.get(name, 0) + size
        assert self._written[name] <= place.bytes, f"{name} is written twice"
        if self._written[name] == place.bytes:
            self._digests[name] = self._pool.submit(digest, self.directory / place.file, place.offset, place.bytes)

    def _handle(self, file: str) -> int:
        if file not in self._handles:
            self._handles[file] = os.open(self.directory / file, os.O_WRONLY)
        return self._handles[file]


def _write_all(handle: int, numbers: Tensor, begin: int) -> int:
    """Writes contiguous CPU numbers at byte `begin`; returns how many bytes that was."""
    raw = memoryview(numbers.view(torch.uint8).numpy().data) if numbers.numel() else memoryview(b"")
    done = 0
    while done < len(raw):
        done += os.pwrite(handle, raw[done : done + MOST], begin + done)
    return done


def digest(file: Path, begin: int, size: int) -> str:
    """sha256 of `size` bytes of a file, from byte `begin`."""
    found, buffer = hashlib.sha256(), memoryview(bytearray(min(BUFFER, max(size, 1))))
    with file.open("rb", buffering=0) as handle:
        while size:
            got = os.preadv(handle.fileno(), [buffer[:size]], begin)
            if not got:
                raise UserError(f"{file} was truncated while it was read; write it again")
            found.update(buffer[:got])
            begin, size = begin + got, size - got
    return found.hexdigest()


def hashing_threads(sharers: int) -> int:
    """Hashing threads for each of `sharers` processes on this machine: its cores divided by them, at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // sharers)


def edit_config(directory: Path, edits: Mapping[str, Any]) -> None:
    """Sets fields of config.json."""
    if edits:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **edits}, indent=2) + "\n")


def copy_companions(source: Path, target: Path) -> None:
    """Copies the companions of a model directory: all its files except those that match NOT_COPIED. Links are followed."""
    for file in companions(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(file, copy)
        except OSError as error:
            if error.filename != str(file):
                raise
            raise UserError(f"{file} cannot be read: {error.strerror}; copy it from the source again") from None
    _forget_file_of_weights(target / "config.json")


def companions(source: Path) -> list[Path]:
    """The files that `copy_companions` copies; UserError where one is a broken link."""
    found = [file for file in sorted(source.iterdir()) if not NOT_COPIED.fullmatch(file.name)]
    templates = sorted((source / TEMPLATES).glob("*.jinja"))
    modules = [
        file for folder in _modules(source) for file in sorted(folder.rglob("*")) if not file.name.startswith(".")
    ]
    for file in (*found, *templates, *modules):
        check_link(file)
    return [file for file in (*found, *templates, *modules) if file.is_file()]


def _modules(source: Path) -> list[Path]:
    """Folders of further modules of a sentence-transformers model. They are copied whole: their weights are not the language model's."""
    try:
        listed = parse_json((source / MODULES).read_bytes())
        paths = {str(module["path"]) for module in listed}
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [source / path for path in sorted(paths) if re.fullmatch(r"\w[\w.-]*", path) and (source / path).is_dir()]


def _forget_file_of_weights(path: Path) -> None:
    """Removes `transformers_weights` from a config.json: the files that we write have transformers' default names."""
    try:
        config = parse_json(path.read_bytes()) if path.is_file() else {}
    except ValueError:  # code that needs config.json reports this error
        return
    if isinstance(config, dict) and config.pop(NAMED_BY_CONFIG, None) is not None:
        path.write_text(json.dumps(config, indent=2) + "\n")
