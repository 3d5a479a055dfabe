"""Rows of a Megatron checkpoint's vocabulary beyond vocab_size of the given config.json: padding is dropped, and rows of tokens are never
lost."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch

import tiny
from swift_mega import api
from swift_mega.errors import UserError
from tests.convert.megatron.test_mcore import same_bits


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("hf"), "phi", num_hidden_layers=2)  # its output layer has a bias


@pytest.fixture(scope="module")
def mcore(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of 131 tokens in 256 rows."""
    output = tmp_path_factory.mktemp("mcore") / "mcore"
    api.convert(source=str(source), to="mcore", output=str(output))
    return output


def with_vocab(source: Path, directory: Path, size: int) -> Path:
    """The source's config alone, with another vocab_size."""
    directory.mkdir()
    fields = json.loads((source / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**fields, "vocab_size": size}))
    return directory


def back(mcore: Path, model: Path, output: Path) -> None:
    api.convert(source=str(mcore), to="hf", model=str(model), output=str(output), dtype="float32")


@pytest.mark.parametrize(("size", "why"), [(120, "rows would be lost"), (200, "padding would become tokens")])
def test_our_own_say_how_many_words_there_are(source, mcore, tmp_path, size, why):
    with pytest.raises(UserError, match=rf"with vocab_size=131, and .* says vocab_size={size}: {why}; remove --model"):
        back(mcore, with_vocab(source, tmp_path / "other", size), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    back(mcore, with_vocab(source, tmp_path / "same", 131), tmp_path / "out")
    same_bits(tmp_path / "out", source)


def others(mcore: Path, directory: Path, **args: int) -> Path:
    """The same checkpoint without our config beside it, as a training run with these settings saves it."""
    shutil.copytree(mcore, directory, ignore=shutil.ignore_patterns("hf"))
    common = directory / "release" / "common.pt"
    kept = torch.load(common, weights_only=True)
    torch.save({**kept, **({"args": argparse.Namespace(**args)} if args else {})}, common)
    return directory


def test_rows_of_others_are_padding_where_they_are_alike(source, mcore, tmp_path):
    """The extra rows are equal (zeros here), so they are padding. A smaller vocab_size is refused; the message says what keeps all rows."""
    made = others(mcore, tmp_path / "run")
    back(made, with_vocab(source, tmp_path / "right", 131), tmp_path / "out")
    same_bits(tmp_path / "out", source)
    with pytest.raises(
        UserError, match=r"has 256 rows, and .* says vocab_size=120: the others differ .* set vocab_size=256 to keep"
    ):
        back(made, with_vocab(source, tmp_path / "fewer", 120), tmp_path / "lost")
    assert not (tmp_path / "lost").exists()
    with pytest.raises(UserError, match="so they may belong to tokens, and would be lost"):
        api.compare(str(source), api.Candidate(checkpoint=str(made), model=str(tmp_path / "fewer")))
    back(made, with_vocab(source, tmp_path / "all", 256), tmp_path / "kept")
    assert json.loads((tmp_path / "kept" / "report.json").read_text())["tensors"]["lm_head.weight"]["shape"] == [
        256,
        64,
    ]


def test_rows_of_others_are_padding_where_the_run_padded_so(source, mcore, tmp_path, capsys):
    """Megatron-LM draws random padding. Then the run's settings decide, and a line says what is not written."""
    fewer = with_vocab(source, tmp_path / "fewer", 120)
    by_tensor = others(mcore, tmp_path / "run", make_vocab_size_divisible_by=128, tensor_model_parallel_size=2)
    back(by_tensor, fewer, tmp_path / "out")
    assert "rows 120 to 255 of the vocabulary in" in (said := capsys.readouterr().out) and "a multiple of 256" in said
    other = others(mcore, tmp_path / "other", make_vocab_size_divisible_by=64, tensor_model_parallel_size=1)
    with pytest.raises(UserError, match="so they may belong to tokens, and would be lost"):
        back(other, fewer, tmp_path / "lost")
