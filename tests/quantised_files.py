"""Quantised checkpoints, written number by number after the description of each format, and the plain weights of them.

Nothing here is shared with the code that reads them: words are filled bit by bit as Python integers, and every expected weight is computed
by itself. `write` makes a quantised directory from a plain one, and returns the plain weights of it.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Made = tuple[dict[str, Tensor], Tensor]
"""The stored tensors of a weight, by name, and the dequantised weight, float32."""

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = (0.0, 0.0052083, 0.6666667, 1.0, 0.3333333, 0.5, 0.1666667, 0.25)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def e4m3(code: int) -> float:
    """The value of a byte: one sign bit, four bits of exponent (bias 7), three of mantissa; no infinities."""
    sign, exponent, mantissa = (-1.0 if code & 128 else 1.0), code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def _nearest(table: Any, value: float) -> int:
    return min(range(len(table)), key=lambda code: abs(table[code] - value))


def _signed(words: Any) -> Tensor:
    """Unsigned 32-bit words as int32."""
    return torch.tensor([[w - (1 << 32) if w >= 1 << 31 else w for w in row] for row in words], dtype=torch.int32)


def fp8_block(name: str, weight: Tensor, block: tuple[int, int] = (16, 24)) -> Made:
    rows, columns = weight.shape
    grid = [[0.0] * -(-columns // block[1]) for _ in range(-(-rows // block[0]))]
    for r in range(rows):
        for c in range(columns):
            there = grid[r // block[0]]
            there[c // block[1]] = max(there[c // block[1]], abs(float(weight[r, c])))
    scales = torch.tensor(grid) / 448
    codes, meant = torch.zeros(rows, columns), torch.zeros(rows, columns)
    for r in range(rows):
        for c in range(columns):
            codes[r, c] = weight[r, c] / scales[r // block[0], c // block[1]]
    stored = codes.to(torch.float8_e4m3fn)
    for r in range(rows):
        for c in range(columns):
            meant[r, c] = e4m3(int(stored.view(torch.uint8)[r, c])) * scales[r // block[0], c // block[1]]
    return {name: stored, name + "_scale_inv": scales}, meant


def fp8_scale(name: str, weight: Tensor, *, channel: bool, dtype: torch.dtype = torch.bfloat16) -> Made:
    stored, meant = torch.zeros(weight.shape), torch.zeros(weight.shape)
    scales = [float(row.abs().max()) / 400 for row in weight] if channel else [float(weight.abs().max()) / 400]
    kept = torch.tensor(scales).to(dtype)
    for r in range(len(weight)):
        stored[r] = weight[r] / float(kept[r if channel else 0])
    codes = stored.to(torch.float8_e4m3fn)
    for r in range(len(weight)):
        for c in range(weight.shape[1]):
            meant[r, c] = e4m3(int(codes.view(torch.uint8)[r, c])) * float(kept[r if channel else 0])
    return {name: codes, name + "_scale": kept[:, None] if channel else kept}, meant


def mxfp4(name: str, weight: Tensor) -> Made:
    """weight: [experts, in, out]."""
    experts, inputs, rows = weight.shape
    blocks = torch.zeros(experts, rows, inputs // 32, 16, dtype=torch.uint8)
    scales = torch.zeros(experts, rows, inputs // 32, dtype=torch.uint8)
    meant = torch.zeros(weight.shape)
    for e in range(experts):
        for r in range(rows):
            for g in range(inputs // 32):
                values = [float(v) for v in weight[e, 32 * g : 32 * g + 32, r]]
                power = math.floor(math.log2(max(map(abs, values)) or 1.0)) - 2
                scales[e, r, g] = power + 127
                for n, value in enumerate(values):
                    code = _nearest(E2M1, abs(value) / 2.0**power) + (8 if value < 0 else 0)
                    blocks[e, r, g, n // 2] += code << 4 * (n % 2)
                    meant[e, 32 * g + n, r] = E2M1[code % 8] * (-1 if code > 7 else 1) * 2.0**power
    return {name + "_blocks": blocks, name + "_scales": scales}, meant


def gptq(
    name: str,
    weight: Tensor,
    *,
    bits: int = 4,
    group: int = 16,
    act_order: bool = False,
    v2: bool = False,
    sym: bool = False,
    g_idx: bool = True,
) -> Made:
    module, each, top = name.removesuffix(".weight"), 32 // bits, (1 << bits) - 1
    rows, inputs = weight.shape
    groups = -(-inputs // group)
    order = [i // group for i in range(inputs)]
    if act_order:
        order = [order[(7 * i + 3) % inputs] for i in range(inputs)]
    scales, zeros = torch.zeros(groups, rows, dtype=torch.float16), [[0] * rows for _ in range(groups)]
    for g in range(groups):
        for r in range(rows):
            values = [float(weight[r, i]) for i in range(inputs) if order[i] == g]
            low, high = min([*values, -1e-3]), max([*values, 1e-3])
            if sym:
                high = max(-low, high)
                low = -high
            scales[g, r] = (high - low) / top
            # the first format cannot store a zero point of 0
            zeros[g][r] = (top + 1) // 2 if sym else max(1, min(top, round(-low / float(scales[g, r]))))
    qweight = [[0] * rows for _ in range(inputs // each)]
    qzeros = [[0] * (rows // each) for _ in range(groups)]
    meant = torch.zeros(rows, inputs)
    for r in range(rows):
        for i in range(inputs):
            scale, zero = float(scales[order[i], r]), zeros[order[i]][r]
            code = max(0, min(top, round(float(weight[r, i]) / scale) + zero))
            qweight[i // each][r] |= code << bits * (i % each)
            meant[r, i] = (code - zero) * scale
        for g in range(groups):
            qzeros[g][r // each] |= (zeros[g][r] - (0 if v2 else 1)) << bits * (r % each)
    stored = {"qweight": _signed(qweight), "qzeros": _signed(qzeros), "scales": scales}
    if g_idx:
        stored["g_idx"] = torch.tensor(order, dtype=torch.int32)
    return {f"{module}.{role}": value for role, value in stored.items()}, meant


def awq(name: str, weight: Tensor, *, group: int = 16) -> Made:
    module, (rows, inputs) = name.removesuffix(".weight"), weight.shape
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # the output of each nibble of a word, from the lowest nibble
    scales = torch.zeros(inputs // group, rows, dtype=torch.float16)
    zeros = [[0] * rows for _ in range(inputs // group)]
    for g in range(inputs // group):
        for r in range(rows):
            values = weight[r, g * group : (g + 1) * group]
            low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
            scales[g, r] = max(high - low, 1e-3) / 15
            zeros[g][r] = max(0, min(15, round(-low / float(scales[g, r]))))
    meant = torch.zeros(rows, inputs)
    qweight, qzeros = [[0] * (rows // 8) for _ in range(inputs)], [[0] * (rows // 8) for _ in range(inputs // group)]
    for word in range(rows // 8):
        for nibble in range(8):
            r = 8 * word + order[nibble]
            for g in range(inputs // group):
                qzeros[g][word] |= zeros[g][r] << 4 * nibble
            for i in range(inputs):
                scale, zero = float(scales[i // group, r]), zeros[i // group][r]
                code = max(0, min(15, round(float(weight[r, i]) / scale) + zero))
                qweight[i][word] |= code << 4 * nibble
                meant[r, i] = (code - zero) * scale
    stored = {"qweight": _signed(qweight), "qzeros": _signed(qzeros), "scales": scales}
    return {f"{module}.{role}": value for role, value in stored.items()}, meant


def four_bit(name: str, weight: Tensor, *, kind: str = "nf4", block: int = 64, nested: int | None = None) -> Made:
    """bitsandbytes. nested: with double quantisation, the largest values of blocks are quantised too."""
    table = NF4 if kind == "nf4" else (*FP4, *(-value for value in FP4))
    table = tuple(torch.tensor(table).tolist())
    flat = [float(value) for value in weight.reshape(-1)]
    largest = [max(map(abs, flat[start : start + block])) or 1.0 for start in range(0, len(flat), block)]
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(weight.shape)}
    stored = {".quant_map": torch.tensor(table), ".absmax": torch.tensor(largest)}
    if nested is not None:
        steps = [math.copysign((abs(n) / 127) ** 2, n) for n in range(-128, 128)]
        steps = torch.tensor(steps).tolist()
        offset = sum(largest) / len(largest)
        moved = [value - offset for value in largest]
        outer = torch.tensor(
            [max(map(abs, moved[s : s + nested])) or 1.0 for s in range(0, len(moved), nested)]
        ).tolist()
        codes = [_nearest(steps, value / outer[n // nested]) for n, value in enumerate(moved)]
        largest = (
            torch.tensor([steps[code] for code in codes])
            * torch.tensor([outer[n // nested] for n in range(len(codes))])
            + offset
        ).tolist()
        stored.update(
            {
                ".absmax": torch.tensor(codes, dtype=torch.uint8),
                ".nested_absmax": torch.tensor(outer),
                ".nested_quant_map": torch.tensor(steps),
            }
        )
        state.update(nested_blocksize=nested, nested_dtype="float32", nested_offset=offset)
    packed, meant = [0] * -(-len(flat) // 2), []
    for n, value in enumerate(flat):
        code = _nearest(table, value / largest[n // block])
        packed[n // 2] |= code << (4 if n % 2 == 0 else 0)
        meant.append(table[code] * largest[n // block])
    stored[""] = torch.tensor(packed, dtype=torch.uint8)[:, None]
    stored[f".quant_state.bitsandbytes__{kind}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {name + ending: value for ending, value in stored.items()}, torch.tensor(meant).view(weight.shape)


def int8(name: str, weight: Tensor) -> Made:
    module, largest = name.removesuffix(".weight"), weight.abs().amax(dim=1)
    codes = torch.zeros(weight.shape, dtype=torch.int8)
    meant = torch.zeros(weight.shape)
    for r in range(len(weight)):
        for c in range(weight.shape[1]):
            codes[r, c] = round(float(weight[r, c]) / float(largest[r]) * 127)
            meant[r, c] = (codes[r, c].float() * largest[r]) * (1 / 127)
    return {name: codes, f"{module}.SCB": largest, f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8)}, meant


COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"]}
FORMATS: dict[str, tuple[Callable[..., Made], dict[str, Any], dict[str, Any]]] = {
    "fp8": (fp8_block, {}, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 24], "activation_scheme": "dynamic"}),
    "fp8_tensor": (fp8_scale, {"channel": False, "dtype": torch.float32}, {"quant_method": "fp8", "activation_scheme": "static"}),
    "compressed": (
        fp8_scale, {"channel": True},
        {**COMPRESSED, "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel",
                                                                 "symmetric": True}}}},
    ),
    "gptq": (gptq, {}, {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}),
    "gptq_sym": (gptq, {"sym": True}, {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True}),
    "gptq_v2_mislabelled": (
        gptq, {"sym": True, "v2": True}, {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "checkpoint_format": "gptq"}
    ),
    "gptq_act_order": (
        gptq, {"act_order": True}, {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True, "sym": False}
    ),
    "gptq_v2": (
        gptq, {"v2": True, "bits": 8, "g_idx": False},
        {"quant_method": "gptq", "bits": 8, "group_size": 16, "checkpoint_format": "gptq_v2", "sym": False},
    ),
    "awq": (awq, {}, {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}),
    "nf4": (four_bit, {}, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "nf4_nested": (four_bit, {"nested": 8}, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "fp4": (four_bit, {"kind": "fp4", "block": 48}, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "int8": (int8, {}, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
}  # fmt: skip
"""Name -> the function that stores a weight, its arguments, and the quantization_config."""


def linear(name: str) -> bool:
    """Whether a weight is quantised: matrices of attention and MLP but routers."""
    return name.endswith(("proj.weight", "proj_with_mqa.weight"))


def write(plain: Path, target: Path, format: str) -> dict[str, Tensor]:
    """Writes the model in `plain` to `target` in this format; returns the dequantised weights."""
    make, options, config = FORMATS[format]
    shutil.copytree(plain, target)
    stored, meant = {}, {}
    for name, value in load_file(plain / "model.safetensors").items():
        if linear(name):
            parts, meant[name] = make(name, value, **options)
            stored.update(parts)
        else:
            stored[name] = meant[name] = value
    if config.get("activation_scheme") == "static":
        stored["model.layers.0.mlp.up_proj.input_scale"] = torch.tensor([0.5])
    save_file({name: value.contiguous() for name, value in stored.items()}, target / "model.safetensors")
    set_config(target, quantization_config=config)
    return meant


def set_config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
