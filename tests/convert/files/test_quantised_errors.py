"""Each fault of a quantised checkpoint is one line, before any weight (or the faulty tensor) is dequantised."""

import json
from pathlib import Path

import pytest
import quantised_files as files
import torch
from safetensors.torch import load_file, save_file

from swift_mega.convert.files.quantised import drop_quantization, open_checkpoint
from swift_mega.errors import UserError

FP8 = dict(quant_method="fp8", weight_block_size=[16, 24])
GPTQ = dict(quant_method="gptq", bits=4, group_size=16)
AWQ = dict(quant_method="awq", bits=4, group_size=16)
BNB = dict(quant_method="bitsandbytes")
COMPRESSED = dict(quant_method="compressed-tensors", format="float-quantized")
STATE = "m.weight.quant_state.bitsandbytes__nf4"
MAKE = {
    "fp8": (files.fp8_block, (32, 48), FP8),
    "tensor": (lambda *given: files.fp8_scale(*given, channel=False), (32, 48), dict(quant_method="fp8")),
    "channel": (lambda *given: files.fp8_scale(*given, channel=True), (32, 48), COMPRESSED),
    "mxfp4": (files.mxfp4, (2, 64, 8), dict(quant_method="mxfp4")),
    "gptq": (files.gptq, (32, 48), GPTQ),
    "awq": (files.awq, (32, 48), AWQ),
    "nf4": (lambda *given: files.four_bit(*given, nested=8), (32, 48), BNB),
    "int8": (files.int8, (32, 48), BNB),
}  # fmt: skip


def raw(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def write(folder: Path, tensors: dict[str, torch.Tensor], config: object) -> Path:
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


def made(kind: str) -> tuple[dict[str, torch.Tensor], dict]:
    make, shape, config = MAKE[kind]
    return make("m.weight", torch.randn(shape))[0], dict(config)


@pytest.mark.parametrize(
    ("kind", "gone", "message"),
    [
        ("fp8", "m.weight_scale_inv", "m.weight is float8_e4m3fn and has no scale m.weight_scale_inv; copy"),
        ("fp8", "m.weight", "m.weight_scale_inv, which are scales of no quantised weight"),
        ("tensor", "m.weight_scale", "has no scale m.weight_scale;"),
        ("channel", "m.weight_scale", "has no scale m.weight_scale;"),
        ("mxfp4", "m.weight_scales", "has m.weight_blocks without m.weight_scales"),
        ("mxfp4", "m.weight_blocks", "has m.weight_scales without m.weight_blocks"),
        ("gptq", "m.scales", "has m.qweight, m.qzeros, m.g_idx without m.scales"),
        ("gptq", "m.qweight", "without m.qweight"),
        ("awq", "m.qzeros", "without m.qzeros"),
        ("nf4", "m.weight.absmax", r"lacks m.weight.absmax, and m.weight of \[32, 48\] in blocks of 64 needs it"),
        ("nf4", "m.weight.nested_quant_map", "lacks m.weight.nested_quant_map"),
        ("nf4", "m.weight", "lacks m.weight,"),
        ("nf4", "m.weight.quant_state.bitsandbytes__nf4", "m.weight.absmax.* without the quant_state"),
        ("int8", "m.weight", "lacks m.weight,"),
        ("int8", "m.SCB", "m.weight_format without the quant_state"),
    ],
)
def test_a_tensor_is_missing(tmp_path, kind, gone, message):
    tensors, config = made(kind)
    del tensors[gone]
    with pytest.raises(UserError, match=message):
        open_checkpoint(write(tmp_path, {**tensors, "norm.weight": torch.ones(3)}, config), torch.float32)


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        ("fp8", "m.weight_scale_inv", torch.ones(2, 3), r"m.weight_scale_inv is \[2, 3\] float32, .* needs \[2, 2\] float32"),
        ("fp8", "m.weight_scale_inv", torch.ones(2, 2, dtype=torch.int32), "is .* int32"),
        ("fp8", "m.weight", torch.ones(1536).to(torch.float8_e4m3fn), r"has shape \[1536\], not \[out, in\]"),
        ("tensor", "m.weight_scale", torch.ones(2), r"is \[2\] float32, .* needs \[1, 1\]"),
        ("mxfp4", "m.weight_scales", torch.ones(2, 8, 3, dtype=torch.uint8), r"m.weight_blocks is \[2, 8, 2, 16\] uint8"),
        ("mxfp4", "m.weight_scales", torch.ones(16, dtype=torch.uint8), r"m.weight_scales is \[16\]"),
        ("gptq", "m.scales", torch.ones(4, 32).half(), r"m.scales is \[4, 32\] float16, .* needs \[3, 32\]"),
        ("gptq", "m.qzeros", torch.ones(3, 3, dtype=torch.int32), r"m.qzeros is \[3, 3\]"),
        ("gptq", "m.qweight", torch.ones(6, dtype=torch.int32), r"m.qweight has shape \[6\], not a matrix"),
        ("gptq", "m.g_idx", torch.ones(7, dtype=torch.int32), r"m.g_idx is \[7\] int32, .* needs \[48\]"),
        ("awq", "m.scales", torch.ones(3, 32, dtype=torch.int32), "m.scales is .* int32, .* float16 or bfloat16 or float32"),
        ("nf4", "m.weight", torch.ones(700, 1, dtype=torch.uint8), r"m.weight is \[700, 1\] uint8, .* needs \[768, 1\]"),
        ("nf4", "m.weight.absmax", torch.ones(24), "m.weight.absmax is .* float32, .* uint8"),
        ("nf4", STATE, torch.ones(9, dtype=torch.uint8), "nf4 is not JSON"),
        ("nf4", STATE, raw('{"shape": [3]}'), "is not understood .*blocksize"),
        ("nf4", STATE, raw('{"shape": [3], "blocksize": 0, "quant_type": "nf4"}'), "blocksize 0"),
        ("int8", "m.weight_format", torch.tensor(2, dtype=torch.uint8), "m.weight_format is not 0"),
        ("int8", "m.weight", torch.ones(32, 48), "m.weight is .* float32, .* needs .* int8"),
    ],
)  # fmt: skip
def test_a_tensor_is_odd(tmp_path, kind, name, value, message):
    tensors, config = made(kind)
    tensors[name] = value
    with pytest.raises(UserError, match=message):
        open_checkpoint(write(tmp_path, tensors, config), torch.float32)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("fp8", dict(quant_method="aqlm"),
         "quant_method='aqlm' is not supported; supported: awq, bitsandbytes, compressed-tensors, fbgemm_fp8, fp8, gptq, modelopt, mxfp4"),
        ("fp8", dict(fmt="e5m2"), "fmt='e5m2' of quant_method='fp8' is not supported; supported: 'e4m3'"),
        ("fp8", dict(weight_block_size=[16, 0]), r"weight_block_size=\[16, 0\] is not two counts"),
        ("fp8", dict(weight_block_size=16), "weight_block_size=16 is not two counts"),
        ("fp8", dict(expert_dtype="fp4"), "expert_dtype='fp4'"),
        ("channel", dict(format="pack-quantized"), "format='pack-quantized'"),
        ("channel", dict(transform_config={"a": 1}), "transform_config="),
        ("channel", dict(config_groups={"g": {"weights": {"num_bits": 4}}}), "num_bits=4"),
        ("channel", dict(config_groups={"g": {"format": "nvfp4-pack-quantized"}}), "format='nvfp4-pack-quantized'"),
        ("channel", dict(config_groups={"g": {"weights": {"strategy": "group"}}}), "strategy='group'"),
        ("gptq", dict(bits=3), "bits=3 .* supported: 2, 4, 8"),
        ("gptq", dict(checkpoint_format="marlin"), "checkpoint_format='marlin'"),
        ("gptq", dict(sym=True), "qzeros has values .* says sym=true, which is 7 .* or 8 .*; correct sym"),
        ("awq", dict(version="gemv"), "version='gemv'"),
        ("awq", dict(zero_point=False), "zero_point=False"),
    ],
)  # fmt: skip
def test_a_config_is_not_understood(tmp_path, kind, change, message):
    tensors, config = made(kind)
    with pytest.raises(UserError, match=message):
        open_checkpoint(write(tmp_path, tensors, {**config, **change}), torch.float32).read("m.weight")


@pytest.mark.parametrize("config", [{"bits": 4}, "fp8", {"quant_method": None}])
def test_a_config_that_names_no_method(tmp_path, config):
    with pytest.raises(UserError, match=r"quantization_config is .*, which names no quant_method"):
        open_checkpoint(write(tmp_path, {"w": torch.ones(3)}, config), torch.float32)


def test_nothing_to_dequantise(tmp_path):
    """--dequantize on a plain model has no effect, so it is an error. A quantization_config that no tensor agrees with is an error too."""
    with pytest.raises(
        UserError, match=r"model\.dequantize=true, but .* states no quantization_config: its weights are plain"
    ):
        open_checkpoint(write(tmp_path, {"w": torch.ones(3)}, None), torch.float32)
    with pytest.raises(UserError, match="states quant_method='fp8', but none of its tensors has that format"):
        open_checkpoint(write(tmp_path, {"w": torch.ones(3)}, FP8), torch.float32)


def test_plain_and_quantised(tmp_path):
    tensors, config = made("awq")
    with pytest.raises(UserError, match=r"holds m.weight plain and quantised"):
        open_checkpoint(write(tmp_path, {**tensors, "m.weight": torch.ones(32, 48)}, config), torch.float32)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("fp8", "m.weight_scale_inv"), ("channel", "m.weight_scale"), ("gptq", "m.scales"), ("awq", "m.scales"),
     ("nf4", "m.weight.nested_absmax"), ("int8", "m.SCB")],
)  # fmt: skip
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_none(tmp_path, kind, name, value):
    tensors, config = made(kind)
    tensors[name].view(-1)[-1] = value
    found = open_checkpoint(write(tmp_path, tensors, config), torch.bfloat16)
    with pytest.raises(UserError, match=f"{name} .* has 1 value that is not finite"):
        found.read("m.weight")


def test_a_power_that_is_none(tmp_path):
    tensors, config = made("mxfp4")
    tensors["m.weight_scales"][1, 2, 0] = 255
    with pytest.raises(UserError, match=r"m.weight_scales has scales that are NaN \(255\)"):
        open_checkpoint(write(tmp_path, tensors, config), torch.bfloat16).read("m.weight")


def test_groups_that_are_not_there(tmp_path):
    tensors, config = made("gptq")
    tensors["m.g_idx"][5] = 3
    with pytest.raises(UserError, match=r"m.g_idx names groups from 0 to 3, and m.scales has 3"):
        open_checkpoint(write(tmp_path, tensors, config), torch.float32).read("m.weight")
    del tensors["m.g_idx"]
    with pytest.raises(UserError, match="m has no g_idx, and quantization_config says desc_act=true"):
        open_checkpoint(write(tmp_path, tensors, {**config, "desc_act": True}), torch.float32)


def test_a_zero_point_that_readers_disagree_on(tmp_path):
    """In the first format of GPTQ, some readers take 15 as zero point 0 and others as 16, and it may have overflowed into neighbouring
    values."""
    tensors, config = made("gptq")
    tensors["m.qzeros"][0, 0] |= 15
    with pytest.raises(
        UserError,
        match=r"m.qzeros has the value 15, a zero point of 0 or of 16 that checkpoint_format=gptq cannot tell apart",
    ):
        open_checkpoint(write(tmp_path, tensors, config), torch.float32).read("m.weight")


@pytest.mark.parametrize(("sidecar", "kind"), [("quantize_config.json", "gptq"), ("quant_config.json", "awq")])
def test_older_tools_said_it_beside_config_json(tmp_path, sidecar, kind):
    tensors, config = made(kind)
    write(tmp_path, tensors, None)
    config.pop("quant_method")
    (tmp_path / sidecar).write_text(json.dumps(config))
    found = open_checkpoint(tmp_path, torch.float32)
    config["quant_method"] = kind
    (tmp_path / "new").mkdir()
    assert torch.equal(
        found.read("m.weight"),
        open_checkpoint(write(tmp_path / "new", tensors, config), torch.float32).read("m.weight"),
    )
    drop_quantization(tmp_path)
    assert not (tmp_path / sidecar).exists() and json.loads((tmp_path / "config.json").read_text()) == {
        "quantization_config": None
    }


def test_a_config_that_is_no_json(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        open_checkpoint(tmp_path, torch.float32)
    assert load_file(tmp_path / "model.safetensors")["w"].shape == (3,)
