"""Rows cut for Transformer Engine's context parallelism, whose kernels need CUDA: with a definition of them in their place, over gloo.

What is proven is all that is ours: that examples are padded, cut and glued as Transformer Engine wants, that labels and positions go with
them, and what its attention is called with. Then logits, loss and gradients are Hugging Face's, and three steps those of one rank.
"""

from pathlib import Path

import pytest

from swift_mega.device.device import Device
from swift_mega.models import specs
from tests.engine_stand_in import StandIn
from tests.pairs import both_tuners, covering, once
from tests.train.bench import check

CASES = [
    *(("llama", f"cp2-te:{kind}") for kind in ("p2p", "a2a", "allgather")),
    ("llama_bias_8_2", "cp4-te:a2a2+p2p"),
    *(("llama", f"{layout}") for layout in ("tp2-cp2-te:p2p-sp", "pp2-cp2-te:p2p", "cp2-te:p2p-dp2")),
    ("qwen3", "cp3-te:p2p"),
    ("gpt2", "cp2-te:p2p"),  # learned positions
    ("mistral", "cp2-te:a2a"),  # windows
    ("mixtral", "cp2-ep2-te:allgather"),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine_layouts")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, of which ranks are forks."""
    monkeypatch.setattr(specs, "te_attention", lambda te: StandIn)


@pytest.mark.parametrize("family, layout, tuner", covering(both_tuners(CASES), once))
def test_layout(work: Path, cpu: Device, family: str, layout: str, tuner: str) -> None:
    check(work, cpu, family, tuner, layout, layers=2)
