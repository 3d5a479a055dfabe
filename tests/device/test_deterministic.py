"""train.deterministic reaches every rank, runs repeat bit for bit, and an op without a deterministic form is an error that names it."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tiny
from swift_mega import api
from swift_mega.device.deterministic import ENVIRONMENT, deterministic, set_environment
from swift_mega.errors import UserError
from swift_mega.objectives.next_token import NextToken
from swift_mega.objectives.objective import Output
from swift_mega.ops.gated_delta import _running_sums


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set through the fixture, so that they are unset when the test ends."""
    for name, (value, _) in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def test_the_environment_of_libraries() -> None:
    environ = {"NCCL_ALGO": "Ring"}
    set_environment(environ)
    assert environ == {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NCCL_ALGO": "Ring",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    }
    for name, value in (
        ("NCCL_ALGO", "NVLS"),
        ("CUBLAS_WORKSPACE_CONFIG", ":0:0"),
        ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1"),
    ):
        with pytest.raises(
            UserError, match=f"train.deterministic=true, but {name}={value} in the environment.*unset it, or set"
        ):
            set_environment({name: value})


def test_a_running_sum() -> None:
    """CUDA's cumsum has no deterministic form; the matrix product that replaces it gives the same sum."""
    terms = torch.arange(12, dtype=torch.float64).view(2, 6) ** 1.5
    with deterministic(True):
        torch.testing.assert_close(_running_sums(terms), terms.cumsum(-1), rtol=1e-15, atol=0)
    assert not torch.are_deterministic_algorithms_enabled()


def test_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First with dropout, on two data ranks; then an objective that writes to indices that may repeat, which shows that the settings are
    active."""
    model = tiny.make_chat(tmp_path / "model", "llama", num_hidden_layers=2)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"query": f"{n}?", "response": f"{n}."}) for n in range(8)))

    def train(name: str) -> tuple[list[float], bytes]:
        run = api.load_recipe(
            None,
            [
                f"model.path={model}",
                f"data.dataset={rows}",
                f"train.output_dir={tmp_path / name}",
                "train.steps=2",
                "train.global_batch_size=4",
                "tuner.dropout=0.3",
                "monitor.progress=false",
                "train.deterministic=true",
                "parallel.distributed_timeout_minutes=9",
            ],
        ).run
        result = api.train(run, nproc=2)
        return result.losses, (result.checkpoint / "adapter_model.safetensors").read_bytes()

    assert train("one") == train("other")
    loss = NextToken.loss

    def scattered(self: NextToken, output: Output) -> Any:
        assert output.head.part.config.deterministic_mode
        for group in (dist.group.WORLD, output.head.groups.tensor):
            assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(minutes=9)
        torch.zeros(3).put_(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))
        return loss(self, output)

    monkeypatch.setattr(NextToken, "loss", scattered)
    with pytest.raises(
        UserError,
        match=r"train.deterministic=true: put_ has no deterministic form in torch .*test_determ.*; set train.deterministic=false",
    ):
        train("none")
