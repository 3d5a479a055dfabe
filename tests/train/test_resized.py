"""--resize_vocab and --new_special_tokens: the same new rows as transformers makes, in conversion and in training."""

import json
from pathlib import Path

import pytest
import torch

import tiny
from swift_mega import api
from swift_mega.cli import main
from swift_mega.config.schema import Model
from swift_mega.convert.files.hf_files import Checkpoint
from swift_mega.convert.files.resized import SEED
from swift_mega.data.chat import load_tokenizer
from tests.convert.megatron.test_mcore import same_bits
from tests.train.test_vocabulary import VOCAB, refused, rows, small  # noqa: F401

LARGER = VOCAB + 2
HEADS = {"llama": "lm_head.weight", "phi": "lm_head.weight", "llama_tied": None}


def resize(source: Path, output: Path, **settings: object) -> Checkpoint:
    api.convert(source=str(source), to="hf", output=str(output), rows=Model(resize_vocab=True, **settings))  # type: ignore[arg-type]
    return Checkpoint(output)


@pytest.mark.parametrize("family", HEADS)
def test_rows_are_those_of_transformers(small, tmp_path, family):  # noqa: F811
    """Old rows have the same bits. New rows equal those of transformers' own function with our seed, or the mean. Its resized model
    loads the result."""
    from transformers import AutoModelForCausalLM

    source = tiny.make(tmp_path / "hf", family, vocab_size=VOCAB, num_hidden_layers=2)
    load_tokenizer(small).save_pretrained(source)
    old, found = Checkpoint(source), resize(source, tmp_path / "out")
    means = resize(source, tmp_path / "means", new_rows="mean")
    network = AutoModelForCausalLM.from_pretrained(source)
    for name in filter(None, ("model.embed_tokens.weight", HEADS[family])):
        before = torch.nn.Embedding.from_pretrained(old.read(name))
        after = torch.nn.Embedding(LARGER, before.weight.shape[1])
        torch.manual_seed(SEED)
        network._init_added_embeddings_weights_with_mean(before, after, VOCAB, 2)
        assert torch.equal(found.read(name)[VOCAB:], after.weight[VOCAB:]), name
        assert torch.equal(found.read(name)[:VOCAB], before.weight) and torch.equal(
            means.read(name)[:VOCAB], before.weight
        )
        assert torch.equal(means.read(name)[VOCAB:], before.weight.mean(dim=0).repeat(2, 1))
    if family == "phi":
        bias = old.read("lm_head.bias")
        assert torch.equal(found.read("lm_head.bias")[:VOCAB], bias)
        torch.testing.assert_close(found.read("lm_head.bias")[VOCAB:], bias.mean().repeat(2), atol=1e-6, rtol=0)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == LARGER
    assert {file.name for file in (tmp_path / "out").iterdir()} == {file.name for file in source.iterdir()} | {
        "report.json"
    }
    theirs, ours = network, AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs.resize_token_embeddings(LARGER)
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in theirs.state_dict().items()
    }


def test_training_makes_them_too(small, tmp_path):  # noqa: F811
    """Tensor ranks that make the rows themselves train like one rank that starts from a converted model."""
    data = rows(tmp_path / "rows.jsonl", "fine <in>", "now <new>", "and <other>", "<new> <other>")
    shared = [
        "--dataset",
        data,
        "--tuner_type",
        "full",
        "--max_steps",
        2,
        "--global_batch_size",
        4,
        "--progress",
        "false",
        "--adam_eps",
        "1e-4",
        "--add_version",
        "false",
        "--lr",
        "0.01",
    ]

    def sft(*words: object) -> None:
        assert main([str(word) for word in ("sft", *shared, *words)]) == 0

    sft("--model", small, "--resize_vocab", "true", "--tp", 2, "--nproc", 2, "--output_dir", tmp_path / "two")
    resize(small, tmp_path / "larger")
    sft("--model", tmp_path / "larger", "--output_dir", tmp_path / "one")
    two, one = (Checkpoint(tmp_path / name / "checkpoint-2") for name in ("two", "one"))
    start = Checkpoint(tmp_path / "larger")
    for name in start.entries:
        torch.testing.assert_close(two.read(name), one.read(name), atol=1e-4, rtol=0)
    assert (two.read("model.embed_tokens.weight") - start.read("model.embed_tokens.weight"))[VOCAB:].abs().min() > 0
    assert json.loads((tmp_path / "two" / "checkpoint-2" / "config.json").read_text())["vocab_size"] == LARGER
    assert json.loads((tmp_path / "two" / "args.json").read_text())["model"]["path"] == str(small)


def test_new_special_tokens(small, tmp_path):  # noqa: F811
    """By name and from a file. In the written tokenizer each is one token, and the model has a row for it."""
    (tmp_path / "tokens.txt").write_text("<|one|> <|two|>\n<|three|>\n")
    words = [
        "convert",
        "--model",
        small,
        "--to",
        "hf",
        "--output",
        tmp_path / "out",
        "--new_special_tokens",
        "<|zero|>",
        tmp_path / "tokens.txt",
    ]
    assert main([str(word) for word in words]) == 0
    tokenizer = load_tokenizer(tmp_path / "out")
    names = ["<|zero|>", "<|one|>", "<|two|>", "<|three|>"]
    assert tokenizer("".join(names), add_special_tokens=False)["input_ids"] == list(range(LARGER, LARGER + 4))
    assert tokenizer.decode([LARGER, LARGER + 3], skip_special_tokens=True) == ""
    assert Checkpoint(tmp_path / "out").entries["lm_head.weight"].shape[0] == LARGER + 4
    added = Model(new_special_tokens=("<|zero|>", str(tmp_path / "tokens.txt")))
    api.convert(
        source=str(small), to="mcore", output=str(tmp_path / "mcore"), rows=added, parallel=api.Parallel(tensor=2)
    )
    api.convert(source=str(tmp_path / "mcore"), to="hf", output=str(tmp_path / "back"))
    same_bits(tmp_path / "back", tmp_path / "out")


@pytest.mark.parametrize(
    ("verb", "words", "said"),
    [
        ("sft", ["--resize_vocab", "true"], "add rows that an adapter does not have (tuner.type=lora)"),
        ("sft", ["--new_rows", "mean"], "model.new_rows=mean (--new_rows) has no effect, since no rows are added"),
        ("convert", ["--new_special_tokens", "<in>"], "the tokenizer has <in> already; remove them"),
        ("convert", ["--new_special_tokens", "absent.txt"], "model.new_special_tokens=absent.txt cannot be read"),
        ("convert", ["--new_special_tokens", "<n>", "--dry_run", "true"], "--dry_run reads the model as it is"),
        ("infer", ["--resize_vocab", "true", "--prompt", "a"], "has no effect in infer"),
    ],
)
def test_what_cannot_be(small, tmp_path, capfd, verb, words, said):  # noqa: F811
    more = {
        "sft": ["--dataset", rows(tmp_path / "rows.jsonl", "a"), "--output_dir", tmp_path / "out"],
        "convert": ["--to", "hf", "--output", tmp_path / "out"],
        "infer": [],
    }[verb]
    assert said in refused(capfd, verb, "--model", small, *more, *words)
    assert not (tmp_path / "out").exists()


def test_nothing_to_add(tmp_path, capfd):
    model = tiny.make_chat(tmp_path / "model", "llama", num_hidden_layers=2)
    said = refused(
        capfd, "convert", "--model", model, "--to", "hf", "--resize_vocab", "true", "--output", tmp_path / "out"
    )
    assert "model.resize_vocab=true, but the tokenizer's" in said and "set it to false" in said
