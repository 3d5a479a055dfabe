"""bitsandbytes: 4-bit codes (nf4 or fp4), scaled by the largest absolute value of each block; and int8, scaled by that of each row.

The 4-bit codes of a matrix are one flat array of bytes, the first code of a byte in its high half. Blocks are consecutive numbers of the
flattened matrix, and may span rows. Double quantisation also stores the blocks' largest values (absmax) as bytes.
Sources: arXiv:2305.14314 (nf4), arXiv:2208.07339 (int8).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swift_mega.convert.files.formats.format import Box, Format, Found, ceil, check_tensor
from swift_mega.convert.files.formats.nibbles import look_up, pairs
from swift_mega.convert.files.hf_files import some
from swift_mega.convert.files.tensors import TensorSource
from swift_mega.errors import UserError
from swift_mega.text_files import parse_json

STATES = {kind: f".weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Nested:
    """Double quantisation of the blocks' absmax: in blocks of `block` values, around `offset`."""

    block: int
    offset: float


@dataclass(frozen=True)
class FourBit:
    """A weight [out, in]; a block is `block` consecutive numbers of the flattened matrix.

    Columns are not contiguous: a slice of columns reads and decodes whole rows.
    """

    shape: tuple[int, ...]
    parts: Mapping[str, str]
    block: int
    nested: Nested | None

    def boxes(self, box: Box) -> Mapping[str, Box]:
        width = math.prod(self.shape[1:])
        begin, end = box[0][0] * width, box[0][1] * width
        absmax = (begin // self.block, ceil(end, self.block))
        found: dict[str, Box] = {
            "weight": ((begin // 2, ceil(end, 2)), (0, 1)),
            "quant_map": ((0, 16),),
            "absmax": (absmax,),
        }
        if self.nested is not None:
            found["nested_quant_map"] = ((0, 256),)
            found["nested_absmax"] = ((absmax[0] // self.nested.block, ceil(absmax[1], self.nested.block)),)
        return found

    def dequantise(self, parts: Mapping[str, Tensor], box: Box) -> Tensor:
        (first, last), *rest = box
        width = math.prod(self.shape[1:])
        begin, end = first * width, last * width
        numbers = look_up(pairs(parts["quant_map"], low_first=False), parts["weight"])
        numbers = numbers.narrow(0, begin % 2, end - begin)
        index = torch.arange(begin, end) // self.block - begin // self.block
        values = numbers.mul_(self._absmax(parts, begin // self.block).index_select(0, index))
        values = values.view(last - first, *self.shape[1:])
        for dim, (start, stop) in enumerate(rest, 1):
            values = values.narrow(dim, start, stop - start)
        return values

    def _absmax(self, parts: Mapping[str, Tensor], first: int) -> Tensor:
        """absmax of the blocks in `parts`, float32; `first` is the number of the first one."""
        stored = parts["absmax"]
        if self.nested is None:
            return stored.float()
        index = torch.arange(first, first + len(stored)) // self.nested.block - first // self.nested.block
        codes = parts["nested_quant_map"].float().index_select(0, stored.int())
        return codes.mul_(parts["nested_absmax"].float().index_select(0, index)).add_(self.nested.offset)


@dataclass(frozen=True)
class Int8:
    """A weight [out, in] of int8; SCB has for each row the value that code 127 stands for."""

    shape: tuple[int, ...]
    parts: Mapping[str, str]

    def boxes(self, box: Box) -> Mapping[str, Box]:
        return {"weight": box, "scale": (box[0],)}

    def dequantise(self, parts: Mapping[str, Tensor], box: Box) -> Tensor:
        return parts["weight"].float().mul_(parts["scale"].float()[:, None]).mul_(1 / 127)


def find(checkpoint: TensorSource, config: Mapping[str, Any]) -> Found:
    """The weights with a quant_state (4 bits) or an SCB (8 bits) tensor."""
    weights: dict[str, FourBit | Int8] = {}
    unneeded = set()
    for name in checkpoint.entries:
        for kind, ending in STATES.items():
            if name.endswith(ending):
                weight = name.removesuffix(ending) + ".weight"
                weights[weight] = _four_bit(checkpoint, weight, name, kind)
                unneeded.add(name)
        if name.endswith(".SCB"):
            module = name.removesuffix(".SCB")
            weights[f"{module}.weight"] = _int8(checkpoint, f"{module}.weight", name)
            unneeded.add(f"{module}.weight_format")
    used = {part for weight in weights.values() for part in weight.parts.values()} | unneeded
    lost = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".weight_format")
    if odd := sorted(name for name in checkpoint.entries.keys() - used if name.endswith(lost)):
        raise UserError(
            f"{checkpoint.directory} has {some(odd)} without the quant_state (or SCB) that describes them; copy the checkpoint "
            "from the source again"
        )
    return Found(weights=weights, unneeded=frozenset(unneeded & checkpoint.entries.keys()))


def _four_bit(checkpoint: TensorSource, weight: str, state_name: str, kind: str) -> FourBit:
    state = _read_state(checkpoint, state_name)
    try:
        shape, block = tuple(int(size) for size in state["shape"]), int(state["blocksize"])
        nested = (
            Nested(int(state["nested_blocksize"]), float(state["nested_offset"]))
            if "nested_blocksize" in state
            else None
        )
        if state["quant_type"] != kind or len(shape) < 1 or block < 1 or (nested is not None and nested.block < 1):
            raise ValueError(f"quant_type {state['quant_type']!r}, shape {list(shape)}, blocksize {block}")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{checkpoint.directory}: {state_name} is not understood ({error}); copy the checkpoint from the source again"
        ) from None
    parts = {"weight": weight, "absmax": f"{weight}.absmax", "quant_map": f"{weight}.quant_map"}
    count, why = math.prod(shape), f"{weight} of {list(shape)} in blocks of {block}"
    total = ceil(count, block)
    wanted: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
        "weight": ((ceil(count, 2), 1), (torch.uint8,)),
        "quant_map": ((16,), FLOATS),
        "absmax": ((total,), (torch.uint8,) if nested else FLOATS),
    }
    if nested is not None:
        parts.update({role: f"{weight}.{role}" for role in ("nested_absmax", "nested_quant_map")})
        wanted.update(nested_absmax=((ceil(total, nested.block),), FLOATS), nested_quant_map=((256,), FLOATS))
    _check(checkpoint, parts, wanted, why)
    return FourBit(shape, parts, block, nested)


def _read_state(checkpoint: TensorSource, name: str) -> dict[str, Any]:
    try:
        state = parse_json(bytes(checkpoint.read(name).view(-1).tolist()))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{checkpoint.directory}: {name} is not JSON ({error}); copy the checkpoint from the source again"
        ) from None
    return state if isinstance(state, dict) else {}


def _int8(checkpoint: TensorSource, weight: str, scale: str) -> Int8:
    rows = checkpoint.entries[scale].shape
    parts = {"weight": weight, "scale": scale}
    columns = checkpoint.entries[weight].shape[-1:] if weight in checkpoint.entries else ()
    wanted = {"weight": ((*rows, *columns), (torch.int8,)), "scale": (rows, FLOATS)}
    _check(checkpoint, parts, wanted, f"{weight} in {len(rows) and rows[0]} rows")
    layout = weight.removesuffix(".weight") + ".weight_format"
    if layout in checkpoint.entries and int(checkpoint.read(layout).view(-1)[0]) != 0:
        raise UserError(
            f"{checkpoint.directory}: {layout} is not 0 (row-major), but a layout for one kind of GPU; save the checkpoint again with a "
            "newer bitsandbytes"
        )
    return Int8((rows[0], columns[0]), parts)


def _check(
    checkpoint: TensorSource,
    parts: Mapping[str, str],
    wanted: Mapping[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]],
    why: str,
) -> None:
    if missing := sorted(name for name in parts.values() if name not in checkpoint.entries):
        raise UserError(f"{checkpoint.directory} lacks {some(missing)}, and {why} needs it; copy the checkpoint again")
    for role, (shape, kinds) in wanted.items():
        check_tensor(checkpoint, parts[role], shape, kinds, why)


FORMAT = Format(methods=("bitsandbytes",), find=find)
