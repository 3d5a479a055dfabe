"""Quantised checkpoints in layouts, training, conversion and merging, against their plain weights."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import bench
import pytest
import quantised_files as files
import torch
from safetensors.torch import load_file, save_file

import tiny
from swift_mega import api
from swift_mega.cli import main
from swift_mega.convert.files.hf_files import Checkpoint
from swift_mega.convert.files.quantised import drop_quantization
from swift_mega.errors import UserError
from swift_mega.launch.torchrun import run_ranks
from swift_mega.models.translate import load_settings
from swift_mega.parallel.layout import parse_layout, plan_layout
from swift_mega.verify import parity


def pair(folder: Path, format: str, family: str = "llama", **changes: Any) -> tuple[Path, Path]:
    """A quantised model and its plain float32 model."""
    make = tiny.make_chat if changes.pop("chat", False) else tiny.make
    source = make(folder / "source", family, **changes)
    meant = files.write(source, folder / "quantised", format)
    save_file({name: value.contiguous() for name, value in meant.items()}, source / "model.safetensors")
    return folder / "quantised", source


def check(folder: Path, cpu: Any, quantised: Path, meant: Path, layout: str) -> None:
    """Logits, loss and gradients of a layout that dequantises its slices, and of transformers on the plain weights."""
    parallel, world = parse_layout(layout)
    parallel = dataclasses.replace(parallel, distributed_optimizer=False)
    run = bench.settings(quantised, parallel, "full")
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, dequantize=True))
    shape = load_settings(quantised, dequantize=True).shape
    rows = parity.example_rows(shape.vocab, examples=8)
    run_ranks(1, parity.reference, meant, None, rows, folder / "reference")
    run_ranks(world, parity.measure, run, cpu, plan_layout(parallel, shape, world), rows, folder / layout)
    found = parity.compare(layout, folder / "reference", folder / layout)
    assert found.logits < 1e-4 and found.loss < 2e-6 and found.gradient < 1e-5, found


@pytest.mark.parametrize("format", list(files.FORMATS))
def test_every_format_computes_what_its_weights_mean(tmp_path, cpu, format):
    check(tmp_path, cpu, *pair(tmp_path, format, num_hidden_layers=1), "tp2")


@pytest.mark.parametrize("format", ["fp8", "gptq", "awq"])
def test_ranks_with_a_part_of_a_key_head(tmp_path, cpu, format):
    """12 of 48 rows of query, key and value on each rank: slices begin and end within blocks and packed words."""
    check(tmp_path, cpu, *pair(tmp_path, format, "llama_4_1", num_hidden_layers=1), "tp4")


@pytest.mark.parametrize("layout", ["tp2-ep2-etp1-sp", "pp2"])
def test_deepseek_in_fp8(tmp_path, cpu, layout):
    """Latent attention, dense layers and experts, in FP8 blocks whose size divides few of their sizes."""
    check(tmp_path, cpu, *pair(tmp_path, "fp8", "deepseek_v3_moe"), layout)


def test_settings_are_the_plain_models(tmp_path):
    """The quantisation changes no setting of the model. Without --dequantize it is refused, and the error names the flag."""
    quantised, meant = pair(tmp_path, "fp8", num_hidden_layers=1)
    assert load_settings(quantised, dequantize=True) == load_settings(meant) == load_settings(meant, dequantize=True)
    with pytest.raises(UserError, match=r"is quantised: quantization_config=.*'fp8'.*; pass --dequantize true"):
        load_settings(quantised)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A quantised model with a tokenizer, the plain one, and rows."""
    folder = tmp_path_factory.mktemp("chat")
    rows = folder / "rows.jsonl"
    rows.write_text(
        "\n".join(json.dumps({"query": f"{n} plus {n}?", "response": f"It is {2 * n}."}) for n in range(20))
    )
    return *pair(folder, "fp8", chat=True, num_hidden_layers=2, max_position_embeddings=512), rows


def train(model: Path, rows: Path, output: Path, *changes: str) -> api.TrainResult:
    base = [
        f"model.path={model}",
        f"data.dataset={rows}",
        f"train.output_dir={output}",
        "data.max_length=128",
        "train.global_batch_size=4",
        "optim.lr=0.01",
        "monitor.progress=false",
        "train.steps=3",
        "parallel.tensor=2",
        "train.add_version=false",
    ]
    return api.train(api.load_recipe(None, [*base, *changes]).run, nproc=2)


def test_lora_on_a_quantised_model(chat, tmp_path):
    """The same losses and adapter as on the plain weights; the merged model equals the merged model of the plain weights."""
    quantised, meant, rows = chat
    asked = train(quantised, rows, tmp_path / "a", "model.dequantize=true", "export.merge_lora=true")
    plain = train(meant, rows, tmp_path / "b", "export.merge_lora=true")
    assert asked.losses == plain.losses
    assert asked.merged is not None and plain.merged is not None
    for one, two in ((asked.checkpoint, plain.checkpoint), (asked.merged, plain.merged)):
        a, b = Checkpoint(one), Checkpoint(two)
        assert a.entries.keys() == b.entries.keys()
        assert all(torch.equal(a.read(name), b.read(name)) for name in b.entries)
    assert "quantization_config" not in json.loads((asked.merged / "config.json").read_text())


def test_a_quantised_model_trained_whole(chat, tmp_path):
    """In bfloat16, from FP8. The written model is plain, and transformers loads it."""
    quantised, meant, rows = chat
    done = train(quantised, rows, tmp_path, "model.dequantize=true", "tuner.type=full", "model.dtype=bfloat16")
    assert done.losses[-1] < done.losses[0]
    found = Checkpoint(done.checkpoint)
    assert found.entries.keys() == Checkpoint(meant).entries.keys()
    assert {entry.dtype for entry in found.entries.values()} == {torch.bfloat16}
    config = json.loads((done.checkpoint / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"


def test_what_is_wrong_stops_training_before_ranks_start(chat, tmp_path):
    quantised, meant, rows = chat
    with pytest.raises(UserError, match=r"pass --dequantize true \(model\.dequantize=true\)"):
        train(quantised, rows, tmp_path)
    with pytest.raises(UserError, match=r"model\.dequantize=true, but .* states no quantization_config"):
        train(meant, rows, tmp_path, "model.dequantize=true")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
def test_to_megatron_and_back(chat, tmp_path, dtype):
    """The dequantised weights bit for bit, in the requested dtype or the one that config.json names."""
    quantised, meant, _ = chat
    flags = ["--torch_dtype", dtype] if dtype else []
    there = [
        "convert",
        "--model",
        str(quantised),
        "--to",
        "mcore",
        "--output",
        str(tmp_path / "mcore"),
        "--tp",
        "2",
        *flags,
    ]
    assert main(there) == 2
    assert main([*there, "--dequantize", "true"]) == 0
    assert main(["convert", "--mcore", str(tmp_path / "mcore"), "--to", "hf", "--output", str(tmp_path / "hf")]) == 0
    found, want = Checkpoint(tmp_path / "hf"), Checkpoint(meant)
    kind = getattr(torch, dtype or "float32")
    for name in want.entries:
        assert found.entries[name].dtype == (kind if files.linear(name) else torch.float32)
        assert torch.equal(found.read(name).float(), want.read(name).to(kind).float()), name
    for folder in (tmp_path / "hf", tmp_path / "mcore" / "hf"):
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_the_way_back_needs_no_flag(tmp_path, capsys):
    (tmp_path / "mcore").mkdir()
    flags = ["--mcore", str(tmp_path / "mcore"), "--output", str(tmp_path / "hf"), "--dequantize", "true"]
    assert main(["convert", "--to", "hf", *flags]) == 2
    assert "Megatron's files have plain weights; remove --dequantize" in capsys.readouterr().err


def test_verify_a_quantised_model(chat, capsys):
    """The layouts dequantise their slices; Hugging Face gets the whole plain model."""
    quantised, _, _ = chat
    assert main(["verify", "--model", str(quantised), "--layouts", "tp2", "--dequantize", "true"]) == 0
    assert "every layout equals Hugging Face" in capsys.readouterr().out
    assert main(["verify", "--model", str(quantised), "--layouts", "tp2"]) == 2


def test_merging_is_in_float32(chat, tmp_path):
    """base + delta is rounded once, into the dtype that config.json names; the base is not rounded before."""
    quantised, meant, rows = chat
    adapter = train(meant, rows, tmp_path / "run").checkpoint
    files.set_config(quantised, dtype="bfloat16")
    try:
        base = ["export", "--adapters", str(adapter), "--model", str(quantised), "--merge_lora", "true"]
        assert main([*base, "--output", str(tmp_path / "refused")]) == 2
        assert main([*base, "--output", str(tmp_path / "merged"), "--dequantize", "true"]) == 0
    finally:
        files.set_config(quantised, dtype="float32")
    found, factors, plain = (
        Checkpoint(tmp_path / "merged"),
        load_file(adapter / "adapter_model.safetensors"),
        Checkpoint(meant),
    )
    config = json.loads((adapter / "adapter_config.json").read_text())
    name = "model.layers.1.mlp.down_proj"
    up, down = (factors[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "BA")
    want = (plain.read(f"{name}.weight") + up @ down * (config["lora_alpha"] / config["r"])).bfloat16()
    assert torch.equal(found.read(f"{name}.weight"), want)
    assert found.entries["model.norm.weight"].dtype == plain.entries["model.norm.weight"].dtype


def test_companions_of_a_plain_model_are_left_alone(tmp_path):
    """Nothing is rewritten where there is no quantisation to remove."""
    text = '{"hidden_size":   4}'
    (tmp_path / "config.json").write_text(text)
    drop_quantization(tmp_path)
    assert (tmp_path / "config.json").read_text() == text
