"""The files of a torch_dist checkpoint: read by box and written by chunk, without a process group, and without unsafe pickles.

A tensor is stored in chunks. Each chunk is one torch.save record in a .distcp file, and `.metadata` has its file and offset. To read a
box, the chunks that overlap it are found, and of each chunk only the bytes of the box are read.
"""

import io
import math
import os
import pickle
import weakref
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from swift_mega.convert.files.spans import SHORT, Span, flat, read_spans
from swift_mega.errors import UserError

METADATA, SUFFIX = ".metadata", ".distcp"
FILE_BYTES = 1 << 30
"""A new file is begun when the current one has this size, so that many ranks read from different files."""
UNREADABLE = (OSError, EOFError, KeyError, ValueError, RuntimeError, AttributeError, TypeError, IndexError,
              pickle.UnpicklingError, zipfile.BadZipFile)  # fmt: skip


class _Old:
    """Stand-in for classes that Megatron up to 0.15 pickled into .metadata of checkpoints with optimizer state. Nothing reads them."""


_DCP = "torch.distributed.checkpoint"
_ALLOWED = {
    f"{_DCP}.metadata": "Metadata TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata TensorProperties "
    "MetadataIndex StorageMeta _MEM_FORMAT_ENCODING",
    f"{_DCP}.filesystem": "_StorageInfo _StoragePrefix",
    f"{_DCP}.planner": "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData",
    "torch": "Size float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int32 int16 int8 uint8 bool complex64",
    "torch.serialization": "_get_layout",
    "pathlib": "Path PosixPath PurePosixPath",
    "pathlib._local": "Path PosixPath PurePosixPath",
    "collections": "OrderedDict defaultdict",
    "builtins": "dict list set",
}
"""The types allowed in a checkpoint's .metadata: records of names, sizes and places. Constructing them runs no other code."""
_OLD = {("megatron.core.dist_checkpointing.strategies.torch", name) for name in ("MCoreMetadata", "MCoreSavePlan")}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _OLD:
            return _Old
        if name in _ALLOWED.get(module, "").split():
            return super().find_class(module, name)
        raise UserError(
            f"{METADATA} of the checkpoint names {module}.{name}, which is no part of such metadata and could run any code; "
            "take the checkpoint from a source that you trust, or have its owner save it again"
        )


def read_metadata(folder: Path) -> Metadata:
    """Reads a checkpoint's .metadata; UserError where it contains other types than plain records. ValueError where it is no Metadata."""
    with (folder / METADATA).open("rb") as file:
        metadata = _MetadataUnpickler(file).load()
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError(f"{METADATA} has no record of tensors")
    return metadata


class Window(io.RawIOBase):
    """A range of bytes of an open file, as a read-only file object."""

    def __init__(self, handle: int, begin: int, length: int) -> None:
        self.handle, self.begin, self.length, self.at = handle, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = max(0, offset + (0, self.at, self.length)[whence])
        return self.at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self.length - self.at)]
        got = os.preadv(self.handle, [view], self.begin + self.at) if view else 0
        self.at += got
        return got


@dataclass(frozen=True)
class _Layout:
    """Offset, shape and stride of a tensor of torch.save in its storage."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _TensorUnpickler(pickle.Unpickler):
    """Reads offset, shape and stride of a saved tensor, without making a tensor."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor_v3")):
            return lambda storage, offset, shape, stride, *rest: _Layout(offset, tuple(shape), tuple(stride))
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module in ("torch", "torch.storage") and (name.endswith("Storage") or name in _ALLOWED["torch"].split()):
            return name
        raise pickle.UnpicklingError(f"{module}.{name} is no plain tensor")

    def persistent_load(self, pid: Any) -> Any:
        return pid


class TorchDist:
    """The tensors of a checkpoint by key; numbers are read on demand, by box."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metadata = read_metadata(folder)
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: value
            for key, value in self.metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        self._items: dict[tuple[str, tuple[int, ...]], _StorageInfo] = {
            (index.fqn, tuple(index.offset or ())): info for index, info in self.metadata.storage_data.items()
        }
        self._chunks: dict[tuple[str, int], dict[tuple[int, ...] | None, list[ChunkStorageMetadata]]] = {}
        self._handles: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A file descriptor has no meaning in another process.
        return {**self.__dict__, "_handles": {}}

    def bytes_of(self, prefixes: Sequence[str]) -> tuple[int, int]:
        """(number, bytes in the files) of the tensors and objects whose keys begin with one of `prefixes`."""
        keys, size = set(), 0
        for index, info in self.metadata.storage_data.items():
            if index.fqn.startswith(tuple(prefixes)):
                keys.add(index.fqn)
                size += info.length
        return len(keys), size

    def check_files(self, skipped: Sequence[str]) -> None:
        """ValueError or OSError where a file is missing or too short. Files that only contain keys with prefixes `skipped` are ignored."""
        ends: dict[str, int] = defaultdict(int)
        for index, info in self.metadata.storage_data.items():
            if not index.fqn.startswith(tuple(skipped)):
                ends[info.relative_path] = max(ends[info.relative_path], info.offset + info.length)
        for name, end in ends.items():
            size = os.fstat(self._handle(name)).st_size
            if size < end:
                raise ValueError(f"{name} is truncated: {size} bytes of {end}")

    def read_into(self, target: Tensor, key: str, offset: Sequence[int], lead: int) -> None:
        """Fills `target` with the box of its shape that begins at index `offset` of tensor `key`.

        lead: how many leading dims the stored tensor has that `target` lacks; the box has size 1 in them. ValueError where numbers are
        missing in the files.
        """
        target = target.view((1,) * lead + tuple(target.shape)) if lead else target
        dtype, filled = self.tensors[key].properties.dtype, 0
        for chunk in self._touched(key, tuple(offset[:lead])):
            begin = [max(a, b) for a, b in zip(offset, chunk.offsets, strict=True)]
            end = [
                min(a + n, b + m) for a, n, b, m in zip(offset, target.shape, chunk.offsets, chunk.sizes, strict=True)
            ]
            if any(b >= e for b, e in zip(begin, end, strict=True)):
                continue
            part = target[tuple(slice(b - o, e - o) for b, e, o in zip(begin, end, offset, strict=True))]
            start = [b - o for b, o in zip(begin, chunk.offsets, strict=True)]
            self._read_chunk(part, key, chunk, start, dtype)
            filled += part.numel()
        if filled != target.numel():
            raise ValueError(f"{key}: {filled} of {target.numel()} elements from {list(offset)} on are in the files")

    def _touched(self, key: str, front: tuple[int, ...]) -> Iterable[ChunkStorageMetadata]:
        """The chunks that may contain numbers whose leading indices are `front`."""
        found = self._chunks.get((key, len(front)))
        if found is None:
            found = self._chunks[key, len(front)] = defaultdict(list)
            chunks = self.tensors[key].chunks
            single = all(size == 1 for chunk in chunks for size in chunk.sizes[: len(front)])
            for chunk in chunks:
                found[tuple(chunk.offsets[: len(front)]) if single else None].append(chunk)
        return found.get(front, found.get(None, ()))

    def _read_chunk(
        self, target: Tensor, key: str, chunk: ChunkStorageMetadata, start: Sequence[int], dtype: torch.dtype
    ) -> None:
        info = self._items[key, tuple(chunk.offsets)]
        if info.transform_descriptors:
            raise ValueError(f"{key} is stored through {', '.join(info.transform_descriptors)}, which is not supported")
        handle = self._handle(info.relative_path)
        window = Window(handle, info.offset, info.length)
        begin = _data_of(window, tuple(chunk.sizes), dtype)
        # None: a view or a tensor with other strides. torch loads the whole chunk then.
        if begin is None:
            window.seek(0)
            whole = torch.load(io.BufferedReader(window), map_location="cpu", weights_only=True)
            if tuple(whole.shape) != tuple(chunk.sizes):
                raise ValueError(
                    f"{key}: a chunk of {list(chunk.sizes)} is {list(whole.shape)} in {info.relative_path}"
                )
            target.copy_(whole[tuple(slice(s, s + n) for s, n in zip(start, target.shape, strict=True))])
            return
        # For a slice of columns, one contiguous buffer avoids a read per row.
        lies_apart = not target.is_contiguous() and target.shape[-1] * dtype.itemsize < SHORT
        box = torch.empty(target.shape, dtype=dtype) if lies_apart else target
        _read_box(handle, begin, dtype, box, list(start), list(chunk.sizes))
        if lies_apart:
            target.copy_(box)

    def _handle(self, name: str) -> int:
        if name not in self._handles:
            if Path(name).name != name:
                raise ValueError(f"{METADATA} names a file {name!r}, which is not in its folder")
            handle = os.open(self.folder / name, os.O_RDONLY)
            weakref.finalize(self, os.close, handle)
            self._handles[name] = handle
        return self._handles[name]


def _data_of(window: Window, shape: tuple[int, ...], dtype: torch.dtype) -> int | None:
    """The byte of the file at which the numbers of a saved tensor begin; None where they are not stored contiguously in order."""
    with zipfile.ZipFile(window) as archive:  # type: ignore[type-var]
        by_end = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        try:
            layout = _TensorUnpickler(io.BytesIO(archive.read(by_end["data.pkl"]))).load()
        except (pickle.UnpicklingError, KeyError):
            return None
        data = by_end.get("data/0")
    numbers = dtype.itemsize * math.prod(shape)
    if not isinstance(layout, _Layout) or layout.offset or layout.shape != shape or data is None:
        return None
    if data.compress_type != zipfile.ZIP_STORED or data.file_size != numbers or not _in_order(shape, layout.stride):
        return None
    # The local zip header, since its sizes of name and extra field differ from those in the central directory.
    local = os.pread(window.handle, 30, window.begin + data.header_offset)
    return (
        window.begin
        + data.header_offset
        + 30
        + int.from_bytes(local[26:28], "little")
        + int.from_bytes(local[28:30], "little")
    )


def _in_order(shape: Sequence[int], stride: Sequence[int]) -> bool:
    size = 1
    for length, step in zip(reversed(shape), reversed(stride), strict=True):
        if length != 1 and step != size:
            return False
        size *= length
    return True


def _read_box(handle: int, begin: int, dtype: torch.dtype, target: Tensor, start: list[int], sizes: list[int]) -> None:
    """Fills `target` with the box at index `start` of a contiguous tensor of shape `sizes`, stored from byte `begin` of the file."""
    while target.dim() and target.shape[0] == 1:
        begin += start[0] * math.prod(sizes[1:]) * dtype.itemsize
        target, start, sizes = target[0], start[1:], sizes[1:]
    cut = max((dim for dim, size in enumerate(sizes) if target.shape[dim] != size), default=0)
    if cut and any(target.shape[dim] != sizes[dim] for dim in range(1, cut)):
        for row, part in enumerate(target):
            first = begin + (start[0] + row) * math.prod(sizes[1:]) * dtype.itemsize
            _read_box(handle, first, dtype, part, start[1:], sizes[1:])
        return
    for dim, index in enumerate(start):
        begin += index * math.prod(sizes[dim + 1 :]) * dtype.itemsize
    length = dtype.itemsize * math.prod(target.shape[cut:])
    stride = dtype.itemsize * math.prod(sizes[cut:])
    read_spans(handle, Span(begin, length, stride, math.prod(target.shape[:cut])), dtype, target)


class ChunkWriter:
    """Adds tensors, chunk by chunk, to a checkpoint in which Megatron has already written everything except tensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metadata = read_metadata(folder)
        self.tensors: dict[str, TensorStorageMetadata] = {}
        self.results: list[WriteResult] = []
        self._files = len(list(folder.glob(f"*{SUFFIX}")))
        self._stream: IO[bytes] | None = None

    def __enter__(self) -> "ChunkWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._stream is not None:
            self._stream.close()

    def add(self, key: str, size: Sequence[int], offset: Sequence[int], value: Tensor) -> None:
        """Writes `value` as the chunk at index `offset` of tensor `key`, whose whole shape is `size`. Both have the same number of dims."""
        known = self.tensors.setdefault(
            key, TensorStorageMetadata(TensorProperties(dtype=value.dtype), torch.Size(size), [])
        )
        assert known.size == torch.Size(size) and known.properties.dtype == value.dtype, key
        if self._stream is not None and self._stream.tell() >= FILE_BYTES:
            self._stream.close()
            self._stream = None
        if self._stream is None:
            self._name = f"__0_{self._files}{SUFFIX}"
            self._files += 1
            self._stream = (self.folder / self._name).open("wb")
        chunk = ChunkStorageMetadata(torch.Size(offset), value.shape)
        begin = self._stream.tell()
        try:
            torch.save(_alone(value), self._stream)
        # On a disk error, torch raises a RuntimeError about closing its archive; the OSError is its context.
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        length = self._stream.tell() - begin
        index = MetadataIndex(key, chunk.offsets, len(known.chunks))
        known.chunks.append(chunk)
        self.results.append(WriteResult(index, length, _StorageInfo(self._name, begin, length)))

    def finish(self) -> None:
        """Writes .metadata with the entries that were there and those that were added."""
        known: Mapping[MetadataIndex, _StorageInfo] = self.metadata.storage_data
        before = [WriteResult(index, info.length, info) for index, info in known.items()]
        both = {**self.metadata.state_dict_metadata, **self.tensors}
        FileSystemWriter(self.folder).finish(Metadata(both, self.metadata.planner_data), [before, self.results])


def _alone(value: Tensor) -> Tensor:
    """The same numbers in a storage that has no others, because torch.save always writes the whole storage."""
    value = value.detach().contiguous()
    if value.untyped_storage().nbytes() == value.nbytes:
        return value
    raw = flat(value).view(torch.uint8).numpy()
    return torch.from_numpy(raw).view(value.dtype).view(value.shape)
