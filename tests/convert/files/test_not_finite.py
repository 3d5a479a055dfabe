"""No command writes NaN or infinity: each stops with the tensor's name and status 2, and leaves no output."""

import json
import math
import shutil
from pathlib import Path

import pytest
import quantised_files as files
import torch
from safetensors.torch import load_file, save_file

import tiny
from swift_mega.cli import main
from swift_mega.convert.files.quantised import open_checkpoint
from swift_mega.errors import UserError

Q = "model.layers.0.self_attn.q_proj"
A, B = (f"base_model.model.{Q}.lora_{letter}.weight" for letter in "AB")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    source = tiny.make_chat(folder / "model", "llama", num_hidden_layers=1, max_position_embeddings=512)
    (folder / "rows.jsonl").write_text('{"query": "Who are you?", "response": "I am a test."}\n')
    return source


def changed(model: Path, folder: Path, name: str, value: float, dtype: torch.dtype = torch.float32) -> Path:
    """A copy in which the last number of a tensor is `value`."""
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(file).items()}
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file, {"format": "pt"})
    return folder


def adapter(folder: Path, a: float, b: float) -> Path:
    folder.mkdir()
    save_file({A: torch.full((2, 32), a), B: torch.full((64, 2), b)}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def stops(tmp_path: Path, capfd: pytest.CaptureFixture, *words: object) -> str:
    """The single line of the error. Asserts that no output and no staging directory exists."""
    before = sorted(tmp_path.iterdir())
    assert main([str(word) for word in words]) == 2
    said = capfd.readouterr().err
    assert sorted(tmp_path.iterdir()) == before and "Traceback" not in said
    return next(line for line in said.splitlines() if "error: " in line)


@pytest.mark.parametrize("name", ["model.norm.weight", f"{Q}.weight"])
@pytest.mark.parametrize("road", ["hf", "mcore", "merge", "fp8"])
def test_a_tensor_of_the_source(model, tmp_path, capfd, road, name):
    source = changed(model, tmp_path / "model", name, math.nan)
    out = ["--model", source, "--output", tmp_path / "out"]
    words = {
        "hf": ["convert", *out, "--to", "hf", "--max_shard_size", "20KB"],
        "mcore": ["convert", *out, "--to", "mcore"],
        "fp8": ["export", *out, "--quant_method", "fp8"],
        "merge": ["export", *out, "--adapters", adapter(tmp_path / "adapter", 1.0, 1.0), "--merge_lora", "true"],
    }
    assert f"{name} " in (said := stops(tmp_path, capfd, *words[road])) and "not finite, the first (nan) at [" in said


def test_an_adapter(model, tmp_path, capfd):
    merge = ["export", "--model", model, "--merge_lora", "true", "--output", tmp_path / "out", "--adapters"]
    said = stops(tmp_path, capfd, *merge, adapter(tmp_path / "nan", 1.0, math.nan))
    assert f"nan: {B} [64, 2] has 128 values that are not finite, the first (nan) at [0, 0]" in said
    # Both factors are finite; their product is not.
    said = stops(tmp_path, capfd, *merge, adapter(tmp_path / "big", 1e30, 1e30))
    assert f"{Q}.weight [64, 32] has 2048 values that are not finite, the first (inf) at [0, 0]" in said
    rows = [
        "--dataset",
        model.parent / "rows.jsonl",
        "--max_steps",
        "1",
        "--global_batch_size",
        "1",
        "--output_dir",
        tmp_path / "run",
    ]
    start = [
        "--tuner_type",
        "lora",
        "--lora_rank",
        "2",
        "--lora_alpha",
        "2",
        "--target_modules",
        "q_proj",
        "--adapters",
        tmp_path / "nan",
    ]
    assert main([str(word) for word in ("sft", "--model", model, *rows, *start)]) == 2
    assert f"{B} [64, 2] has 128 values that are not finite" in capfd.readouterr().err


def test_beyond_the_range_of_the_dtype(model, tmp_path, capfd):
    """A number that is finite in the source, or in float32, and infinite in the output dtype."""
    source = changed(model, tmp_path / "model", "model.norm.weight", 1e39, torch.float64)
    out, narrow = ["--output", tmp_path / "out"], ["--torch_dtype", "float32"]
    what = (
        "model.norm.weight [32] has 1 value beyond the range of float32 (the largest is 1e+39, float32 ends at 3.4e+38)"
    )
    said = stops(tmp_path, capfd, "convert", "--model", source, "--to", "hf", *out, *narrow)
    assert what in said and said.endswith(
        "write it in float64 (--torch_dtype), or convert the model to that dtype first"
    )
    assert "values beyond the range of torch.float32" in stops(
        tmp_path, capfd, "convert", "--model", source, "--to", "mcore", *out, *narrow
    )
    assert main(["convert", "--model", str(source), "--to", "mcore", "--output", str(tmp_path / "mcore")]) == 0
    assert what in stops(tmp_path, capfd, "convert", "--mcore", tmp_path / "mcore", "--to", "hf", *out, *narrow)
    half = changed(model, tmp_path / "half", "model.norm.weight", 1.0, torch.float16)
    merge = [
        "export",
        "--model",
        half,
        "--adapters",
        adapter(tmp_path / "adapter", 1.0, 4e4),
        "--merge_lora",
        "true",
        *out,
    ]
    said = stops(tmp_path, capfd, *merge)
    assert (
        f"{Q}.weight [64, 32] has 2048 values beyond the range of float16 (the largest is 8e+04, float16 ends at 6.55e+04)"
        in said
    )
    assert said.endswith("write it in bfloat16 or float32 (--torch_dtype), or convert the model to that dtype first")


def test_a_mask_may_hold_infinity(tmp_path):
    """A mask of GPT-NeoX, as older transformers saved it in float16: it follows from config.json and is copied; infinity in the next
    tensor is an error."""
    source = tiny.make(tmp_path / "model", "gpt_neox", dtype=torch.float16)
    file, mask = source / "model.safetensors", "gpt_neox.layers.0.attention.masked_bias"
    tensors = load_file(file) | {mask: torch.tensor(-1e9).half()}
    assert tensors[mask].isinf()
    save_file(tensors, file, {"format": "pt"})
    command = ["convert", "--model", str(source), "--to", "hf", "--output"]
    assert main([*command, str(tmp_path / "out")]) == 0
    assert load_file(tmp_path / "out" / "model.safetensors")[mask].isinf()
    tensors["gpt_neox.final_layer_norm.bias"][0] = -math.inf
    save_file(tensors, file, {"format": "pt"})
    assert main([*command, str(tmp_path / "again")]) == 2 and not (tmp_path / "again").exists()


def test_a_quantised_weight_beyond_float16(model, tmp_path):
    """The largest number of a code times its scale."""
    weight = torch.randn(16, 24)
    weight[3, 5] = 1e5
    stored, _ = files.fp8_block("m.weight", weight)
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": files.FORMATS["fp8"][2]}))
    assert open_checkpoint(tmp_path, torch.bfloat16).read("m.weight").max() > 9e4
    with pytest.raises(UserError, match=r"m.weight, dequantised, \[16, 24\] has 1 value beyond the range of float16"):
        open_checkpoint(tmp_path, torch.float16).read("m.weight")


@pytest.mark.parametrize(
    ("tuner", "name"), [("full", r"model.embed_tokens.weight"), ("lora", "base_model.model.model.layers.0.")]
)
def test_what_training_made(model, tmp_path, capfd, tuner, name):
    """Weights that diverged are not written: both ranks stop, and the run's folder has no checkpoint."""
    words = [
        "sft",
        "--model",
        model,
        "--tuner_type",
        tuner,
        "--dataset",
        model.parent / "rows.jsonl",
        "--max_steps",
        "1",
        "--lr",
        "1e39",
        "--min_lr",
        "1e39",
        "--global_batch_size",
        "1",
        "--output_dir",
        tmp_path / "run",
        "--add_version",
        "false",
        "--tp",
        "2",
        "--clip_grad",
        "0",
        "--nproc",
        "2",
    ]
    assert main([str(word) for word in words]) == 2
    said = capfd.readouterr().err
    assert "not finite" in said and name in said, said
    assert not list((tmp_path / "run").glob("checkpoint-*"))
