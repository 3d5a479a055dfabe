"""Rotary embedding equals complex multiplication in float64, value and gradient; its tables equal Hugging Face's."""

import importlib

import pytest
import torch
from torch import Tensor

from swift_mega.models.settings import Rope
from swift_mega.ops.rope import rotate, rotate_reference, tables


def _complex(x: Tensor, angles: Tensor, scale: float) -> Tensor:
    """Features i and i + rotary_dim / 2 are one complex number, rotated by its angle. angles: [tokens, 1, rotary_dim / 2]."""
    half = angles.shape[-1]
    x = x.double()
    numbers = torch.complex(x[..., :half], x[..., half : 2 * half])
    rotated = numbers * torch.polar(torch.full_like(angles, scale), angles)
    return torch.cat((rotated.real, rotated.imag, x[..., 2 * half :]), dim=-1)


@pytest.mark.parametrize("function", [rotate, rotate_reference])
@pytest.mark.parametrize(("head_dim", "rotary"), [(16, 16), (16, 8), (6, 2)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_value_and_gradient_equal_complex_multiplication(function, head_dim, rotary, dtype, tolerance):
    """Also where the rotary dim is smaller than the head, and with YaRN's factor, which multiplies the gradient too."""
    torch.manual_seed(0)
    angles = 7 * torch.randn(8, 1, rotary // 2, dtype=torch.float64)
    x = torch.randn(8, 3, head_dim, dtype=dtype, requires_grad=True)
    above = torch.randn_like(x)
    got = function(x, (1.25 * angles.cos()).to(dtype), (1.25 * angles.sin()).to(dtype))
    want = _complex(x, angles, 1.25)
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance, check_dtype=False)
    (found,) = torch.autograd.grad(got, x, above)
    (expected,) = torch.autograd.grad(want, x, above.double())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance, check_dtype=False)


def test_tables_of_packed_positions():
    """Every token has its own position; the factor multiplies both tables."""
    positions, frequencies = torch.tensor([0, 1, 2, 0, 1, 77]), 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    cos, sin = tables(positions, frequencies, 1.25, torch.float32)
    angles = positions.double()[:, None, None] * frequencies.double()
    torch.testing.assert_close(cos.double(), 1.25 * angles.cos(), rtol=0, atol=1e-5)
    torch.testing.assert_close(sin.double(), 1.25 * angles.sin(), rtol=0, atol=1e-5)


FREQUENCIES = 10000.0 ** -(torch.arange(0, 16, 2) / 16)


@pytest.mark.parametrize("axes", [(0, 0, 1, 1, 1, 2, 2, 2), (0, 1, 2, 0, 1, 2, 0, 0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_axes_are_one_axis(axes, dtype):
    """Bit for bit, also where every token has its own frequencies (LongRoPE)."""
    positions = torch.randint(0, 4000, (9,))
    for frequencies in (FREQUENCIES, torch.rand(9, 1, 8)):
        one = tables(positions, frequencies, 1.25, dtype)
        three = tables(positions.expand(3, -1), frequencies, 1.25, dtype, torch.tensor(axes))
        assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_several_axes_equal_transformers(name):
    """Rotated queries and keys of Qwen2-VL and Qwen2.5-VL, whose pairs are in sections, and of Qwen3-VL, whose pairs alternate."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    kinds = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VLText"}
    alternate = name == "qwen3_vl"
    sections = (4, 2, 2) if alternate else (2, 3, 3)
    config = CONFIG_MAPPING[f"{name}_text"](hidden_size=64, num_attention_heads=4)
    config.head_dim = 16
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    theirs = getattr(module, f"{kinds[name]}RotaryEmbedding")(config)
    positions = torch.randint(0, 3000, (3, 1, 11))
    query, key = (torch.randn(1, heads, 11, 16, dtype=torch.float64) for heads in (4, 2))
    want = module.apply_rotary_pos_emb(query, key, *theirs(query, positions))
    rope = Rope(tuple(theirs.inv_freq.tolist()), sections=sections, sections_interleaved=alternate)
    cos, sin = tables(positions[:, 0], theirs.inv_freq, 1.0, torch.float64, torch.tensor(rope.axes))
    for ours, expected in zip((query, key), want, strict=True):
        got = rotate(ours[0].transpose(0, 1), cos, sin)
        torch.testing.assert_close(got, expected[0].transpose(0, 1), rtol=0, atol=1e-12)


def test_input_is_left_as_it_is():
    x = torch.randn(4, 2, 8)
    kept = x.clone()
    cos, sin = tables(torch.arange(4), torch.rand(4), 1.0, x.dtype)
    rotate(x, cos, sin)
    assert torch.equal(x, kept)


def test_part_of_a_wider_tensor():
    """Megatron passes a slice of the fused projection's output, and gradients may have any strides."""
    wide = torch.randn(5, 4, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = tables(torch.arange(5), torch.rand(4), 1.0, wide.dtype)
    above = torch.randn(2, 5, 8, dtype=torch.float64).transpose(0, 1)
    (found,) = torch.autograd.grad(rotate(wide[:, 1:3], cos, sin), wide, above)
    (expected,) = torch.autograd.grad(rotate_reference(wide[:, 1:3], cos, sin), wide, above)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_tables_are_float32_like_hugging_face():
    """Angles of large positions are rounded to float32 before the cosine, whatever the model's dtype: the rounding is part of the model."""
    positions, frequencies = torch.tensor([131071]), torch.tensor([0.7310586])
    cos, _ = tables(positions, frequencies, 1.0, torch.bfloat16)
    assert cos.item() == (positions.float() * frequencies).cos().bfloat16().item()
