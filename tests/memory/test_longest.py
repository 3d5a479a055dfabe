"""`swift-mega plan`: the table, the exit code and what it refuses."""

import json
from pathlib import Path

import pytest

from swift_mega.cli import main
from swift_mega.memory.published import LLAMA_3_1_8B

FITTING = [
    "--tuner_type", "full", "--recompute_granularity", "full", "--tile_mlp", "true", "--offload_activations", "true",
    "--optimizer_cpu_offload", "true", "--context_parallel_size", "8", "--gpu_memory", "79.6GiB",
]  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_1_8B))
    return str(tmp_path)


def test_the_longest_row_of_a_plan_is_the_last_that_fits(model, capsys):
    """The printed number fits, and eight tokens more (one for each context rank) do not fit."""
    assert main(["plan", "--model", model, *FITTING, "--max_length", "100000"]) == 0
    said = capsys.readouterr().out
    longest = int(said.split("longest row that fits: ")[1].split()[0])
    assert longest > 10**6 and "weights       14.96 GiB" in said, said
    assert main(["plan", "--model", model, *FITTING, "--max_length", str(longest)]) == 0
    assert main(["plan", "--model", model, *FITTING, "--max_length", str(longest + 8)]) == 1
    assert "does not fit" in capsys.readouterr().out


def test_host_memory_is_a_limit_too(model, capsys):
    assert main(["plan", "--model", model, *FITTING, "--max_length", "1000000", "--host_memory", "20GB"]) == 1
    assert "longest row that fits: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--gpu_memory", "much"], "--gpu_memory=much: expected a size such as 80GB or 79.6GiB"),
        (["--lr", "1"], "--lr sets optim.lr, which has no effect in plan; remove it"),
        (["--recompute_granularity", "selective"], "train.recompute=selective has no memory formula"),
    ],
)
def test_what_a_plan_refuses(model, capsys, words, message):
    assert main(["plan", "--model", model, *words]) == 2
    assert message in capsys.readouterr().err


def test_a_plan_needs_a_model(capsys):
    assert main(["plan"]) == 2
    assert "plan: no model; give --model DIR" in capsys.readouterr().err
