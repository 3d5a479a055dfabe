"""MXFP4, as gpt-oss stores its experts: two 4-bit floats per byte, and one power of two as scale for 32 numbers along the input dim.

X_blocks is [experts, out, in / 32, 16] and X_scales is [experts, out, in / 32], both uint8. The weight X is [experts, in, out], the
layout that the model multiplies with. Source: OCP Microscaling Formats 1.0, sections 5.3.3 (E2M1) and 5.4.1 (E8M0).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swift_mega.convert.files.formats.format import Box, Format, Found, blocks, check_tensor, modules
from swift_mega.convert.files.formats.nibbles import look_up, pairs
from swift_mega.convert.files.tensors import TensorSource
from swift_mega.errors import UserError

BLOCK = 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_PAIRS = pairs((*E2M1, *(-value for value in E2M1)), low_first=True)
_SCALES = torch.tensor([2.0 ** (exponent - 127) for exponent in range(255)] + [float("nan")])


@dataclass(frozen=True)
class Experts:
    """A weight [experts, in, out]; the files store [experts, out, in]."""

    shape: tuple[int, ...]
    parts: Mapping[str, str]

    def boxes(self, box: Box) -> Mapping[str, Box]:
        experts, columns, rows = box
        stored = (experts, rows, blocks(columns, BLOCK))
        return {"blocks": (*stored, (0, BLOCK // 2)), "scales": stored}

    def dequantise(self, parts: Mapping[str, Tensor], box: Box) -> Tensor:
        scales = parts["scales"]
        if bool((scales == 255).any()):
            raise UserError(f"{self.parts['scales']} has scales that are NaN (255); copy the checkpoint again")
        numbers = look_up(_PAIRS, parts["blocks"]).view(*scales.shape, BLOCK)
        numbers.mul_(_SCALES.index_select(0, scales.reshape(-1).int()).view(*scales.shape, 1))
        first = box[1][0] // BLOCK * BLOCK
        wanted = numbers.flatten(-2)[..., box[1][0] - first : box[1][1] - first]
        return wanted.transpose(-1, -2)


def find(checkpoint: TensorSource, config: Mapping[str, Any]) -> Found:
    """Every X_blocks with its X_scales."""
    weights: dict[str, Experts] = {}
    for name in modules(checkpoint, ("_blocks", "_scales")):
        shape = checkpoint.entries[name + "_scales"].shape
        bytes_only = (torch.uint8,)
        why = f"{name} in blocks of {BLOCK}"
        check_tensor(checkpoint, name + "_scales", shape if len(shape) == 3 else (0, 0, 0), bytes_only, why)
        check_tensor(checkpoint, name + "_blocks", (*shape, BLOCK // 2), bytes_only, why)
        experts, rows, groups = shape
        weights[name] = Experts(
            (experts, groups * BLOCK, rows), {"blocks": name + "_blocks", "scales": name + "_scales"}
        )
    return Found(weights=weights)


FORMAT = Format(methods=("mxfp4",), find=find)
