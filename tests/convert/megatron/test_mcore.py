"""Megatron-core's own checkpoints through the public API: written in one layout and read on one rank, the bytes are the same."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from swift_mega import api
from swift_mega.config.schema import Parallel
from swift_mega.errors import UserError
from swift_mega.models.translate import load_settings
from tests import tiny

LAYOUTS = {
    "single": Parallel(),
    "tp2-pp2-sp": Parallel(tensor=2, pipeline=2, sequence=True),
    "uneven": Parallel(pipeline=2, pipeline_layout="1,3"),
    "vpp": Parallel(pipeline=2, virtual_pipeline=2),
    "tp4": Parallel(tensor=4),
    "ep2-etp1": Parallel(tensor=2, expert=2, expert_tensor=1, sequence=True),
    "ep2-pp2": Parallel(expert=2, pipeline=2),
}
CASES = [
    ("llama_bias", "single", torch.float32),
    ("llama_bias", "tp2-pp2-sp", torch.bfloat16),
    ("qwen2_window", "uneven", torch.float32),
    ("qwen2", "vpp", torch.float16),
    ("qwen3_tied", "tp4", torch.bfloat16),
    ("qwen3_moe_mixed", "ep2-etp1", torch.float32),
    ("mixtral", "ep2-pp2", torch.bfloat16),
    # norms whose weights are sharded over tensor ranks (over all heads together, and by head), and norms inside the core attention
    ("olmo2", "tp2-pp2-sp", torch.float32),
    ("cohere_qk_norm", "tp2-pp2-sp", torch.float32),
    ("hunyuan", "tp2-pp2-sp", torch.bfloat16),
    ("olmo", "single", torch.float32),
    ("phi", "tp2-pp2-sp", torch.float32),  # a bias on the output layer, padded and sharded like the vocabulary
    ("apertus", "tp2-pp2-sp", torch.float32),  # parameters and buffers in the activation
    ("gpt_oss", "ep2-etp1", torch.bfloat16),
    ("granitemoeshared", "ep2-pp2", torch.bfloat16),
    ("ernie4_5_moe", "ep2-etp1", torch.float32),
    ("qwen3_next", "ep2-etp1", torch.bfloat16),  # layers with other parameters, sharded by key heads
    ("qwen3_next_wide", "ep2-pp2", torch.float32),
    # more tensor ranks than key heads: Megatron shards within a group
    ("llama_4_1", "tp4", torch.bfloat16),
    ("qwen2_4_1", "tp2-pp2-sp", torch.float32),
    ("phi3_4_1", "tp4", torch.float32),
    ("olmo2_8_2", "tp4", torch.float32),
    ("gpt_bigcode", "tp4", torch.float32),
    ("hunyuan_moe", "ep2-etp1", torch.bfloat16),
]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def same_bits(found: Path, source: Path) -> None:
    have, want = load_file(found / "model.safetensors"), load_file(source / "model.safetensors")
    assert have.keys() == want.keys()
    for name, value in want.items():
        assert (have[name].dtype, have[name].shape) == (value.dtype, value.shape), name
        # flat, because a 0-dim tensor has no dim that could be viewed as bytes
        assert torch.equal(have[name].flatten().view(torch.uint8), value.flatten().view(torch.uint8)), name


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("name", "layout", "dtype"), CASES, ids=lambda value: str(value).removeprefix("torch."))
def test_there_and_back(tmp_path, name, layout, dtype):
    """--to mcore in a layout, then --to hf on one rank."""
    source = tiny.make(tmp_path / "hf", name, dtype=dtype)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    before = files(source)
    api.convert(source=str(source), to="mcore", output=str(tmp_path / "mcore"), parallel=LAYOUTS[layout])
    assert (tmp_path / "mcore" / "latest_checkpointed_iteration.txt").read_text() == "release"
    api.convert(source=str(tmp_path / "mcore"), to="hf", output=str(tmp_path / "back"))
    same_bits(tmp_path / "back", source)
    assert {path.name for path in (tmp_path / "back").iterdir()} == {path.name for path in source.iterdir()} | {
        "report.json"
    }
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    assert files(source) == before


def test_mixed_dtypes_there_and_back(tmp_path):
    source = tiny.make(tmp_path / "hf", "qwen3")
    kinds = [torch.bfloat16, torch.float32, torch.float16]
    tensors = load_file(source / "model.safetensors")
    tensors = {name: value.to(kinds[n % 3]) for n, (name, value) in enumerate(tensors.items())}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    api.convert(source=str(source), to="mcore", output=str(tmp_path / "mcore"), parallel=LAYOUTS["tp2-pp2-sp"])
    api.convert(source=str(tmp_path / "mcore"), to="hf", output=str(tmp_path / "back"))
    same_bits(tmp_path / "back", source)


def test_from_one_layout_into_another(tmp_path):
    """Saved at TP2 x PP2, read at TP4 and at an uneven PP4, and written from there."""
    source = tiny.make(tmp_path / "hf", "llama_tied")
    api.convert(source=str(source), to="mcore", output=str(tmp_path / "mcore"), parallel=LAYOUTS["tp2-pp2-sp"])
    for name, parallel in (("tp4", LAYOUTS["tp4"]), ("uneven", Parallel(pipeline=2, pipeline_layout="3,1"))):
        api.convert(source=str(tmp_path / "mcore"), to="hf", output=str(tmp_path / name), parallel=parallel)
        same_bits(tmp_path / name, source)


def test_more_ranks_than_key_heads_into_fewer_and_back(tmp_path):
    """With 2 key heads: saved at TP4 and read at TP2; saved at TP2 and read at TP4."""
    source, first, second = tiny.make(tmp_path / "hf", "llama_tied_4_2"), tmp_path / "first", tmp_path / "second"
    api.convert(source=str(source), to="mcore", output=str(first), parallel=LAYOUTS["tp4"])
    api.convert(source=str(first), to="hf", output=str(tmp_path / "tp2"), parallel=Parallel(tensor=2))
    api.convert(source=str(source), to="mcore", output=str(second), parallel=Parallel(tensor=2))
    api.convert(source=str(second), to="hf", output=str(tmp_path / "tp4"), parallel=LAYOUTS["tp4"])
    for name in ("tp2", "tp4"):
        same_bits(tmp_path / name, source)


def test_another_dtype_and_small_files(tmp_path):
    source = tiny.make(tmp_path / "hf", "llama")
    api.convert(source=str(source), to="mcore", output=str(tmp_path / "mcore"), dtype="bfloat16")
    api.convert(
        source=str(tmp_path / "mcore"), to="hf", output=str(tmp_path / "back"), dtype="bfloat16", max_shard_size="20KB"
    )
    want = load_file(source / "model.safetensors")
    found = {
        name: value for file in (tmp_path / "back").glob("*.safetensors") for name, value in load_file(file).items()
    }
    assert found.keys() == want.keys() and all(
        torch.equal(found[name], value.bfloat16()) for name, value in want.items()
    )
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 5
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


# --- refusals


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Hugging Face directory and its Megatron checkpoint."""
    folder = tmp_path_factory.mktemp("pair")
    source = tiny.make(folder / "hf", "llama")
    api.convert(source=str(source), to="mcore", output=str(folder / "mcore"), parallel=LAYOUTS["tp2-pp2-sp"])
    return source, folder / "mcore"


def spoil(mcore: Path, what: str) -> None:
    shards = sorted((mcore / "release").glob("*.distcp"))
    config, metadata = mcore / "hf" / "config.json", mcore / "release" / ".metadata"

    def edited(key: str, before: int, after: int) -> None:
        text = config.read_text()
        assert f'"{key}": {before}' in text
        config.write_text(text.replace(f'"{key}": {before}', f'"{key}": {after}'))

    actions = {
        "no tracker": lambda: (mcore / "latest_checkpointed_iteration.txt").unlink(),
        "tracker names another": lambda: (mcore / "latest_checkpointed_iteration.txt").write_text("7"),
        "no metadata": metadata.unlink,
        "no type": lambda: (mcore / "release" / "metadata.json").unlink(),
        "truncated metadata": lambda: metadata.write_bytes(metadata.read_bytes()[:40]),
        "a shard is missing": lambda: shards[0].unlink(),
        "a truncated shard": lambda: shards[0].write_bytes(shards[0].read_bytes()[:500]),
        "no dtypes": lambda: (mcore / "hf" / "source_dtypes.json").unlink(),
        "dtypes of another kind": lambda: (mcore / "hf" / "source_dtypes.json").write_text('{"a": "F31"}'),
        "no dtype in it": lambda: (mcore / "hf" / "source_dtypes.json").write_text("{}"),
        "dtypes of another model": lambda: (mcore / "hf" / "source_dtypes.json").write_text('{"a": "F32"}'),
        "no config": config.unlink,
        "another width": lambda: edited("intermediate_size", 48, 64),
        "another depth": lambda: edited("num_hidden_layers", 4, 2),
        "more depth": lambda: edited("num_hidden_layers", 4, 6),
        "biases": lambda: config.write_text(config.read_text().replace('_bias": false', '_bias": true')),
    }
    actions[what]()


MISFIT = "does not fit its config.json|cannot be read as a torch_dist checkpoint: .*the config.json that belongs to it"
SPOILED = {
    "no tracker": "has no latest_checkpointed_iteration.txt, so it is not a complete Megatron checkpoint; give",
    "tracker names another": "names iter_0000007, which does not exist or is not complete; copy",
    "no metadata": "cannot be read as a torch_dist checkpoint: .*; copy it again",
    "no type": "names release, which does not exist or is not complete; copy",
    "truncated metadata": "cannot be read as a torch_dist checkpoint: .*; copy it again",
    "a shard is missing": "cannot be read as a torch_dist checkpoint: .*No such file or directory.*; copy it again",
    "a truncated shard": "cannot be read as a torch_dist checkpoint: .*; copy it again",
    "no dtypes": "lacks a readable source_dtypes.json, .* give a directory that swift-mega convert --to mcore wrote",
    "dtypes of another kind": "lacks a readable source_dtypes.json",
    "no dtype in it": "lacks a readable source_dtypes.json",
    "dtypes of another model": "no dtype is known for lm_head.weight, .*",
    "no config": "has no config.json",
    "another width": "cannot be read as a torch_dist checkpoint: .*(?i:shape|size).*the config.json that belongs to it",
    "another depth": MISFIT,
    "more depth": MISFIT,
    "biases": MISFIT,
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_damaged_checkpoint(tmp_path, pair, what):
    shutil.copytree(pair[1], tmp_path / "mcore")
    spoil(tmp_path / "mcore", what)
    with pytest.raises(UserError, match=SPOILED[what]) as caught:
        api.convert(source=str(tmp_path / "mcore"), to="hf", output=str(tmp_path / "out"))
    assert str(tmp_path) in str(caught.value) or what == "dtypes of another model"
    assert "dict_keys([0])" not in str(caught.value) and len(str(caught.value)) < 900
    assert [path.name for path in tmp_path.iterdir()] == ["mcore"]


def test_what_is_there_is_left(tmp_path, pair):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="mine exists already and is left as it is; choose another path"):
        api.convert(source=str(pair[0]), to="mcore", output=str(tmp_path / "mine"), parallel=Parallel(tensor=2))
    with pytest.raises(UserError, match="file is a file and is left as it is; choose another path"):
        api.convert(source=str(pair[0]), to="mcore", output=str(tmp_path / "file"), parallel=Parallel(tensor=2))
    with pytest.raises(UserError, match=r"cannot write .*file/out: Not a directory; choose another --output"):
        api.convert(source=str(pair[0]), to="mcore", output=str(tmp_path / "file" / "out"), parallel=Parallel(tensor=2))
    assert files(tmp_path) == {"mine/notes.txt": b"mine", "file": b"mine"}


def test_quantised_weights_and_a_size_that_is_none(tmp_path, pair):
    source = tmp_path / "hf"
    shutil.copytree(pair[0], source)
    tensors = {name: value.to(torch.int8) for name, value in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(UserError, match="are quantised; convert the checkpoint to bfloat16 or float32"):
        api.convert(source=str(source), to="mcore", output=str(tmp_path / "out"))
    with pytest.raises(UserError, match="size 'big' is not valid"):
        api.convert(source=str(pair[1]), to="hf", output=str(tmp_path / "out"), max_shard_size="big")
    with pytest.raises(UserError, match=r"parallel.tensor=3 does not divide the model's 8 attention heads"):
        api.convert(source=str(pair[0]), to="mcore", output=str(tmp_path / "out"), parallel=Parallel(tensor=3))
    assert not (tmp_path / "out").exists()


def test_a_value_head_is_carried(tmp_path):
    """The value head takes no part in the computation. It is copied bit for bit in its own dtype, unless --torch_dtype is given."""
    source = tiny.make(tmp_path / "hf", "llama")
    tensors = load_file(source / "model.safetensors")
    head = {"v_head.summary.weight": torch.randn(1, 32).half(), "v_head.summary.bias": torch.randn(1).half()}
    save_file(tensors | head, source / "model.safetensors", metadata={"format": "pt"})
    api.convert(source=str(source), to="mcore", output=str(tmp_path / "mcore"), parallel=LAYOUTS["tp2-pp2-sp"])
    api.convert(source=str(tmp_path / "mcore"), to="hf", output=str(tmp_path / "back"))
    same_bits(tmp_path / "back", source)
    api.convert(
        source=str(tmp_path / "mcore"),
        to="hf",
        output=str(tmp_path / "wide"),
        dtype="bfloat16",
        parallel=LAYOUTS["tp4"],
    )
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    assert all(torch.equal(wide[name], value.bfloat16()) for name, value in head.items())
    assert {value.dtype for value in wide.values()} == {torch.bfloat16}
    assert api.plan(source=str(source)).carried == dict.fromkeys(head, "a value head")


def test_a_checkpoint_without_its_hugging_face_side(tmp_path):
    """As Megatron-LM leaves one: config, tokenizer and dtypes come from the model that --model names."""
    source = tiny.make(tmp_path / "hf", "qwen3", dtype=torch.bfloat16)
    api.convert(source=str(source), to="mcore", output=str(tmp_path / "mcore"), parallel=LAYOUTS["tp2-pp2-sp"])
    shutil.rmtree(tmp_path / "mcore" / "hf")
    given = dict(source=str(tmp_path / "mcore"), to="hf", output=str(tmp_path / "back"))
    with pytest.raises(UserError, match=r"has no folder hf/, .* give them with --model DIR"):
        api.convert(**given)
    api.convert(**given, model=str(source))
    same_bits(tmp_path / "back", source)
    (source / "model.safetensors").rename(tmp_path / "kept.safetensors")
    with pytest.raises(
        UserError, match=r"the dtypes of .*mcore are unknown, since .*hf has no weights; give --torch_dtype"
    ):
        api.convert(**given | {"output": str(tmp_path / "other")}, model=str(source))


def test_replacing_a_checkpoint(tmp_path):
    source = tiny.make(tmp_path / "hf", "llama")
    given = dict(source=str(source), to="mcore", output=str(tmp_path / "mcore"))
    api.convert(**given)
    with pytest.raises(UserError, match="exists already and is left as it is"):
        api.convert(**given)
    (tmp_path / "mcore" / "stale").write_text("")
    api.convert(**given, overwrite=True)
    assert not (tmp_path / "mcore" / "stale").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mcore"]


@pytest.mark.parametrize(("family", "prefix"), [("qwen3_next", "mtp."), ("ernie4_5_moe", "model.mtp_")])
def test_multi_token_prediction_beside_the_layers_is_carried(tmp_path, family, prefix):
    """Layers of multi-token prediction with names of their own, beside the decoder layers."""
    source = tiny.make(tmp_path / "hf", family)
    tensors = load_file(source / "model.safetensors")
    more = {prefix + name: torch.randn(8, 4) for name in ("fc.weight", "layers.0.self_attn.q_proj.weight")}
    save_file(tensors | more, source / "model.safetensors", metadata={"format": "pt"})
    api.convert(source=str(source), to="mcore", output=str(tmp_path / "mcore"), parallel=LAYOUTS["ep2-pp2"])
    api.convert(source=str(tmp_path / "mcore"), to="hf", output=str(tmp_path / "back"))
    same_bits(tmp_path / "back", source)
    assert api.plan(source=str(source)).carried == dict.fromkeys(more, "multi-token prediction")
    save_file(tensors | {"mtq.fc.weight": torch.ones(2)}, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"nothing reads: mtq\.fc\.weight"):
        api.plan(source=str(source))


def test_layers_of_multi_token_prediction_are_carried(tmp_path):
    """DeepSeek-V3 has one layer more than it computes with; a tensor of a layer beyond that one is an error."""
    source = tiny.make(tmp_path / "hf", "deepseek_v3_moe", num_nextn_predict_layers=1)
    tensors, last = load_file(source / "model.safetensors"), len(load_settings(source).moe_layers)
    more = {f"model.layers.{last}.{name}": torch.randn(8, 4) for name in ("eh_proj.weight", "self_attn.o_proj.weight")}
    save_file(tensors | more, source / "model.safetensors", metadata={"format": "pt"})
    api.convert(source=str(source), to="mcore", output=str(tmp_path / "mcore"), parallel=Parallel(pipeline=2))
    api.convert(source=str(tmp_path / "mcore"), to="hf", output=str(tmp_path / "back"))
    same_bits(tmp_path / "back", source)
    assert api.plan(source=str(source)).carried == dict.fromkeys(more, "a layer of multi-token prediction")
    more[f"model.layers.{last + 1}.eh_proj.weight"] = torch.randn(8, 4)
    save_file(tensors | more, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"nothing reads: model\.layers\.{last + 1}\.eh_proj"):
        api.plan(source=str(source))
