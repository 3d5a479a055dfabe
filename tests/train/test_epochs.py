"""An epoch is each row once, whatever the batch, the ranks and the layout: tokens and weights show it.

The oracle of a short last step is the same rows in a batch of exactly that size, on one rank.
"""

import json
from pathlib import Path

import pytest
import torch

import tiny
from swift_mega import api
from swift_mega.convert.files.hf_files import Checkpoint

ROWS = 7


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"query": f"What is {n}?" + " Please." * (n % 3), "response": "It is so." * (n + 1)} for n in range(ROWS)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("llama", "mixtral"):
        tiny.make_chat(folder / name, name, max_position_embeddings=512, num_hidden_layers=2)
    return folder


def run(model: Path, rows: Path, output: Path, *changes: str, nproc: int = 1) -> api.TrainResult:
    base = [
        f"model.path={model}",
        f"data.dataset={rows}",
        f"train.output_dir={output}",
        "optim.lr=0.01",
        "optim.eps=1e-4",
        "tuner.type=full",
        "monitor.progress=false",
        "data.max_length=128",
        "model.dtype=float32",
    ]
    return api.train(api.load_recipe(None, [*base, *changes]).run, nproc=nproc)


def trained_tokens(done: api.TrainResult) -> int:
    return json.loads((done.directory / "logging.jsonl").read_text().splitlines()[-1])["trained_tokens"]


def weights_equal(one: api.TrainResult, other: api.TrainResult, tolerance: float) -> None:
    a, b = Checkpoint(one.checkpoint), Checkpoint(other.checkpoint)
    for name in a.entries:
        torch.testing.assert_close(a.read(name), b.read(name), atol=tolerance, rtol=0)


@pytest.fixture(scope="module")
def one_step(models: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> api.TrainResult:
    """Weights and loss after one step on one batch with all rows."""
    batch = f"train.global_batch_size={ROWS}"
    return run(models / "llama", rows, tmp_path_factory.mktemp("one"), batch, "train.steps=1")


@pytest.mark.parametrize("changes, nproc", [
    ([], 1),
    (["data.packing=true"], 1),
    (["train.global_batch_size=32"], 4),
    (["train.micro_batch_size=4", "train.global_batch_size=32"], 4),  # two of four ranks have padding alone
    (["parallel.context=2", "train.micro_batch_size=4"], 4),
    (["parallel.tensor=2", "parallel.sequence=true", "train.micro_batch_size=8"], 4),  # one of two
    (["parallel.pipeline=2", "train.micro_batch_size=8"], 4),
], ids=lambda value: "-".join(value) if isinstance(value, list) else str(value))  # fmt: skip
def test_few_rows_are_one_step(
    models: Path, rows: Path, tmp_path: Path, one_step: api.TrainResult, changes: list[str], nproc: int
) -> None:
    """7 rows with batches of 16 or more: one step with each row once. Its loss and weights equal those of a batch of 7."""
    done = run(models / "llama", rows, tmp_path, "train.epochs=1", *changes, nproc=nproc)
    assert done.losses == pytest.approx(one_step.losses, abs=1e-5)
    assert (done.tokens, trained_tokens(done)) == (one_step.tokens, trained_tokens(one_step))
    weights_equal(done, one_step, 1e-5)


def test_the_last_of_several_steps_is_short(
    models: Path, rows: Path, tmp_path: Path, one_step: api.TrainResult
) -> None:
    """Two epochs of 7 rows in batches of 4: 14 examples in 4 steps, the last with 2, on 1 and on 2 ranks."""
    changes = ("train.epochs=2", "train.global_batch_size=4", "train.micro_batch_size=2")
    one = run(models / "llama", rows, tmp_path / "one", *changes)
    two = run(models / "llama", rows, tmp_path / "two", *changes, nproc=2)
    assert len(one.losses) == 4 and two.losses == pytest.approx(one.losses, abs=1e-5)
    assert one.tokens == two.tokens == 2 * one_step.tokens
    assert trained_tokens(one) == trained_tokens(two) == 2 * trained_tokens(one_step)
    weights_equal(one, two, 1e-5)


def test_experts_and_ranks_of_padding_alone(models: Path, rows: Path, tmp_path: Path) -> None:
    """Expert-parallel ranks exchange tokens in every microbatch: a rank without rows takes part and adds nothing to the result."""
    want = run(models / "mixtral", rows, tmp_path / "one", f"train.global_batch_size={ROWS}", "train.steps=1")
    found = run(
        models / "mixtral",
        rows,
        tmp_path / "two",
        "train.epochs=1",
        "train.micro_batch_size=8",
        "parallel.expert=2",
        nproc=2,
    )
    assert found.losses == pytest.approx(want.losses, abs=1e-5)
    assert found.tokens == want.tokens
    weights_equal(found, want, 1e-5)


def test_steps_that_repeat_rows_say_so(
    models: Path, rows: Path, tmp_path: Path, one_step: api.TrainResult, capfd: pytest.CaptureFixture[str]
) -> None:
    """All steps of train_iters are done, with repeated rows where there are too few."""
    done = run(models / "llama", rows, tmp_path / "a", "train.steps=1", "train.global_batch_size=21")
    assert "train.steps=1 goes over the 7 examples 3 times" in capfd.readouterr().out
    assert done.tokens == 3 * one_step.tokens
    run(models / "llama", rows, tmp_path / "b", "train.epochs=1")
    assert "goes over" not in capfd.readouterr().out
