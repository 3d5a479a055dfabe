"""Rows split for Transformer Engine's context parallelism, whose kernels need CUDA: a definition of them takes their place, over gloo.

The tests show that our part is correct: examples are padded, split and joined as Transformer Engine requires, labels and positions are
split in the same way, and its attention gets the right arguments. Then logits, loss and gradients equal Hugging Face's, and three steps
equal those of one rank.
"""

from pathlib import Path

import pytest

from swift_mega.device.device import Device
from swift_mega.models import specs
from tests.pairs import both_tuners, covering, once
from tests.te_stand_in import StandIn
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
    """Installed in this process, which ranks are forks of."""
    monkeypatch.setattr(specs, "te_attention", lambda te: StandIn)


@pytest.mark.parametrize("family, layout, tuner", covering(both_tuners(CASES), once))
def test_layout(work: Path, cpu: Device, family: str, layout: str, tuner: str) -> None:
    check(work, cpu, family, tuner, layout, layers=2)
