"""More tensor ranks than key heads: a rank's rows of linear_qkv end within a group, and all results equal Hugging Face's."""

import dataclasses
from pathlib import Path

import pytest

from swift_mega.config import schema
from swift_mega.device.device import Device
from swift_mega.errors import UserError
from swift_mega.models.translate import load_settings
from swift_mega.parallel.layout import parse_layout, plan_layout
from tests import tiny
from tests.pairs import both_tuners, covering, kind, of_layouts
from tests.train.bench import bench, check, check_steps

CASES = [
    # With two ranks as many of each kind as possible; cases that need four ranks are below.
    *((f"{name}_4_1", "tp2") for name in ("hunyuan", "olmo2")),
    *((f"{name}_4_1", "tp2-sp") for name in ("llama_bias", "qwen3", "olmo2")),
    *((f"{name}_4_1", "tp2-ep2-etp1-sp") for name in ("mixtral", "gpt_oss")),
    *(("falcon", layout) for layout in ("tp2", "tp2-pp2")),
    ("gpt_bigcode", "tp2-sp"),
    *(("llama_4_1", layout) for layout in ("tp2", "tp2-sp", "tp4-sp", "tp2-pp2")),
    *(("llama_tied_4_2", layout) for layout in ("tp4", "tp4-sp")),
    ("llama_bias_8_2", "tp4"),  # two queries of a group on each rank; biases of all linears
    ("qwen2_4_1", "tp2-sp"),
    ("qwen3_4_2", "tp4-sp"),  # norms of heads, whole on every rank
    ("phi3_4_1", "tp2"),  # queries, keys and values joined in one Hugging Face tensor, one after another
    ("olmo2_4_1", "tp4"),  # norms of all heads together
    ("olmo2_8_2", "tp4-sp"),
    ("hunyuan_4_2", "tp4"),  # norms of heads after the rotation
    ("gpt_oss_8_2", "tp4-ep2-etp1-sp"),  # sinks of query heads
    ("mixtral_4_1", "tp4-ep2-etp1-sp"),
    ("falcon", "tp4"),  # a joined Hugging Face tensor of one group
    ("gpt_bigcode", "tp4-sp"),
]
RECOMPUTED = [
    ("full", "lora"), ("selective", "full"),
    pytest.param("full", "full", marks=pytest.mark.full), pytest.param("selective", "lora", marks=pytest.mark.full),
]  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("few_key_heads")


@pytest.mark.parametrize("family, layout, tuner", covering(both_tuners(CASES), of_layouts(kind)))
def test_layout(work: Path, cpu: Device, family: str, layout: str, tuner: str) -> None:
    """Logits, loss, gradients equal Hugging Face's; three steps equal one rank's; replicas are bit-equal."""
    check(work, cpu, family, tuner, layout, layers=2)


@pytest.mark.parametrize("recompute, tuner", RECOMPUTED)
def test_recompute(work: Path, cpu: Device, recompute: str, tuner: str) -> None:
    """Ranks gather the same tensors twice, in the same order."""
    check(work, cpu, "llama_4_1", tuner, "tp2-sp", layers=2, recompute=recompute)


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_distributed_optimizer(work: Path, cpu: Device, tuner: str) -> None:
    """Optimizer state sharded over data ranks, communication overlapped: gathered LoRA factors are waited for first."""
    parallel, world = parse_layout("tp2-dp2-sp")
    parallel = dataclasses.replace(
        parallel, distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True, ddp_bucket_size=4000
    )
    one = bench(work, cpu, "llama_4_1", tuner, layers=2)
    check_steps(one, *one.steps("overlap", parallel, world))


def test_a_norm_for_each_key_head_is_refused(tmp_path: Path) -> None:
    """Cohere's norms, whose weights are [key heads, head_dim]."""
    shape = load_settings(tiny.make(tmp_path, "cohere_qk_norm")).shape
    with pytest.raises(
        UserError, match=r"parallel.tensor=8 is more than the model's 4 key-value heads.*parallel.tensor=4"
    ):
        plan_layout(schema.Parallel(tensor=8), shape, 8)
