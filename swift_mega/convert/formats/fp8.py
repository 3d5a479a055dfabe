"""Eight-bit numbers with a scale for each tensor, row or block: DeepSeek's and Qwen's FP8, and what compressed-tensors writes.

A weight is number * scale. `weight_scale_inv` is that scale too: DeepSeek named it for being the inverse of what quantising
multiplied by. Blocks need not divide the weight; those at its end are smaller (arXiv:2412.19437, section 3.3.2).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swift_mega.convert.formats.format import Box, Format, Found, blocks, ceil, check_tensor, require
from swift_mega.convert.hf_files import Checkpoint, some
from swift_mega.errors import UserError

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of float8_e4m3fn."""
SCALES = (torch.float32, torch.bfloat16, torch.float16)
ALLOWED: dict[str, tuple[Any, ...]] = {
    "fmt": ("e4m3",),
    "expert_dtype": ("fp8",),
    "format": ("float-quantized", "int-quantized", "naive-quantized"),
    "sparsity_config": ({}, {"format": "dense"}),
    "transform_config": ({},),
    "quantization_status": ("compressed",),
}
WEIGHTS: dict[str, tuple[Any, ...]] = {
    "num_bits": (8,),
    "symmetric": (True,),
    "strategy": ("tensor", "channel", "block"),
}
"""Of a group of compressed-tensors' modules, what is understood."""
_NUMBERS = torch.arange(256, dtype=torch.uint8).view(FP8).float()
"""The 256 numbers of FP8; looking them up is ten times faster than torch's own conversion on the CPU."""


@dataclass(frozen=True)
class Scaled:
    """[..., out, in] numbers, and a scale for each block of [out, in]."""

    shape: tuple[int, ...]
    parts: Mapping[str, str]
    block: tuple[int, int]
    scale_shape: tuple[int, ...]

    def boxes(self, box: Box) -> Mapping[str, Box]:
        grid = (*box[:-2], blocks(box[-2], self.block[0]), blocks(box[-1], self.block[1]))
        if len(self.scale_shape) < 2:  # one number, or one a row
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


def find(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Found:
    """Weights whose numbers are FP8 (or int8, of compressed-tensors), with the scales beside them."""
    require(config, ALLOWED)
    compressed = config["quant_method"] == "compressed-tensors"
    if compressed:
        _check_groups(config)
    block = _block_size(config)
    ending = "_scale" if compressed or block is None else "_scale_inv"
    numbers = (FP8, torch.int8) if compressed else (FP8,)
    weights: dict[str, Scaled] = {}
    for name, entry in checkpoint.entries.items():
        if entry.dtype not in numbers:
            continue
        if name + ending not in checkpoint.entries:
            raise UserError(
                f"{checkpoint.directory}: {name} is {str(entry.dtype).removeprefix('torch.')} and has no scale {name + ending}; copy the "
                "checkpoint from the source again"
            )
        weights[name] = _scaled(checkpoint, name, name + ending, block)
    unneeded = {name for name in checkpoint.entries if name.endswith((".input_scale", ".activation_scale"))}
    used = {name for weight in weights.values() for name in weight.parts.values()} | unneeded
    if lost := sorted(name for name in checkpoint.entries.keys() - used if name.endswith(("_scale", "_scale_inv"))):
        raise UserError(
            f"{checkpoint.directory} has {some(lost)}, which are scales of no quantised weight; copy the checkpoint from the "
            "source again"
        )
    return Found(weights=weights, unneeded=frozenset(unneeded))


def _check_groups(config: Mapping[str, Any]) -> None:
    for group in (config.get("config_groups") or {}).values():
        require({**config, "format": group.get("format")}, {"format": ALLOWED["format"]})
        require({**config, **(group.get("weights") or {})}, WEIGHTS)


def _block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block; None where scales are for whole tensors or rows."""
    sizes = [config.get("weight_block_size")]
    for group in (config.get("config_groups") or {}).values():
        sizes.append((group.get("weights") or {}).get("block_structure"))
    found = [size for size in sizes if size is not None]
    for size in found:
        plain = isinstance(size, list | tuple) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
        if not plain or size != found[0]:
            raise UserError(
                f"quantization_config: weight_block_size={size!r} is not two counts, such as [128, 128], the same for "
                "every weight; correct it"
            )
    return (found[0][0], found[0][1]) if found else None


def _scaled(checkpoint: Checkpoint, name: str, scale: str, block: tuple[int, int] | None) -> Scaled:
    """The weight, with the blocks that its scale's shape says: those that the config states, rows, or the whole."""
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


FORMAT = Format(methods=("fp8", "compressed-tensors"), find=find)
