"""Layers of multi-token prediction are not computed, but every output keeps them; they are plain where config.json says that weights are
plain."""

import json
import shutil
from pathlib import Path

import pytest
import quantised_files as files
import torch
from safetensors.torch import load_file, save_file

import tiny
from swift_mega.cli import main
from swift_mega.models.translate import load_settings

EXPERTS = dict(
    num_hidden_layers=2,
    max_position_embeddings=512,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    head_dim=8,
    moe_intermediate_size=16,
)
"""Sizes that every quantised format can store."""
FAMILIES = {"deepseek_v3_moe": "model.layers.{last}.", "qwen3_next": "mtp.", "ernie4_5_moe": "model.mtp_"}
"""Families, and the prefix of the names of their carried tensors."""


def with_prediction(folder: Path, family: str, **changes: object) -> Path:
    """A model with a projection (of a size that every quantised format can store) and a norm of multi-token prediction."""
    source = tiny.make_chat(folder, family, **changes)
    prefix = FAMILIES[family].format(last=load_settings(source).shape.layers)
    torch.manual_seed(5)
    more = {"self_attn.q_proj.weight": torch.randn(64, 48), "enorm.weight": torch.randn(8)}
    file = source / "model.safetensors"
    save_file(load_file(file) | {prefix + name: value for name, value in more.items()}, file, {"format": "pt"})
    return source


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A plain DeepSeek-V3 with one layer of multi-token prediction, and rows to train on."""
    folder = tmp_path_factory.mktemp("deepseek")
    rows = folder / "rows.jsonl"
    rows.write_text('{"query": "Who are you?", "response": "I am a test."}\n')
    return with_prediction(folder / "plain", "deepseek_v3_moe", num_nextn_predict_layers=1, **EXPERTS), rows


def run(command: str, **places: object) -> int:
    return main([str(places.get(word, word)) for word in command.split()])


def config(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())


def predicted(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensors.items() if name.startswith("model.layers.2.")}


SFT = (
    "sft --model MODEL --tuner_type full --dataset ROWS --max_steps 1 --global_batch_size 1 --output_dir OUT --add_version false "
    "--torch_dtype bfloat16"
)


@pytest.mark.parametrize("format", ["fp8", "gptq", "awq", "nf4", "compressed", None])
def test_full_training_keeps_it_and_writes_it_plain(deepseek, tmp_path, capsys, format):
    """Carried weights are dequantised and rounded once. transformers loads the directory, whose config.json has no quantisation."""
    from transformers import AutoModelForCausalLM

    model, rows = deepseek
    meant = load_file(model / "model.safetensors")
    if format is not None:
        meant = files.write(model, tmp_path / "quantised", format)
        model = tmp_path / "quantised"
    assert (
        run(f"{SFT} --dequantize {'false' if format is None else 'true'}", MODEL=model, ROWS=rows, OUT=tmp_path / "out")
        == 0
    )
    assert "2 kept unchanged (a layer of multi-token prediction), and not trained" in capsys.readouterr().out
    out = tmp_path / "out" / "checkpoint-1"
    found = load_file(out / "model.safetensors")
    assert found.keys() == meant.keys() and "quantization_config" not in config(out)
    for name, value in predicted(meant).items():
        quantised = format is not None and files.linear(name)
        assert torch.equal(found[name], value.bfloat16() if quantised else value), name
    assert config(out)["num_nextn_predict_layers"] == 1
    loaded = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)[1]
    assert not loaded["missing_keys"] and not loaded["mismatched_keys"]
    assert run("convert --model OUT --to mcore --dry_run true", OUT=out) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dtype_for_all_is_for_these_too(tmp_path, family):
    """--torch_dtype applies to carried tensors too, read from Megatron's files or from Hugging Face's."""
    model = with_prediction(tmp_path / "hf", family)
    assert run("convert --model MODEL --to mcore --output OUT", MODEL=model, OUT=tmp_path / "mcore") == 0
    assert (
        run("convert --mcore IN --to hf --torch_dtype bfloat16 --output OUT", IN=tmp_path / "mcore", OUT=tmp_path / "a")
        == 0
    )
    assert (
        run("convert --model MODEL --to hf --torch_dtype bfloat16 --output OUT", MODEL=model, OUT=tmp_path / "b") == 0
    )
    one, two = load_file(tmp_path / "a" / "model.safetensors"), load_file(tmp_path / "b" / "model.safetensors")
    source = load_file(model / "model.safetensors")
    assert one.keys() == two.keys() == source.keys()
    for name, value in source.items():
        assert torch.equal(one[name], value.bfloat16()) and torch.equal(two[name], one[name]), name
    assert config(tmp_path / "a")["dtype"] == config(tmp_path / "b")["dtype"] == "bfloat16"


@pytest.mark.parametrize("road", ["mcore", "merge", "fp8"])
def test_other_roads_from_a_quantised_model(deepseek, tmp_path, road):
    """Carried tensors are dequantised once, into the dtype that config.json names."""
    model = tmp_path / "quantised"
    meant = predicted(files.write(deepseek[0], model, "fp8"))
    files.set_config(model, dtype="bfloat16")
    places = {"MODEL": model, "OUT": tmp_path / "out", "MCORE": tmp_path / "mcore", "ADAPTER": tmp_path / "adapter"}
    if road == "mcore":
        assert run("convert --model MODEL --dequantize true --to mcore --output MCORE", **places) == 0
        assert run("convert --mcore MCORE --to hf --output OUT", **places) == 0
    elif road == "merge":
        places["ADAPTER"].mkdir()
        name = "base_model.model.model.layers.0.self_attn.o_proj"
        rows, columns = load_file(deepseek[0] / "model.safetensors")["model.layers.0.self_attn.o_proj.weight"].shape
        factors = {f"{name}.lora_A.weight": torch.ones(1, columns), f"{name}.lora_B.weight": torch.ones(rows, 1)}
        save_file(factors, places["ADAPTER"] / "adapter_model.safetensors")
        (places["ADAPTER"] / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["o_proj"]})
        )
        assert (
            run("export --model MODEL --dequantize true --adapters ADAPTER --merge_lora true --output OUT", **places)
            == 0
        )
    else:
        assert run("export --model MODEL --dequantize true --quant_method fp8 --output OUT", **places) == 0
    found = predicted(load_file(tmp_path / "out" / "model.safetensors"))
    assert found.keys() == meant.keys()
    for name, value in meant.items():
        assert torch.equal(found[name], value.bfloat16() if files.linear(name) else value), name


def test_layers_that_are_not_there_are_not_counted(deepseek, tmp_path, capfd):
    """With the original's config.json but without its weights, the written config.json counts no layers that are not written."""
    model, _ = deepseek
    assert run("convert --model MODEL --to mcore --output OUT", MODEL=model, OUT=tmp_path / "mcore") == 0
    original = tmp_path / "original"
    shutil.copytree(model, original)
    (original / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "mcore" / "hf")
    capfd.readouterr()
    assert (
        run(
            "convert --mcore MCORE --model ORIGINAL --to hf --torch_dtype float32 --output OUT",
            MCORE=tmp_path / "mcore",
            ORIGINAL=original,
            OUT=tmp_path / "out",
        )
        == 0
    )
    said = "config.json says num_nextn_predict_layers=1, and none of these layers of multi-token prediction are in the files"
    assert said in capfd.readouterr().out
    assert config(tmp_path / "out")["num_nextn_predict_layers"] == 0
    assert not predicted(load_file(tmp_path / "out" / "model.safetensors"))


def test_quantised_layers_of_a_model_that_says_it_is_plain(deepseek, tmp_path, capsys):
    """Such layers are refused: kept unchanged, nothing could read them."""
    model = tmp_path / "model"
    shutil.copytree(deepseek[0], model)
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.2.self_attn.q_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, model / "model.safetensors", {"format": "pt"})
    assert run("convert --model MODEL --to hf --output OUT", MODEL=model, OUT=tmp_path / "out") == 2
    assert f"{name} (torch.float8_e4m3fn) are quantised" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
