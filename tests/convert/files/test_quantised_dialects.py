"""Published variants of quantization_config: fields that change no number are accepted, and an unknown field stops a dry run."""

import inspect
import json
import shutil
from typing import Any

import pytest
import quantised_files as files
import torch
import transformers.utils.quantization_config as theirs
from safetensors.torch import load_file, save_file

import tiny
from swift_mega import api
from swift_mega.api import Candidate
from swift_mega.convert.files import formats
from swift_mega.convert.files.quantised import open_checkpoint
from swift_mega.discover import scan
from swift_mega.errors import UserError
from swift_mega.models.quantization_fields import COMMON, METHODS, judge

GROUP = {
    "targets": ["Linear"], "output_activations": None,
    "input_activations": {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token", "symmetric": True},
    "weights": {
        "actorder": None, "block_structure": None, "dynamic": False, "group_size": None, "num_bits": 8, "observer": "minmax",
        "observer_kwargs": {}, "strategy": "channel", "symmetric": True, "type": "float",
    },
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "MiniMax-M2": {
        "activation_scheme": "dynamic", "fmt": "float8_e4m3fn", "quant_method": "fp8", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
    },
    "DeepSeek-V3.1": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128],
    },
    "Qwen3-FP8": {
        "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm"], "fmt": "e4m3",
        "quant_method": "fp8", "weight_block_size": [128, 128],
    },
    "Ministral 3": {
        "activation_scheme": "static", "dequantize": False, "modules_to_not_convert": ["lm_head"], "quant_method": "fp8",
        "weight_block_size": None,
    },
    "Llama-3.1-405B-FP8": {"activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"], "quant_method": "fbgemm_fp8"},
    "llm-compressor": {
        "config_groups": {"group_0": GROUP}, "format": "float-quantized", "global_compression_ratio": 1.5, "ignore": ["lm_head"],
        "kv_cache_scheme": None, "quant_method": "compressed-tensors", "quantization_status": "frozen", "sparsity_config": {},
        "transform_config": {}, "version": "0.11.0",
    },
    "ModelOpt": {
        "config_groups": {"group_0": {"input_activations": {"dynamic": False, "num_bits": 8, "type": "float"},
                                      "weights": {"dynamic": False, "num_bits": 8, "type": "float"}, "targets": ["Linear"]}},
        "ignore": ["lm_head"], "quant_algo": "FP8", "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "producer": {"name": "modelopt", "version": "0.29.0"}, "quant_method": "modelopt",
    },
    "Qwen2.5-GPTQ": {
        "batch_size": 1, "bits": 4, "block_name_to_quantize": None, "cache_block_outputs": True, "damp_percent": 0.01,
        "dataset": None, "desc_act": False, "exllama_config": {"version": 1}, "group_size": 128, "max_input_length": None,
        "model_seqlen": None, "module_name_preceding_first_block": None, "modules_in_block_to_quantize": None,
        "pad_token_id": None, "quant_method": "gptq", "sym": True, "tokenizer": None, "true_sequential": True,
        "use_cuda_fp16": False, "use_exllama": True,
    },
    "GPTQModel": {
        "bits": 4, "checkpoint_format": "gptq", "desc_act": True, "dynamic": {"-:.*gate": {}}, "group_size": 128, "lm_head": False,
        "meta": {"quantizer": ["gptqmodel:1.4.4"], "damp_percent": 0.05}, "pack_dtype": "int32", "quant_method": "gptq", "sym": True,
    },
    "AutoAWQ": {
        "bits": 4, "group_size": 128, "modules_to_not_convert": None, "quant_method": "awq", "version": "GEMM", "zero_point": True,
        "backend": "autoawq", "do_fuse": False, "exllama_config": None, "fuse_max_seq_len": None, "modules_to_fuse": None,
    },
    "unsloth": {
        "_load_in_4bit": True, "_load_in_8bit": False, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": None, "llm_int8_threshold": 6.0, "load_in_4bit": True,
        "load_in_8bit": False, "quant_method": "bitsandbytes",
    },
    "gpt-oss": {"modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"], "quant_method": "mxfp4"},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_published_is_understood(name):
    assert judge(PUBLISHED[name], "here") == ()


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        (
            "MiniMax-M2",
            dict(fmt="float8_e5m2"),
            "fmt='float8_e5m2' of quant_method='fp8' is not supported; supported: 'e4m3'",
        ),
        ("MiniMax-M2", dict(weight_block_size=[0, 128]), r"weight_block_size=\[0, 128\] is not two counts"),
        ("DeepSeek-V3.1", dict(scale_fmt="e5m3"), "scale_fmt='e5m3'"),
        ("ModelOpt", dict(quant_algo="NVFP4"), "quant_algo='NVFP4'"),
        ("llm-compressor", dict(config_groups={"g": {"weights": {"num_bits": 4}}}), "num_bits=4"),
        ("llm-compressor", dict(config_groups={"g": {"weights": {"dynamic": True}}}), "dynamic=True"),
        ("llm-compressor", dict(config_groups=[3]), r"config_groups=\[3\] is not groups of weights"),
        ("GPTQModel", dict(dynamic={"+:.*down": {"bits": 8}}), "dynamic=.* gives modules bits or groups of their own"),
        ("GPTQModel", dict(format="gptq_v2"), r"checkpoint_format and format say \['gptq', 'gptq_v2'\]"),
        ("GPTQModel", dict(group_size=0), "group_size=0 is not a count, or -1 for whole rows"),
        ("AutoAWQ", dict(version="gemv_fast"), "version='gemv_fast'"),
        ("AutoAWQ", dict(backend="llm-awq"), "backend='llm-awq'"),
        ("unsloth", dict(bnb_4bit_quant_storage="bfloat16"), "bnb_4bit_quant_storage='bfloat16'"),
        ("gpt-oss", dict(quant_method="hqq"), "quant_method='hqq' is not supported; supported: awq, "),
    ],
)
def test_a_dry_run_of_a_config_alone_judges_the_quantisation(tmp_path, name, fields, said):
    """A dry run refuses the same configs with and without weights, so a conversion that it accepts is possible."""
    tiny.make(tmp_path / "model", "llama", num_hidden_layers=1)
    files.set_config(tmp_path / "model", quantization_config=PUBLISHED[name] | fields)
    shutil.copytree(tmp_path / "model", tmp_path / "alone", ignore=shutil.ignore_patterns("*.safetensors"))
    for folder in ("alone", "model"):
        with pytest.raises(UserError, match=said):
            api.plan(source=str(tmp_path / folder), dequantize=True)


def test_a_field_that_nobody_reads_is_a_note(tmp_path, monkeypatch):
    """A field that nothing reads is a note. A field that transformers declares and our lists do not have is refused."""
    odd = PUBLISHED["MiniMax-M2"] | {"made_on": "Monday"}
    assert judge(odd, "here") == (
        "quantization_config has fields that neither transformers nor this reads: made_on='Monday'",
    )
    tiny.make(tmp_path, "llama", num_hidden_layers=1)
    files.set_config(tmp_path, quantization_config=odd)
    (tmp_path / "model.safetensors").unlink()
    assert "note      quantization_config has fields" in api.plan(source=str(tmp_path), dequantize=True).table()
    monkeypatch.delitem(METHODS["fp8"].fields, "scale_fmt")
    with pytest.raises(
        UserError, match="scale_fmt='ue8m0' of quant_method='fp8' is not understood, and transformers reads it"
    ):
        judge(PUBLISHED["DeepSeek-V3.1"], "here")


def test_every_method_has_a_format_and_every_declared_field_is_known():
    assert METHODS.keys() == {method for entry in scan(formats, "FORMAT").values() for method in entry.methods}
    for name, method in METHODS.items():
        if method.transformers is not None:
            declared = set(inspect.signature(getattr(theirs, method.transformers).__init__).parameters) - {
                "self",
                "kwargs",
            }
            assert declared <= method.fields.keys() | COMMON.keys(), name


@pytest.mark.parametrize("ending", ["_scale", "_scale_inv"])
@pytest.mark.parametrize("name", ["Ministral 3", "ModelOpt", "Llama-3.1-405B-FP8"])
def test_scales_under_either_name(tmp_path, name, ending):
    """transformers writes one scale of a whole tensor as `weight_scale_inv`, others as `weight_scale`; scales of the KV cache do not
    belong to weights."""
    channel = name == "Llama-3.1-405B-FP8"
    stored, meant = files.fp8_scale("m.k_proj.weight", torch.randn(16, 24), channel=channel)
    stored = {part.replace("_scale", ending): value for part, value in stored.items()}
    stored |= {
        f"m.{part}": torch.tensor([0.5])
        for part in ("k_proj.k_scale", "k_proj.input_scale", "k_proj.activation_scale", "q_scale")
    }
    save_file({part: value.contiguous() for part, value in stored.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": PUBLISHED[name]}))
    found = open_checkpoint(tmp_path, torch.float32)
    assert list(found.entries) == ["m.k_proj.weight"] and torch.equal(found.read("m.k_proj.weight"), meant)
    stored |= {f"m.k_proj.weight{other}": torch.tensor([0.5]) for other in ("_scale", "_scale_inv")}
    save_file({part: value.contiguous() for part, value in stored.items()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"m.k_proj.weight is float8_e4m3fn and has two scales"):
        open_checkpoint(tmp_path, torch.float32)


def test_gptq_v2_under_transformers_name_of_the_field(tmp_path):
    """`format` in place of `checkpoint_format`: zero points are stored unchanged, not minus one."""
    stored, meant = files.gptq("m.weight", torch.randn(16, 32), v2=True)
    save_file({part: value.contiguous() for part, value in stored.items()}, tmp_path / "model.safetensors")
    config = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "format": "gptq_v2"}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    assert torch.equal(open_checkpoint(tmp_path, torch.float32).read("m.weight"), meant)


def test_modelopts_own_file_says_it_too(tmp_path):
    """hf_quant_config.json is read where config.json has no quantisation."""
    stored, meant = files.fp8_scale("m.weight", torch.randn(16, 24), channel=False)
    save_file({part: value.contiguous() for part, value in stored.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    said = {
        "producer": {"name": "modelopt"},
        "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": []},
    }
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(said))
    assert torch.equal(open_checkpoint(tmp_path, torch.float32).read("m.weight"), meant)


def test_a_quantised_original_of_a_megatron_checkpoint(tmp_path):
    """Config, tokenizer and names come from the original; the weights are Megatron's, so the written files are plain."""
    plain, eight = tiny.make(tmp_path / "plain", "llama", num_hidden_layers=1), tmp_path / "eight"
    meant = files.write(plain, eight, "fp8")
    mcore = str(tmp_path / "mcore")
    api.convert(source=str(eight), to="mcore", output=mcore, dequantize=True, dtype="float32")
    shutil.rmtree(tmp_path / "mcore" / "hf")  # as Megatron-LM would write it
    api.convert(source=mcore, model=str(eight), to="hf", output=str(tmp_path / "back"), dtype="float32")
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == meant.keys() and all(
        torch.equal(found[name], value.float()) for name, value in meant.items()
    )
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    assert api.compare(Candidate(checkpoint=mcore, model=str(eight)), str(tmp_path / "back")).passed
    with pytest.raises(
        UserError, match=r"dequantize=True, but the weights of .* are Megatron's, which are plain; set dequantize=False"
    ):
        api.convert(source=mcore, model=str(eight), to="hf", output=str(tmp_path / "other"), dequantize=True)
