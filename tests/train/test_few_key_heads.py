"""More tensor ranks than key heads: a rank's rows of linear_qkv end within a group, and everything is what Hugging Face computes."""

from pathlib import Path

import pytest

from swift_mega.device import Device
from tests.train.bench import check

CASES = [
    *(("llama_4_1", layout) for layout in ("tp2", "tp2-sp", "tp4-sp", "tp2-pp2")),
    *(("llama_4_2", layout) for layout in ("tp4", "tp4-sp")),
    ("llama_8_2", "tp4"),  # two queries of a group on each rank; biases of all linears
    ("qwen2_4_1", "tp2-sp"),
    ("qwen3_4_2", "tp4-sp"),  # norms of heads, whole on every rank
    ("phi3_4_1", "tp2"),  # one Hugging Face tensor, one after another
    ("olmo2_4_1", "tp4"),  # norms of all heads together
    ("olmo2_8_2", "tp4-sp"),
    ("mixtral_4_1", "tp4-ep2-etp1-sp"),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("few_key_heads")


@pytest.mark.parametrize("tuner", ["full", "lora"])
@pytest.mark.parametrize("family, layout", CASES, ids=lambda value: value)
def test_layout(work: Path, cpu: Device, family: str, layout: str, tuner: str) -> None:
    """Logits, loss, gradients equal Hugging Face's; three steps equal one rank's; replicas are bit-equal."""
    check(work, cpu, family, tuner, layout)
