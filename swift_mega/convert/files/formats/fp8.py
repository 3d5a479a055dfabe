"""8-bit numbers with a scale per tensor, row or block: DeepSeek's and Qwen's FP8, and the 8-bit formats of compressed-tensors.

weight = number * scale. `weight_scale_inv` is the same scale: DeepSeek named it so because it is the inverse of the factor used for
quantising. The block size need not divide the weight; the last blocks are smaller then (arXiv:2412.19437, section 3.3.2).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swift_mega.convert.files.formats.format import Box, Format, Found, blocks, ceil, check_tensor
from swift_mega.convert.files.hf_files import some
from swift_mega.convert.files.tensors import TensorSource
from swift_mega.errors import UserError
from swift_mega.models.quantization_fields import block_size

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of float8_e4m3fn."""
ENDINGS = ("_scale", "_scale_inv")
SCALES = (torch.float32, torch.bfloat16, torch.float16)
UNNEEDED = tuple(
    f".{name}_scale"
    for name in ("input", "activation", "output", "k", "v", "q", "prob", "prob_output", "kv", "kv_cache")
)
"""Suffixes of the scales of activations and of the KV cache, which plain weights do not need."""
_NUMBERS = torch.arange(256, dtype=torch.uint8).view(FP8).float()
"""The float32 value of each FP8 code. A table lookup is ten times faster than torch's own conversion on the CPU."""


@dataclass(frozen=True)
class Scaled:
    """A weight [..., out, in] with one scale per block of (out, in)."""

    shape: tuple[int, ...]
    parts: Mapping[str, str]
    block: tuple[int, int]
    scale_shape: tuple[int, ...]

    def boxes(self, box: Box) -> Mapping[str, Box]:
        grid = (*box[:-2], blocks(box[-2], self.block[0]), blocks(box[-1], self.block[1]))
        if len(self.scale_shape) < 2:  # one scale for the tensor, or one per row
            grid = grid[: len(self.scale_shape)]
        return {"weight": box, "scale": grid}

    def dequantise(self, parts: Mapping[str, Tensor], box: Box) -> Tensor:
        stored = parts["weight"]
        rows, columns = (
            torch.arange(*span) // size - span[0] // size for span, size in zip(box[-2:], self.block, strict=True)
        )
        grid = (*stored.shape[:-2], int(rows[-1]) + 1, int(columns[-1]) + 1)
        scale = parts["scale"].float().reshape(grid).index_select(-2, rows)
        if grid[-1] > 1:
            scale = scale.index_select(-1, columns)
        return _numbers(stored).mul_(scale)


def _numbers(stored: Tensor) -> Tensor:
    if stored.dtype != FP8:
        return stored.float()
    codes = stored.contiguous().view(torch.uint8).view(-1).int()
    return _NUMBERS.index_select(0, codes).view(stored.shape)


def find(checkpoint: TensorSource, config: Mapping[str, Any]) -> Found:
    """The weights stored as FP8 (or int8, for compressed-tensors), with their scales."""
    compressed, block = config["quant_method"] == "compressed-tensors", block_size(config)
    numbers = (FP8, torch.int8) if compressed else (FP8,)
    weights: dict[str, Scaled] = {}
    for name, entry in checkpoint.entries.items():
        if entry.dtype not in numbers:
            continue
        scales = [name + ending for ending in ENDINGS if name + ending in checkpoint.entries]
        if len(scales) != 1:
            usual = name + ENDINGS[block is not None and not compressed]
            kind = str(entry.dtype).removeprefix("torch.")
            raise UserError(
                f"{checkpoint.directory}: {name} is {kind} and has {f'two scales, {some(scales)}' if scales else f'no scale {usual}'}; "
                "copy the checkpoint from the source again"
            )
        weights[name] = _scaled(checkpoint, name, scales[0], block)
    unneeded = {name for name in checkpoint.entries if name.endswith(UNNEEDED)}
    used = {name for weight in weights.values() for name in weight.parts.values()} | unneeded
    if lost := sorted(name for name in checkpoint.entries.keys() - used if name.endswith(ENDINGS)):
        raise UserError(
            f"{checkpoint.directory} has {some(lost)}, which are scales of no quantised weight; copy the checkpoint from the "
            "source again"
        )
    return Found(weights=weights, unneeded=frozenset(unneeded))


def _scaled(checkpoint: TensorSource, name: str, scale: str, block: tuple[int, int] | None) -> Scaled:
    """The weight, with the block size that the shape of its scale implies: the one in the config, one row, or the whole tensor."""
    shape, there = checkpoint.entries[name].shape, checkpoint.entries[scale].shape
    if len(shape) < 2:
        raise UserError(
            f"{checkpoint.directory}: {name} is quantised and has shape {list(shape)}, not [out, in]; copy it again"
        )
    *lead, rows, columns = shape
    if block is not None:
        size, accepted = block, [(*lead, ceil(rows, block[0]), ceil(columns, block[1]))]
    elif there in ((*lead, rows, 1), (rows,)):
        size, accepted = (1, columns), [there]
    else:
        size, accepted = (rows, columns), [(*lead, 1, 1), *([(1,), ()] if not lead else [])]
    wanted = there if there in accepted else accepted[0]
    check_tensor(checkpoint, scale, wanted, SCALES, f"the scale of {name} {list(shape)} with blocks of {list(size)}")
    return Scaled(shape, {"weight": name, "scale": scale}, size, there)


FORMAT = Format(methods=("fp8", "compressed-tensors", "fbgemm_fp8", "modelopt"), find=find)
