"""Other libraries' dequantisers, on files from them or from random bytes: transformers for MXFP4 and FP8, and bitsandbytes if it is
installed."""

from pathlib import Path

import pytest
import quantised_files as files
import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from swift_mega.convert.files.quantised import open_checkpoint


def save(directory: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    save_file({name: value.contiguous() for name, value in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    files.set_config(directory, quantization_config=config)
    return directory


def random_bytes(*shape: int, low: int = 0, high: int = 256) -> torch.Tensor:
    return torch.randint(low, high, shape, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_is_transformers(tmp_path, dtype):
    """Every byte, and most powers of two, with the smallest and the largest that bfloat16 can multiply by."""
    blocks, scales = random_bytes(3, 40, 6, 16), random_bytes(3, 40, 6, low=1, high=252)
    folder = save(tmp_path, {"x_blocks": blocks, "x_scales": scales}, quant_method="mxfp4")
    want = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    assert torch.equal(open_checkpoint(folder, dtype).read("x"), want)
    assert torch.equal(open_checkpoint(folder, dtype).read("x", 1, 70, 130), want[:, 70:130])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(256, 384), (3, 128, 256)])
def test_fp8_is_transformers(tmp_path, dtype, shape):
    """Every code that is a number, with DeepSeek's blocks of 128 x 128; experts one by one and stacked."""
    codes = random_bytes(*shape, high=127) | random_bytes(*shape, high=2) << 7
    weight, scales = codes.view(torch.float8_e4m3fn), torch.rand(*shape[:-2], shape[-2] // 128, shape[-1] // 128)
    folder = save(
        tmp_path, {"x.weight": weight, "x.weight_scale_inv": scales}, quant_method="fp8", weight_block_size=[128, 128]
    )
    want = Fp8Dequantize(None)._dequantize_one(weight, scales, dtype)
    assert torch.equal(open_checkpoint(folder, dtype).read("x.weight"), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_bitsandbytes(tmp_path, kind, nested, dtype):
    """bitsandbytes' own quantiser and dequantiser. Rows are at least one block long, because its CPU code of 0.50 is wrong for shorter
    rows."""
    functional = pytest.importorskip("bitsandbytes.functional")
    tensors, want = {}, {}
    for block in (64, 128):
        for shape in ((96, 128), (33, 165), (300, 512)):
            name = f"x{len(want)}.weight"
            packed, state = functional.quantize_4bit(
                torch.randn(shape).to(dtype), blocksize=block, compress_statistics=nested, quant_type=kind
            )
            tensors[name] = packed
            tensors.update({f"{name}.{part}": value.clone() for part, value in state.as_dict(packed=True).items()})
            want[name] = functional.dequantize_4bit(packed, state)
    found = open_checkpoint(save(tmp_path, tensors, quant_method="bitsandbytes", load_in_4bit=True), dtype)
    for name, value in want.items():
        assert torch.equal(found.read(name), value), name
        assert torch.equal(found.read(name, 0, 5, 30), value[5:30]), name


def test_int8_is_bitsandbytes(tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, largest, _ = functional.int8_vectorwise_quant(torch.randn(48, 40).half())
    folder = save(tmp_path, {"x.weight": codes, "x.SCB": largest}, quant_method="bitsandbytes", load_in_8bit=True)
    assert torch.equal(
        open_checkpoint(folder, torch.float32).read("x.weight"), functional.int8_vectorwise_dequant(codes, largest)
    )
