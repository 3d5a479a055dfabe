"""Writes the linears of attention and MLP as block-wise FP8, in the format of DeepSeek's and Qwen's FP8 checkpoints.

The scale of a block is s = x / 448, where x is its largest absolute value and 448 the largest number of float8_e4m3fn.
Requantising is exact: in float32, (448 * s) / 448 == s for every x (448 * s may differ from x by a rounding). So the dequantised
weights give the same scales and codes: files that are read in float32 (or in bfloat16, where the weights were bfloat16) and written
again have the same bytes.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swift_mega.convert.files.finite import check_finite
from swift_mega.convert.files.formats.format import ceil
from swift_mega.convert.files.formats.fp8 import FP8, LARGEST
from swift_mega.convert.files.hf_files import some
from swift_mega.convert.files.hf_write import Writer, bytes_needed, copy_companions, plan_files, write_headers
from swift_mega.convert.files.quantised import drop_quantization, written_dtypes
from swift_mega.convert.files.report import write_report
from swift_mega.convert.files.tensors import TensorSource
from swift_mega.errors import UserError
from swift_mega.models.family import Family
from swift_mega.models.linears import modules_of
from swift_mega.models.settings import Settings
from swift_mega.outputs import check_space

BLOCK = (128, 128)
"""(rows, columns) of a block in the published checkpoints."""
CHUNK = 1 << 20
"""Numbers that are quantised at a time; at least one row of blocks."""


@dataclass(frozen=True)
class Writing:
    """A tensor to write; `value` makes it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    value: Callable[[], Tensor]


def quantise_fp8(weight: Tensor, block: tuple[int, int] = BLOCK) -> tuple[Tensor, Tensor]:
    """weight [..., out, in] of any float dtype -> (FP8 [..., out, in], float32 scales [..., ceil(out / block[0]), ceil(in / block[1])]).

    weight ≈ FP8 * scale. A block of zeros has scale 1.
    """
    *lead, rows, columns = weight.shape
    grid = (ceil(rows, block[0]), ceil(columns, block[1]))
    codes = torch.empty(weight.shape, dtype=FP8)
    scales = torch.empty((*lead, *grid))
    step = max(1, CHUNK // (block[0] * columns)) * block[0]
    matrices = zip(weight.view(-1, rows, columns), codes.view(-1, rows, columns), scales.view(-1, *grid), strict=True)
    for matrix, into, its_scales in matrices:
        for first in range(0, rows, step):
            number = first // block[0]
            found = _quantise_rows(matrix[first : first + step].float(), into[first : first + step], block)
            its_scales[number : number + len(found)] = found
    return codes, scales


def _quantise_rows(rows: Tensor, into: Tensor, block: tuple[int, int]) -> Tensor:
    """Quantises whole rows of blocks into `into`; returns their scales."""
    height, width = rows.shape
    grid = (ceil(height, block[0]), ceil(width, block[1]))
    padded = rows.new_zeros(grid[0] * block[0], grid[1] * block[1])
    padded[:height, :width] = rows
    tiles = padded.view(grid[0], block[0], grid[1], block[1])
    scales = tiles.abs().amax(dim=(1, 3)) / LARGEST
    scales[scales == 0] = 1.0
    tiles.div_(scales[:, None, :, None]).clamp_(-LARGEST, LARGEST)
    into.copy_(padded[:height, :width])
    return scales


def fp8_linears(family: Family, settings: Settings, checkpoint: TensorSource) -> set[str]:
    """The modules to quantise, by the checkpoint's names.

    A family's rules name the linears of every kind of attention that it knows; only those in the checkpoint are returned.
    """
    names = {family.on_disk(module) for module in modules_of(family, settings)}
    return {name for name in names if f"{name}.weight" in checkpoint.entries}


def fp8_tensors(
    checkpoint: TensorSource, linears: Collection[str], block: tuple[int, int] = BLOCK
) -> Iterator[Writing]:
    """Every tensor of a checkpoint, in order; each weight of `linears` (modules) is replaced by its FP8 codes and `weight_scale_inv`.

    A value is computed when it is requested. Codes and scales are computed together if the codes are requested first. UserError where a
    linear is missing.
    """
    if missing := sorted(module for module in linears if f"{module}.weight" not in checkpoint.entries):
        raise UserError(
            f"{checkpoint.directory} has no weights of {some(missing)}, so they cannot be quantised; give a complete checkpoint"
        )
    kinds = written_dtypes(checkpoint)
    for name, entry in checkpoint.entries.items():
        if name.removesuffix(".weight") not in linears or not name.endswith(".weight"):
            yield Writing(name, kinds[name], entry.shape, lambda name=name: checkpoint.read(name).to(kinds[name]))  # type: ignore[misc]
            continue
        *lead, rows, columns = entry.shape
        grid = (*lead, ceil(rows, block[0]), ceil(columns, block[1]))
        pair = _Pair(checkpoint, name, block)
        yield Writing(name, FP8, entry.shape, pair.codes)
        yield Writing(f"{name}_scale_inv", torch.float32, grid, pair.scales)


class _Pair:
    """Codes and scales of one weight. It is quantised once if codes are requested before scales; the scales are kept until then."""

    def __init__(self, checkpoint: TensorSource, name: str, block: tuple[int, int]) -> None:
        self.checkpoint, self.name, self.block = checkpoint, name, block
        self.kept: Tensor | None = None

    def codes(self) -> Tensor:
        value = self.checkpoint.read(self.name)
        check_finite(f"{self.checkpoint.directory}: {self.name}", value)
        codes, self.kept = quantise_fp8(value, self.block)
        return codes

    def scales(self) -> Tensor:
        if self.kept is None:
            self.codes()
        scales, self.kept = self.kept, None
        assert scales is not None
        return scales


def fp8_config(checkpoint: TensorSource, linears: Collection[str], block: tuple[int, int] = BLOCK) -> dict[str, Any]:
    """The `quantization_config` of such files. It lists the output layer and every module whose weight matrix is not quantised."""
    plain = {
        name.removesuffix(".weight")
        for name, entry in checkpoint.entries.items()
        if name.endswith(".weight") and len(entry.shape) > 1
    }
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(block),
        "modules_to_not_convert": sorted((plain | {"lm_head"}) - set(linears)),
    }


def set_quantization(directory: Path, config: Mapping[str, Any]) -> None:
    """Sets `quantization_config` in the copied config.json of a directory, and removes the former quantisation fields and files."""
    drop_quantization(directory)
    path = directory / "config.json"
    fields = {**json.loads(path.read_text()), "quantization_config": dict(config)}
    path.write_text(json.dumps(fields, indent=2) + "\n")


def write_fp8(
    checkpoint: TensorSource,
    linears: Collection[str],
    target: Path,
    *,
    max_shard_bytes: int,
    block: tuple[int, int] = BLOCK,
    derived: Callable[[str], bool] = lambda name: False,
) -> None:
    """Writes a checkpoint with `linears` in FP8 to the empty directory `target`, one tensor in memory at a time.

    derived: whether the tensor of a name follows from config.json, such as a mask, and may contain infinity.
    """
    tensors = {tensor.name: tensor for tensor in fp8_tensors(checkpoint, linears, block)}
    planned = plan_files({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}, max_shard_bytes)
    check_space(target, bytes_needed(planned, checkpoint.directory))
    write_headers(target, planned)
    with Writer(target, planned, allow_nonfinite=derived) as writer:
        for name in planned:
            writer.write(name, tensors[name].value())
        found = writer.finish()
    copy_companions(checkpoint.directory, target)
    set_quantization(target, fp8_config(checkpoint, linears, block))
    write_report(target, planned, found)
