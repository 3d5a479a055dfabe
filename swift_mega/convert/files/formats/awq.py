"""AWQ's GEMM layout: an int32 word has the 4-bit codes of eight outputs of one input, in the order 0 2 4 6 1 3 5 7.

A group is `group_size` consecutive inputs. w[out, in] = (q[in, out] - zero[group, out]) * scale[group, out].
Sources: arXiv:2306.00978, and AutoAWQ's files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swift_mega.convert.files.formats.format import Box, Format, Found, blocks, ceil, check_tensor, modules
from swift_mega.convert.files.formats.words import SCALES, matrix, trim, unpack
from swift_mega.convert.files.tensors import TensorSource

INTERLEAVED = (0, 4, 1, 5, 2, 6, 3, 7)
"""The 4-bit field of the word in which each of the eight outputs is stored."""


@dataclass(frozen=True)
class Awq:
    """A weight [out, in]; each stored word has eight outputs of one input."""

    shape: tuple[int, ...]
    parts: Mapping[str, str]
    group_size: int

    def boxes(self, box: Box) -> Mapping[str, Box]:
        rows, columns = box
        words, groups = blocks(rows, 8), blocks(columns, self.group_size)
        return {"qweight": (columns, words), "qzeros": (groups, words), "scales": (groups, rows)}

    def dequantise(self, parts: Mapping[str, Tensor], box: Box) -> Tensor:
        rows, columns = box
        codes, zeros = (trim(unpack(parts[role], 4, 1, INTERLEAVED), 1, rows, 8) for role in ("qweight", "qzeros"))
        group = torch.arange(*columns) // self.group_size - columns[0] // self.group_size
        values = codes.sub(zeros.index_select(0, group)).float()
        return values.mul_(parts["scales"].float().index_select(0, group)).t()


def find(checkpoint: TensorSource, config: Mapping[str, Any]) -> Found:
    """Every module with qweight, qzeros and scales."""
    size = config.get("group_size", config.get("q_group_size", 128))
    weights = {}
    for module in modules(checkpoint, (".qweight", ".qzeros", ".scales")):
        names = {role: f"{module}.{role}" for role in ("qweight", "qzeros", "scales")}
        inputs, words = matrix(checkpoint, names["qweight"])
        group_size = inputs if size in (-1, None) else size
        groups, why = ceil(inputs, group_size), f"{module} of {words * 8} x {inputs} with group_size={group_size}"
        check_tensor(checkpoint, names["qweight"], (inputs, words), (torch.int32,), why)
        check_tensor(checkpoint, names["qzeros"], (groups, words), (torch.int32,), why)
        check_tensor(checkpoint, names["scales"], (groups, words * 8), SCALES, why)
        weights[f"{module}.weight"] = Awq((words * 8, inputs), names, group_size)
    return Found(weights=weights)


FORMAT = Format(methods=("awq",), find=find)
