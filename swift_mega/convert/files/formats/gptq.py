"""GPTQ: integer codes packed into int32 words along the input dim, with a zero point and a scale per group of inputs.

w[out, in] = (q[in, out] - zero[group, out]) * scale[group, out]. With act-order (desc_act), g_idx gives the group of each input. The
file format gptq stores zero - 1, and gptq_v2 stores zero. Sources: arXiv:2210.17323, and AutoGPTQ's files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swift_mega.convert.files.formats.format import Box, Format, Found, blocks, ceil, check_tensor, modules
from swift_mega.convert.files.formats.words import SCALES, WORD, matrix, trim, unpack
from swift_mega.convert.files.tensors import TensorSource
from swift_mega.errors import UserError
from swift_mega.models.quantization_fields import gptq_format


@dataclass(frozen=True)
class Gptq:
    """A weight [out, in]. symmetric: zero = 2 ** (bits - 1). one_less: the files store zero - 1 (all formats before gptq_v2)."""

    shape: tuple[int, ...]
    parts: Mapping[str, str]
    bits: int
    groups: int
    group_size: int
    symmetric: bool
    one_less: bool

    def boxes(self, box: Box) -> Mapping[str, Box]:
        rows, columns = box
        each = WORD // self.bits
        groups = (0, self.groups)  # all: with act-order, an input may belong to any group
        found = {
            "qweight": (blocks(columns, each), rows),
            "qzeros": (groups, blocks(rows, each)),
            "scales": (groups, rows),
        }
        return {**found, "g_idx": (columns,)} if "g_idx" in self.parts else found

    def dequantise(self, parts: Mapping[str, Tensor], box: Box) -> Tensor:
        rows, columns = box
        each = WORD // self.bits
        codes = trim(unpack(parts["qweight"], self.bits, 0), 0, columns, each)
        zeros = self._zeros(trim(unpack(parts["qzeros"], self.bits, 1), 1, rows, each))
        group = parts["g_idx"] if "g_idx" in parts else torch.arange(*columns) // self.group_size
        if len(group) and not 0 <= int(group.min()) <= int(group.max()) < self.groups:
            raise UserError(
                f"{self.parts['g_idx']} names groups from {int(group.min())} to {int(group.max())}, and {self.parts['scales']} has "
                f"{self.groups}; copy the checkpoint again"
            )
        values = codes.sub_(zeros.index_select(0, group)).float()
        return values.mul_(parts["scales"].float().index_select(0, group)).t()

    def _zeros(self, stored: Tensor) -> Tensor:
        """The true zero points from the stored ones; UserError where they are ambiguous."""
        most, middle = (1 << self.bits) - 1, 1 << (self.bits - 1)
        if self.symmetric:
            # Some writers declare gptq but store zero points as gptq_v2 does. Symmetric weights have one zero point, so both can be read.
            if not any(bool((stored == value).all()) for value in (middle - 1, middle)):
                raise UserError(
                    f"{self.parts['qzeros']} has values {int(stored.min())} to {int(stored.max())}, and quantization_config says "
                    f"sym=true, which is {middle - 1} (gptq) or {middle} (gptq_v2); correct sym"
                )
            return torch.full_like(stored, middle)
        if not self.one_less:
            return stored
        if bool((stored == most).any()):
            raise UserError(
                f"{self.parts['qzeros']} has the value {most}, a zero point of 0 or of {most + 1} that checkpoint_format=gptq cannot "
                "tell apart and readers disagree on; convert the checkpoint to gptq_v2 or bfloat16 with its own tools first"
            )
        return stored + 1


def find(checkpoint: TensorSource, config: Mapping[str, Any]) -> Found:
    """Every module with qweight, qzeros and scales, and optionally g_idx."""
    bits, size = config.get("bits", 4), config.get("group_size", -1)
    one_less = gptq_format(config) != "gptq_v2"
    weights = {}
    for module in modules(checkpoint, (".qweight", ".qzeros", ".scales"), (".g_idx",)):
        names = {role: f"{module}.{role}" for role in ("qweight", "qzeros", "scales", "g_idx")}
        words, rows = matrix(checkpoint, names["qweight"])
        inputs = words * WORD // bits
        group_size = inputs if size in (-1, None) else size
        groups = ceil(inputs, group_size)
        why = f"{module} of {rows} x {inputs} with bits={bits} and group_size={group_size}"
        check_tensor(checkpoint, names["qweight"], (words, rows), (torch.int32,), why)
        check_tensor(checkpoint, names["scales"], (groups, rows), SCALES, why)
        check_tensor(checkpoint, names["qzeros"], (groups, ceil(rows * bits, WORD)), (torch.int32,), why)
        if names["g_idx"] in checkpoint.entries:
            check_tensor(checkpoint, names["g_idx"], (inputs,), (torch.int32, torch.int64), why)
        elif config.get("desc_act"):
            raise UserError(
                f"{checkpoint.directory}: {module} has no g_idx, and quantization_config says desc_act=true, so the groups of its "
                "inputs are unknown; copy the checkpoint from the source again"
            )
        else:
            del names["g_idx"]
        weights[f"{module}.weight"] = Gptq(
            (rows, inputs), names, bits, groups, group_size, bool(config.get("sym")), one_less
        )
    return Found(weights=weights)


FORMAT = Format(methods=("gptq",), find=find)
