"""Every layout computes what Hugging Face does and takes the steps of one rank; full and LoRA, on the real Megatron over gloo.

Gradients and logits are compared with transformers (and PEFT) in float32. Three optimizer steps are compared with one rank, whose steps
are compared with torch's AdamW on the Hugging Face model.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from swift_mega.config import schema
from swift_mega.device.device import Device
from swift_mega.launch.torchrun import run_ranks
from swift_mega.parallel.layout import parse_layout
from swift_mega.verify import parity
from tests.pairs import both_tuners, covering, kind, of_layouts
from tests.train.bench import OPTIM, STEPS, bench, check, check_steps

DENSE = ["tp2", "tp4", "tp2-sp", "pp2", "pp4", "pp2-vpp2", "tp2-pp2-sp", "dp2", "tp2-dp2-sp"]
MOE = ["ep2", "ep4", "tp2-ep2-etp1-sp", "tp2-ep2-etp2-sp", "pp2-ep2", "tp2-ep2-etp1-dp2-sp"]
CASES = [
    *(("llama", layout) for layout in DENSE),
    *(("llama_tied", layout) for layout in ("tp2", "pp2", "pp4", "pp2-vpp2", "tp2-pp2-sp")),
    *(("qwen3", layout) for layout in ("tp2", "tp2-sp")),
    *(("qwen2_window", layout) for layout in ("tp4-sp", "pp2-vpp2")),
    *(("qwen3_moe", layout) for layout in MOE),
    ("qwen3_moe_mixed", "tp2-ep2-etp2-sp"),
    ("mixtral", "ep2-dp4"),
    ("mixtral", "tp2-etp1-sp"),  # tensor ranks with the same whole experts
    # parameters outside Megatron's own linears: whole on tensor ranks with partial gradients, or sharded
    *((family, "tp2") for family in ("cohere_qk_norm", "hunyuan", "apertus", "phi_tied")),
    ("phi", "tp2-pp2-sp"),
    ("gpt_oss", "tp2-ep2-etp1-dp2-sp"),  # biases of experts, sinks sharded by heads
    ("granitemoeshared", "tp2-ep2-etp2-sp"),  # stacked experts, a shared one
    ("ernie4_5_moe", "tp2-ep2-etp1-sp"),  # a bias in the choice of experts
    ("qwen3_next", "tp2-ep2-etp2-sp"),  # gated delta nets, sharded by key heads
    ("qwen3_next_dense", "pp2"),
    # the norm after the state is whole on every rank, which has the gradient of its own heads only
    ("qwen3_next_dense", "tp2"),
]
RECOMPUTED = [
    ("llama_tied", layout, tuner, recompute)
    for layout in ("single", "tp2-sp", "pp2-vpp2", "tp2-pp2-sp")
    for tuner in ("full", "lora")
    for recompute in ("full", "selective")
]
CUT_OPTIMIZERS = [
    (family, layout, tuner, overlap)
    for family, layout in (
        ("llama", "dp2"),
        ("llama_tied", "tp2-dp2-sp"),
        ("qwen3_moe", "ep2-dp4"),
        ("llama", "pp2-dp2"),
        ("phi", "tp2-dp2-sp"),
    )
    for tuner in ("full", "lora")
    for overlap in ("plain", "overlap")
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.mark.parametrize("family, layout, tuner", covering(both_tuners(CASES), of_layouts(kind)))
def test_layout(work: Path, cpu: Device, family: str, layout: str, tuner: str) -> None:
    """Logits, loss, gradients equal Hugging Face's; three steps equal one rank's; replicas are bit-equal."""
    check(work, cpu, family, tuner, layout)


@pytest.mark.full
@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_eight_ranks(work: Path, cpu: Device, tuner: str) -> None:
    """Delta nets over tensor and pipeline ranks together; the default cases have each of the two alone."""
    check(work, cpu, "qwen3_next", tuner, "tp4-pp2-etp1-sp")


@pytest.mark.parametrize("family, layout, tuner, recompute", covering(RECOMPUTED, of_layouts(kind)))
def test_recompute(work: Path, cpu: Device, family: str, layout: str, tuner: str, recompute: Any) -> None:
    """Recomputing activations changes nothing, also for adapters after a frozen embedding."""
    check(work, cpu, family, tuner, layout, recompute=recompute)


@pytest.mark.parametrize("family, layout, tuner, overlap", covering(CUT_OPTIMIZERS, of_layouts(kind)))
def test_distributed_optimizer(work: Path, cpu: Device, family: str, layout: str, tuner: str, overlap: str) -> None:
    """Optimizer state sharded over data ranks gives the steps of one rank, with communication overlapped or not."""
    parallel, world = parse_layout(layout)
    hidden = overlap == "overlap"
    parallel = dataclasses.replace(
        parallel,
        distributed_optimizer=True,
        overlap_grad_reduce=hidden,
        overlap_param_gather=hidden,
        # Many buckets: each parameter is waited for where it is used. Phi's head has a bias, which gets a bucket of its own.
        ddp_bucket_size=(60 if family == "phi" else 4000) if hidden else None,
    )
    one = bench(work, cpu, family, tuner)
    check_steps(one, *one.steps(f"{layout}-{overlap}", parallel, world))


@pytest.mark.parametrize(
    "change",
    [{"pipeline_layout": "1,3"}, {"pipeline_layout": "Et|tttL"}, {"first_stage_layers": 1}, {"last_stage_layers": 1}],
    ids=lambda change: "=".join(map(str, *change.items())),
)  # fmt: skip
def test_uneven_stages(work: Path, cpu: Device, change: dict[str, Any]) -> None:
    """Stages of unequal length have the layers of the layout, and give the same steps."""
    parallel = schema.Parallel(pipeline=2, distributed_optimizer=False, **change)
    one = bench(work, cpu, "llama_tied", "full")
    found, losses, trained = one.both("uneven", parallel, 2)
    assert found.gradient < 1e-5, found
    check_steps(one, losses, trained)


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_one_rank_steps_equal_torch(work: Path, cpu: Device, family: str) -> None:
    """Three steps of one rank equal torch's AdamW on the Hugging Face model, with clipping, weight decay, loss per token and the
    padding token's row."""
    one = bench(work, cpu, family, "full")
    losses, weights = run_ranks(1, torch_steps, one.model, one.rows)
    assert one.one[0] == pytest.approx(losses, abs=2e-6)
    # The head is a copy of the embedding, where they are tied.
    assert weights.keys() - one.one[1].entries.keys() <= {"lm_head.weight"}
    for name in weights.keys() & one.one[1].entries.keys():
        torch.testing.assert_close(one.one[1].read(name), weights[name], atol=1e-5, rtol=0)


def torch_steps(model: Path, rows: parity.Rows) -> tuple[list[float], dict[str, torch.Tensor]]:
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    decayed = [p for p in network.parameters() if p.dim() > 1]
    plain = [p for p in network.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": OPTIM.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=OPTIM.lr,
        betas=(OPTIM.beta1, OPTIM.beta2),
        eps=OPTIM.eps,
    )
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        found = parity._backward(network, rows)  # the order of rows does not matter on one device
        torch.nn.utils.clip_grad_norm_(network.parameters(), OPTIM.clip_grad)
        optimizer.step()
        losses.append(float(found["loss"]))
    return losses, {name: value.detach().clone() for name, value in network.state_dict().items()}
