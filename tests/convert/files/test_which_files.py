"""Which files of a directory belong to the model: the weights that transformers would read, and the files that every output copies."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from swift_mega.cli import main
from swift_mega.convert.files.hf_files import Checkpoint
from swift_mega.convert.files.hf_write import companions, copy_companions
from swift_mega.convert.files.which_files import has_weights, unread
from swift_mega.errors import UserError

INDEX = "model.safetensors.index.json"
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole` and `shards`: the same model twice. `other`: different numbers under the same names."""
    folder = tmp_path_factory.mktemp("made")
    tiny.make(folder / "whole", "llama", num_hidden_layers=1)
    tiny.make(folder / "shards", "llama", num_hidden_layers=1, max_shard_size="30KB")
    shutil.copytree(folder / "whole", folder / "other")
    tensors = {name: value + 1 for name, value in load_file(folder / "whole" / "model.safetensors").items()}
    save_file(tensors, folder / "other" / "model.safetensors", {"format": "pt"})
    return folder


def set_field(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def stale_index(made: Path, folder: Path) -> None:
    shutil.copytree(made / "shards", folder)
    shutil.copy(made / "other" / "model.safetensors", folder)


def index_of_files_that_are_gone(made: Path, folder: Path) -> None:
    shutil.copytree(made / "other", folder)
    shutil.copy(made / "shards" / INDEX, folder)


def files_beside_the_index(made: Path, folder: Path) -> None:
    shutil.copytree(made / "shards", folder)
    for name in ("consolidated", "mtp", "model-00009-of-00009", "adapter_model"):
        save_file({Q: torch.ones(4), "x": torch.ones(1)}, folder / f"{name}.safetensors", {"format": "pt"})
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")


def named_in_config(made: Path, folder: Path) -> None:
    shutil.copytree(made / "whole", folder)
    shutil.copy(made / "other" / "model.safetensors", folder / "mine.safetensors")
    set_field(folder, transformers_weights="mine.safetensors")


def index_named_in_config(made: Path, folder: Path) -> None:
    shutil.copytree(made / "shards", folder)
    shutil.copy(made / "other" / "model.safetensors", folder)
    (folder / INDEX).rename(folder / "mine.safetensors.index.json")
    set_field(folder, transformers_weights="mine.safetensors.index.json")


def shards_in_a_folder(made: Path, folder: Path) -> None:
    shutil.copytree(made / "shards", folder)
    (folder / "parts").mkdir()
    listing = json.loads((folder / INDEX).read_text())
    for file in folder.glob("*.safetensors"):
        file.rename(folder / "parts" / file.name)
    listing["weight_map"] = {name: f"parts/{file}" for name, file in listing["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(listing))


def links_into_a_cache(made: Path, folder: Path) -> None:
    """A directory of links into a cache, as the hub's client makes it."""
    folder.mkdir()
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted((made / "shards").iterdir())):
        shutil.copy(file, blobs / str(number))
        (folder / file.name).symlink_to(Path("..") / "blobs" / str(number))


@pytest.mark.parametrize(
    "lay_out",
    [stale_index, index_of_files_that_are_gone, files_beside_the_index, named_in_config, index_named_in_config, shards_in_a_folder,
     links_into_a_cache],
)  # fmt: skip
def test_the_weights_are_those_that_transformers_reads(made, tmp_path, lay_out: Callable[[Path, Path], None]):
    from transformers import AutoModelForCausalLM

    lay_out(made, tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model")
    want = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert checkpoint.entries.keys() == want.keys()
    assert all(torch.equal(checkpoint.read(name), value) for name, value in want.items())
    assert has_weights(tmp_path / "model")


def test_what_is_not_read_is_said(made, tmp_path):
    stale_index(made, tmp_path / "stale")
    said = unread(tmp_path / "stale")
    assert (
        said is not None
        and "are model.safetensors, as for transformers; model-00001-of" in said
        and "not read, not copied" in said
    )
    files_beside_the_index(made, tmp_path / "beside")
    said = unread(tmp_path / "beside")
    assert (
        said is not None
        and "; adapter_model.safetensors, consolidated.safetensors, model-00009-of-00009.safetensors, mtp.s" in said
    )
    (tmp_path / "beside" / "adapter_config.json").write_text("{}")
    assert "holds an adapter too (adapter_config.json), which is neither applied nor copied" in (
        unread(tmp_path / "beside") or ""
    )
    assert unread(made / "whole") is None and unread(made / "shards") is None and unread(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.fp16.safetensors", "model.fp16.safetensors would not be read by transformers either: rename it to model.safetensors"),
        ("consolidated.safetensors", "consolidated.safetensors would not be read by transformers"),
        ("pytorch_model.bin", r"holds pickle files only \(pytorch_model.bin\)"),
    ],
)  # fmt: skip
def test_files_that_transformers_would_not_read_either(made, tmp_path, capsys, name, message):
    """A dry run refuses them too, although it needs no weights."""
    folder = tmp_path / "model"
    shutil.copytree(made / "whole", folder)
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(UserError, match=message):
        Checkpoint(folder)
    assert main(["convert", "--model", str(folder), "--to", "mcore", "--dry_run", "true"]) == 2
    assert not has_weights(folder) and "error" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../other/model.safetensors", "/model.safetensors", 7, ""])
def test_a_config_that_names_no_such_file(made, tmp_path, name):
    shutil.copytree(made / "whole", tmp_path / "model")
    set_field(tmp_path / "model", transformers_weights=name)
    with pytest.raises(
        UserError, match=r"transformers_weights=.* is neither a \*.safetensors file nor an index of such"
    ):
        Checkpoint(tmp_path / "model")
    set_field(tmp_path / "model", transformers_weights="gone.safetensors")
    with pytest.raises(
        UserError, match=r"lacks gone.safetensors, which config.json names \(transformers_weights\); copy it"
    ):
        Checkpoint(tmp_path / "model")


KEPT = """config.json generation_config.json tokenizer.json tokenizer_config.json tokenizer.model vocab.json merges.txt tekken.json
special_tokens_map.json added_tokens.json preprocessor_config.json processor_config.json chat_template.json qwen.tiktoken README.md
LICENSE NOTICE USE_POLICY.md modelcard.json modeling_mine.py args.json additional_chat_templates/rag.jinja modules.json
1_Pooling/config.json 2_Dense/model.safetensors""".split()
NOT_COPIED = """model.safetensors model-00001-of-00002.safetensors model.safetensors.index.json pytorch_model.bin tf_model.h5 model.GGUF
pytorch_model.bin.index.json consolidated.00.pth params.json model.onnx flax_model.msgpack model.ckpt.index model.ckpt.data-00000-of-00001
adapter_config.json adapter_model.safetensors adapter_model.bin optimizer.pt scheduler.pt scaler.pt rng_state_0.pth trainer_state.json
training_args.bin report.json source_dtypes.json .gitattributes .cache/x .git/config original/params.json onnx/model.json latest
additional_chat_templates/notes.txt checkpoint-5/config.json zero_to_fp32.py""".split()


def test_what_belongs_to_the_model_goes_on(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    for name in (*KEPT, *NOT_COPIED):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("{}")
    (source / "modules.json").write_text(
        '[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "../elsewhere"}]'
    )
    (source / "config.json").write_text('{"transformers_weights": "mine.safetensors", "hidden_size": 4}')
    (tmp_path / "there").write_text("linked")
    (source / "linked.txt").symlink_to(tmp_path / "there")
    copy_companions(source, target)
    found = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert found == {*KEPT, "linked.txt"}
    assert not (target / "linked.txt").is_symlink() and (target / "linked.txt").read_text() == "linked"
    assert json.loads((target / "config.json").read_text()) == {"hidden_size": 4}
    (source / "optimizer.bin").symlink_to(tmp_path / "gone")  # a broken link to a file that is not copied
    assert len(companions(source)) == len(found)
    for name in ("vocab.txt", "additional_chat_templates/more.jinja"):
        (source / name).symlink_to(tmp_path / "gone")
        with pytest.raises(
            UserError, match=rf"{name} is a link to .*gone, which does not exist; copy the file that it pointed to"
        ):
            companions(source)
        (source / name).unlink()
    os.mkfifo(source / "pipe")
    (source / "tokenizer.json").chmod(0)
    if os.geteuid():
        with pytest.raises(UserError, match=r"tokenizer.json cannot be read: Permission denied"):
            copy_companions(source, target)
    else:
        copy_companions(source, target)


@pytest.fixture(scope="module")
def messy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with three chat templates among unrelated files, and an adapter of it."""
    folder = tmp_path_factory.mktemp("messy")
    source = tiny.make_chat(folder / "model", "llama", num_hidden_layers=1)
    words = tiny.tokenizer(tiny.CHATML, "<|im_start|>", "<|im_end|>", eos="<|im_end|>")
    words.chat_template = {"default": tiny.CHATML, "tool_use": "TOOLS " + tiny.CHATML, "rag": "RAG " + tiny.CHATML}
    words.save_pretrained(source)
    assert len(list((source / "additional_chat_templates").iterdir())) == 2
    shape = {"A": (2, 32), "B": (64, 2)}
    factors = {f"base_model.model.{Q[:-7]}.lora_{letter}.weight": torch.randn(shape[letter]) for letter in "AB"}
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": str(source),
    }
    for place in (folder / "adapter", source):
        place.mkdir(exist_ok=True)
        save_file(factors, place / "adapter_model.safetensors", {"format": "pt"})
        (place / "adapter_config.json").write_text(json.dumps(config))
    save_file({"layers.0.attention.wq.weight": torch.ones(2)}, source / "consolidated.safetensors")
    (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"x": "model-00001-of-00001.safetensors"}}))
    for name in ("optimizer.pt", "pytorch_model.bin", "trainer_state.json"):
        (source / name).write_text("{}")
    (folder / "rows.jsonl").write_text('{"query": "Who are you?", "response": "I am a test."}\n')
    return source, folder / "adapter"


ROADS = {
    "hf": "convert --model MODEL --to hf --output OUT",
    "mcore": "convert --model MODEL --to mcore --output MCORE ; convert --mcore MCORE --to hf --output OUT",
    "merge": "export --model MODEL --adapters ADAPTER --merge_lora true --output OUT",
    "fp8": "export --model MODEL --quant_method fp8 --output OUT",
    "sft": "sft --model MODEL --tuner_type full --dataset ROWS --max_steps 1 --global_batch_size 1 --output_dir RUN --add_version false",
}


@pytest.mark.parametrize("road", ROADS)
def test_every_road_takes_the_model_alone(messy, tmp_path, capsys, road):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, adapter = messy
    places = {
        "MODEL": source,
        "ADAPTER": adapter,
        "ROWS": source.parent / "rows.jsonl",
        "RUN": tmp_path / "run",
        "OUT": tmp_path / "out",
        "MCORE": tmp_path / "mcore",
    }
    for command in ROADS[road].split(" ; "):
        assert main([str(places.get(word, word)) for word in command.split()]) == 0
    assert (
        "consolidated.safetensors, model.safetensors.index.json, pytorch_model.bin beside them: not read"
        in capsys.readouterr().out
    )
    out = next((tmp_path / "run").glob("checkpoint-1")) if road == "sft" else tmp_path / "out"
    weights = "model.safetensors"
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert names == {str(path.relative_to(source)) for path in companions(source)} | {weights, "report.json"}
    tensors = load_file(source / weights).keys()
    assert {name for name in load_file(out / weights) if not name.endswith("_scale_inv")} == tensors
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(source).chat_template
    if road != "fp8":
        assert AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)[1]["missing_keys"] == set()


def test_a_link_to_nothing_stops_before_anything_is_written(messy, tmp_path, capsys):
    source = tmp_path / "model"
    shutil.copytree(messy[0], source)
    (source / "special.txt").symlink_to(source / "gone")
    places = {
        "MODEL": source,
        "ADAPTER": messy[1],
        "ROWS": source.parent / "rows.jsonl",
        "RUN": tmp_path / "run",
        "OUT": tmp_path / "out",
        "MCORE": tmp_path / "mcore",
    }
    shutil.copy(messy[0].parent / "rows.jsonl", tmp_path)
    for road in ROADS.values():
        assert main([str(places.get(word, word)) for word in road.split(" ; ")[0].split()]) == 2
        assert "special.txt is a link to" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "rows.jsonl"]
