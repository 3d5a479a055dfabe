"""Copies a Hugging Face directory to another dtype and other file sizes in constant memory: a few rows are in memory at a time."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from swift_mega.convert.check import FLOATS
from swift_mega.convert.files.hf_write import Writer, bytes_needed, copy_companions, plan_files, write_headers
from swift_mega.convert.files.progress import bytes_bar
from swift_mega.convert.files.quantised import Dequantised, drop_quantization
from swift_mega.convert.files.report import write_report
from swift_mega.convert.files.resized import weights_of
from swift_mega.convert.files.tensors import TensorSource
from swift_mega.errors import UserError
from swift_mega.outputs import staged

IN_FLIGHT = 64 << 20
"""Bytes of a source tensor that are read at a time."""


def restream(
    source: TensorSource,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int,
    overwrite: bool = False,
    derived: Callable[[str], bool] = lambda name: False,
) -> None:
    """Writes every tensor of `source`, floating-point ones as `dtype` (None: unchanged), and copies its other files.

    derived: whether the tensor of a name follows from config.json, such as a mask, and may contain infinity. UserError where another
    tensor contains NaN or infinity.
    """
    target = Path(output)
    if source.directory.resolve().is_relative_to(target.resolve()):
        raise UserError(f"output {target} contains {source.directory}, the input; choose another path")
    kinds = {
        name: dtype if dtype is not None and entry.dtype in FLOATS else entry.dtype
        for name, entry in source.entries.items()
    }
    planned = plan_files({name: (kinds[name], entry.shape) for name, entry in source.entries.items()}, max_shard_bytes)
    with staged(target, overwrite=overwrite, needed=bytes_needed(planned, source.directory)) as staging:
        write_headers(staging, planned)
        with (
            Writer(staging, planned, allow_nonfinite=derived) as writer,
            bytes_bar(sum(place.bytes for place in planned.values()), "writing") as bar,
        ):
            # One buffer for all tensors: freed buffers of many sizes stay in the allocator's heap, which then grows with the checkpoint.
            buffer = torch.empty(IN_FLIGHT, dtype=torch.uint8)
            for name, place in planned.items():
                for row, value in rows_of(source, name, buffer):
                    writer.write(name, value, row)
                    bar.update(value.numel() * place.dtype.itemsize)
            found = writer.finish()
        copy_companions(source.directory, staging)
        if isinstance(source, Dequantised):
            drop_quantization(staging)
        set_dtype(staging / "config.json", dtype)
        write_report(staging, planned, found, source=str(Path(weights_of(source.directory)).resolve()))


def rows_of(source: TensorSource, name: str, buffer: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yields a tensor as (first row, rows), at least one row at a time, and as many as fit `buffer` (uint8).

    The rows are a view of `buffer` and are overwritten by the next ones; a row larger than `buffer` gets new memory.
    """
    entry = source.entries[name]
    if not entry.shape or not math.prod(entry.shape):
        yield 0, source.read(name)
        return
    row_bytes = entry.dtype.itemsize * math.prod(entry.shape[1:])
    together = max(1, len(buffer) // row_bytes)
    for start in range(0, entry.shape[0], together):
        stop = min(start + together, entry.shape[0])
        if row_bytes > len(buffer):
            yield start, source.read(name, 0, start, stop)
            continue
        rows = buffer[: (stop - start) * row_bytes].view(entry.dtype).view(stop - start, *entry.shape[1:])
        source.read_into(rows, name, 0, start, stop)
        yield start, rows


def set_dtype(path: Path, dtype: torch.dtype | None) -> None:
    """Writes the dtype of the weights into a config.json; None leaves the file unchanged."""
    if dtype is None:
        return
    config = json.loads(path.read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2) + "\n")
