"""Reads quantised checkpoints as if their weights were plain: each slice is dequantised while it is read.

`open_checkpoint` is the entry point. Its result has the names, shapes and dtypes of the plain model, so loading, checking, converting
and merging need no code for quantisation. Each storage format is one file in convert/files/formats.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import swift_mega.convert.files.formats as folder
from swift_mega.convert.files.finite import check_finite, is_finite
from swift_mega.convert.files.formats.format import Box, Format, Quantised, ceil
from swift_mega.convert.files.hf_files import Checkpoint
from swift_mega.convert.files.resized import open_resized
from swift_mega.convert.files.spans import stacked
from swift_mega.convert.files.tensors import TensorSource
from swift_mega.discover import scan
from swift_mega.errors import UserError
from swift_mega.models.quantization import KEYS, SIDECARS, quantization_of, stored_dtype
from swift_mega.models.quantization_fields import judge

CHUNK = 1 << 19
"""Numbers that are dequantised at a time, so that intermediate results stay in the CPU cache."""
ALIGNED = 32
"""Pieces end at multiples of this many rows, where packed words and blocks of MXFP4 end too."""
SUPPORTED = (torch.bfloat16, torch.float16, torch.float32)


class Dequantised(TensorSource):
    """View of a quantised checkpoint with the names, shapes and dtypes of its plain weights."""

    def __init__(
        self, stored: TensorSource, weights: Mapping[str, Quantised], unneeded: frozenset[str], dtype: torch.dtype
    ):
        self.directory, self.stored, self.weights = stored.directory, stored, weights
        hidden = {part for weight in weights.values() for part in weight.parts.values()} | unneeded
        places = {next(iter(weight.parts.values())): name for name, weight in weights.items()}
        self.entries = {}
        for part, entry in stored.entries.items():
            if part in places:
                name = places[part]
                self.entries[name] = replace(entry, name=name, dtype=dtype, shape=weights[name].shape)
            elif part in weights and part not in hidden:
                raise UserError(
                    f"{self.directory} holds {part} plain and quantised; delete the one that does not belong to it"
                )
            elif part not in hidden:
                self.entries[part] = entry

    def read_into(
        self, target: Tensor, name: str, axis: int | None = None, start: int = 0, stop: int | None = None
    ) -> None:
        """Fills `target` with numbers rounded to the entry's dtype. Only the quantisation blocks that contain them are read."""
        whole, index = stacked(name)
        if whole not in self.weights:
            self.stored.read_into(target, name, axis, start, stop)
            return
        weight, spans = self.weights[whole], [(0, size) for size in self.weights[whole].shape]
        if axis is not None:
            dim = axis if index is None else axis + 1
            spans[dim] = (start, spans[dim][1] if stop is None else stop)
        if index is not None:
            spans[0] = (index, index + 1)
        sizes = [stop - start for start, stop in spans]
        assert math.prod(sizes) == target.numel(), f"{name}: {sizes} into {target.shape}"
        if not target.numel():
            return
        if list(target.shape) == sizes or target.is_contiguous():
            self._fill(target.view(sizes), weight, tuple(spans), self.entries[whole].dtype)
        else:
            made = torch.empty(sizes, dtype=target.dtype)
            self._fill(made, weight, tuple(spans), self.entries[whole].dtype)
            target.copy_(made.view(target.shape))

    def _fill(self, target: Tensor, weight: Quantised, box: Box, dtype: torch.dtype) -> None:
        wanted = weight.boxes(box)
        parts = {role: self._part(part, wanted[role]) for role, part in weight.parts.items()}
        for piece in _pieces(box):
            boxes = weight.boxes(piece)
            chunk = {role: _within(parts[role], wanted[role], boxes[role]) for role in parts}
            # Converted before the copy into `target`: a copy within one dtype is fast.
            value = weight.dequantise(chunk, piece).to(dtype)
            if dtype == torch.float16 and not is_finite(value):
                name = next(iter(weight.parts.values()))
                check_finite(f"{self.directory}: {name}, dequantised,", weight.dequantise(chunk, piece), dtype)
            _within(target, box, piece).copy_(value)

    def _part(self, name: str, box: Box) -> Tensor:
        """A box of a stored tensor: reads a slice along the first dim that the box restricts, and narrows along the others."""
        shape = self.stored.entries[name].shape
        cut = [dim for dim, (span, size) in enumerate(zip(box, shape, strict=True)) if span != (0, size)]
        value = self.stored.read(name, cut[0], *box[cut[0]]) if cut else self.stored.read(name)
        for dim in cut[1:]:
            value = value.narrow(dim, box[dim][0], box[dim][1] - box[dim][0])
        if value.is_floating_point() and value.dtype.itemsize > 1:
            check_finite(f"{self.directory}: {name}", value)
        return value


def _pieces(box: Box) -> Iterator[Box]:
    """Splits a box into pieces of about CHUNK numbers along its first dims, at multiples of ALIGNED."""
    (start, stop), *rest = box
    size = math.prod(end - begin for begin, end in rest)
    if size > CHUNK and len(rest) > 1:
        for index in range(start, stop):
            yield from (((index, index + 1), *piece) for piece in _pieces(tuple(rest)))
        return
    step = ceil(max(1, CHUNK // size), ALIGNED) * ALIGNED
    ends = [*range(start - start % step + step, stop, step), stop]
    for first, last in zip([start, *ends], ends, strict=False):
        yield ((first, last), *rest)


def _within(value: Tensor, box: Box, piece: Box) -> Tensor:
    """The part `piece` of `value`, which contains `box`; both are in the coordinates of the whole weight."""
    for dim, ((origin, _), (start, stop)) in enumerate(zip(box, piece, strict=True)):
        value = value.narrow(dim, start - origin, stop - start)
    return value


def open_checkpoint(directory: str | Path, dequantize: torch.dtype | None = None) -> TensorSource:
    """The tensors of a Hugging Face directory, read by slices; quantised weights as plain ones of dtype `dequantize`.

    dequantize None: tensors are returned as stored; code that needs plain weights then raises an error on quantised ones.
    Raises UserError where `dequantize` is given and the directory is not quantised, where the quantisation method is unknown, and where a
    scale or another part is missing, left over or of an unexpected shape or dtype.
    """
    stored = open_resized(directory) or Checkpoint(directory)
    if dequantize is None:
        return stored
    assert dequantize in SUPPORTED, dequantize
    config = quantization_of(directory)
    if config is None:
        raise UserError(
            f"model.dequantize=true, but {directory} states no quantization_config: its weights are plain; set model.dequantize=false"
        )
    judge(config, str(directory))
    found = _format(config).find(stored, config)
    if not found.weights:
        raise UserError(
            f"{directory} states quant_method={config['quant_method']!r}, but none of its tensors has that format; use the "
            "config.json that belongs to these weights"
        )
    return Dequantised(stored, found.weights, found.unneeded, dequantize)


def _format(config: Mapping[str, Any]) -> Format:
    formats: dict[str, Format] = {
        method: entry for entry in scan(folder, "FORMAT").values() for method in entry.methods
    }
    return formats[config["quant_method"]]


def written_dtypes(checkpoint: TensorSource, dequantised: torch.dtype | None = None) -> dict[str, torch.dtype]:
    """name -> dtype in which a plain copy of the checkpoint is written. A dequantised weight gets `dequantised`, or config.json's dtype."""
    quantised = checkpoint.weights.keys() if isinstance(checkpoint, Dequantised) else ()
    plain = dequantised or stored_dtype(checkpoint.directory)
    return {name: plain if name in quantised else entry.dtype for name, entry in checkpoint.entries.items()}


def drop_quantization(directory: Path) -> None:
    """Removes all quantisation fields and files from the copied config of a directory with plain weights."""
    path = directory / "config.json"
    if path.is_file():
        config = json.loads(path.read_text())
        if any(config.pop(key, None) is not None for key in KEYS):
            path.write_text(json.dumps(config, indent=2) + "\n")
    for name in SIDECARS:
        (directory / name).unlink(missing_ok=True)
