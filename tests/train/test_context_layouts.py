"""Rows of tokens split over context ranks: all results equal Hugging Face's and those of one rank."""

from pathlib import Path

import pytest

from swift_mega.device.device import Device
from tests.pairs import both_tuners, covering, kind, of_layouts
from tests.train.bench import check

CASES = [
    *(("llama", layout) for layout in ("cp2-ring", "cp2-ulysses", "cp2-allgather", "cp4-ulysses2", "cp4-ring")),
    *(("llama", layout) for layout in ("tp2-cp2-ring-sp", "tp2-cp2-ulysses", "pp2-cp2-ring", "cp2-ring-dp2")),
    ("llama_4_1", "cp2-ulysses"),  # one key head, sent to both ranks
    ("mixtral", "cp2-ep2-ring"),
    ("mixtral", "tp2-cp2-ep2-etp1-ulysses-sp"),
    ("deepseek_v3_moe", "cp2-ring"),  # latent attention: keys wider than values
    ("deepseek_v3_moe", "cp2-ep2-ulysses"),
    ("gpt_oss", "cp2-ring"),  # sinks and windows
    ("gpt_oss", "cp2-ulysses"),
    ("gemma2", "cp2-ring"),  # soft-capped scores and windows
    ("phi3_longrope", "cp2-ring"),  # rotary frequencies by the length of the whole example
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("context_layouts")


@pytest.mark.parametrize("family, layout, tuner", covering(both_tuners(CASES), of_layouts(kind)))
def test_layout(work: Path, cpu: Device, family: str, layout: str, tuner: str) -> None:
    """Logits, loss, gradients equal Hugging Face's; three steps equal one rank's; replicas are bit-equal."""
    check(work, cpu, family, tuner, layout, layers=2)


@pytest.mark.parametrize("layout", ["cp2-ring", "cp2-ulysses"])
def test_recompute(work: Path, cpu: Device, layout: str) -> None:
    """Ranks send the same tensors twice, in the same order."""
    check(work, cpu, "llama", "full", layout, layers=2, recompute="full")
