"""A tokenizer with more tokens than the embedding has rows: every verb refuses a row that uses such a token, before a rank starts."""

import json
from pathlib import Path

import pytest

import tiny
from swift_mega.cli import main
from swift_mega.config.schema import Data
from swift_mega.data.chat import load_tokenizer
from swift_mega.data.loader import prepare

VOCAB = 400
"""Of the model. The tokenizer has more: <new> and <other> are beyond it."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 400 rows, which has no rows for the tokenizer's last tokens."""
    folder = tmp_path_factory.mktemp("small")
    made = tiny.tokenizer(tiny.CHATML, "<|im_start|>", "<|im_end|>", eos="<|im_end|>")
    made.add_tokens([f"<t{n}>" for n in range(VOCAB - 1 - len(made))], special_tokens=True)
    made.add_tokens(["<in>", "<new>", "<other>"], special_tokens=True)
    assert made.convert_tokens_to_ids("<in>") == VOCAB - 1
    tiny.make(folder, "llama", vocab_size=VOCAB, num_hidden_layers=2, max_position_embeddings=512)
    made.save_pretrained(folder)
    return folder


def rows(path: Path, *replies: str) -> Path:
    path.write_text("".join(json.dumps({"query": "Who?", "response": text}) + "\n" for text in replies))
    return path


def refused(capfd: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([str(word) for word in words]) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize("verb", ["sft", "pt"])
def test_training_is_refused_before_a_rank_starts(small, tmp_path, capfd, verb):
    """At TP 2, where Megatron's padding has a row for the token and would train it. The error has file:line, the token and the remedy."""
    data = rows(tmp_path / "rows.jsonl", "fine <in>", "not <new>")
    said = refused(
        capfd,
        verb,
        "--model",
        small,
        "--dataset",
        data,
        "--nproc",
        2,
        "--tp",
        2,
        "--output_dir",
        tmp_path / "out",
        "--progress",
        "false",
    )
    assert (
        f"{data}:2: token 400 ('<new>') has no row in the model's embedding, which ends at 399 (vocab_size=400)" in said
    )
    assert "--resize_vocab true" in said
    assert not (tmp_path / "out").exists()


def test_tokens_that_no_row_uses_need_no_row(small, tmp_path):
    data = rows(tmp_path / "rows.jsonl", "fine <in>")
    found = prepare(Data(dataset=(str(data),)), load_tokenizer(small), vocab=VOCAB)
    assert max(found.train[0].tokens) == VOCAB - 1


def test_plain_text_is_checked_too(small, tmp_path, capfd):
    data = tmp_path / "text.jsonl"
    data.write_text(json.dumps({"text": "a b"}) + "\n" + json.dumps({"text": "a <other>"}) + "\n")
    said = refused(
        capfd, "pt", "--model", small, "--dataset", data, "--output_dir", tmp_path / "out", "--progress", "false"
    )
    assert f"{data}:2: token 401 ('<other>') has no row" in said


def test_infer_verify_and_compare_refuse_it_too(small, tmp_path, capfd):
    said = refused(capfd, "infer", "--model", small, "--prompt", "say <new>")
    assert "token 400 ('<new>') has no row" in said and "swift-mega convert --to hf" in said
    asked = rows(tmp_path / "asked.jsonl", "one", "two")
    asked.write_text(asked.read_text().replace("Who?", "Who is <new>?", 2).replace("Who is <new>?", "Who?", 1))
    said = refused(capfd, "infer", "--model", small, "--input", asked)
    assert f"{asked}:2: the conversation: token 400" in said  # before a row is answered
    text = tmp_path / "prompts.txt"
    text.write_text("fine\nsay <new>\n")
    said = refused(capfd, "verify", "--model", small, "--layouts", "tp2", "--prompts", text)
    assert "the prompt 'say <new>': token 400 ('<new>') has no row" in said
    said = refused(capfd, "compare", "--a", small, "--b", small, "--prompts", text)
    assert "the prompt 'say <new>': token 400 ('<new>') has no row" in said and "--tokenizer DIR" in said
