"""Every layout computes what Hugging Face does, and trains what one rank does; full and LoRA, on the real Megatron over gloo.

Gradients and logits are compared with transformers (and PEFT) in float32. Three optimizer steps are compared with one rank, whose
own steps are compared with torch's AdamW on the Hugging Face model.
"""

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tiny
from swift_mega.config import schema
from swift_mega.convert.hf_files import Checkpoint
from swift_mega.convert.save import write_directory
from swift_mega.device import Device
from swift_mega.launch.torchrun import run_ranks
from swift_mega.models.family import load_settings
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.layout import Layout, parse_layout, plan_layout
from swift_mega.train import validate
from swift_mega.train.build import build_training
from swift_mega.train.step import train_step

STEPS = 3
# An update of Adam's first steps is g / (|g| + eps): with a tiny eps the sign of a gradient that is zero but for rounding decides.
OPTIM = schema.Optim(lr=1e-2, eps=1e-4, weight_decay=0.1, schedule="constant", clip_grad=0.5)

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
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


def settings(
    model: Path, parallel: schema.Parallel, tuner: str, adapter: Path | None = None, **train: Any
) -> schema.Run:
    adapters = (str(adapter),) if adapter else ()
    return schema.Run(
        model=schema.Model(path=str(model), adapters=adapters), parallel=parallel, optim=OPTIM, train=schema.Train(**train),
        tuner=schema.Tuner(type=tuner, rank=4, alpha=8.0, target_modules=("all-linear",)),
    )  # fmt: skip


class Bench:
    """A model, its adapter and what Hugging Face says about them; made once per family and tuner."""

    def __init__(self, work: Path, cpu: Device, family: str, tuner: str) -> None:
        self.folder, self.tuner, self.cpu = work / f"{family}-{tuner}", tuner, cpu
        self.model = tiny.make(self.folder / "model", family)
        self.shape = load_settings(self.model).shape
        self.rows = validate.example_rows(self.shape.vocab, examples=16)
        self.adapter: Path | None = None
        if tuner == "lora":
            self.adapter = self.folder / "adapter"
            run = settings(self.model, schema.Parallel(), tuner)
            run_ranks(1, validate.random_adapter, run, cpu, self.layout(schema.Parallel(), 1), self.adapter)
        # in a rank of its own: this process must stay one that can fork ranks
        run_ranks(1, validate.reference, self.model, self.adapter, self.rows, self.folder / "reference")

    @functools.cached_property
    def one(self) -> tuple[list[float], Checkpoint]:
        """Losses and weights of one rank's three steps."""
        return self.steps("one", schema.Parallel(distributed_optimizer=False), 1)

    def layout(self, parallel: schema.Parallel, world: int) -> Layout:
        return plan_layout(parallel, self.shape, world)

    def difference(self, name: str, parallel: schema.Parallel, world: int, **train: Any) -> validate.Difference:
        run = settings(self.model, parallel, self.tuner, self.adapter, **train)
        run_ranks(world, validate.measure, run, self.cpu, self.layout(parallel, world), self.rows, self.folder / name)
        return validate.compare(name, self.folder / "reference", self.folder / name)

    def steps(self, name: str, parallel: schema.Parallel, world: int, **train: Any) -> tuple[list[float], Checkpoint]:
        run = settings(self.model, parallel, self.tuner, self.adapter, **train)
        output = self.folder / f"{name}-steps"
        losses = run_ranks(world, three_steps, run, self.cpu, self.layout(parallel, world), self.rows, output)
        return losses, Checkpoint(output)


_BENCHES: dict[tuple[str, str], Bench] = {}


def bench(work: Path, cpu: Device, family: str, tuner: str) -> Bench:
    if (family, tuner) not in _BENCHES:
        _BENCHES[family, tuner] = Bench(work, cpu, family, tuner)
    return _BENCHES[family, tuner]


def three_steps(run: schema.Run, device: Device, layout: Layout, rows: validate.Rows, output: Path) -> list[float]:
    """One rank: trains on `rows`, a different order in every step, checks replicas, writes what was trained; returns losses."""
    groups = parallel_groups.init(layout, seed=run.train.seed)
    training = build_training(run, device, groups, steps=STEPS)
    losses = []
    for step in range(STEPS):
        turned = [*rows[4 * step :], *rows[: 4 * step]]
        losses.append(train_step(training, validate.microbatches(turned, layout, groups.coordinate.data)).loss)
    for chunk in training.chunks:
        if run.parallel.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    check_replicas(training, groups)
    write_directory(
        training.part, groups, output, list(training.tuner.held(training.part)), dtypes=torch.float32, max_shard_bytes=1 << 40,
        companions=lambda staging: None, overwrite=True,
    )  # fmt: skip
    parallel_groups.close()
    return losses


def check_replicas(training: Any, groups: parallel_groups.Groups) -> None:
    """Ranks that hold the same parameter hold the same bits."""

    def digest(tensor: torch.Tensor) -> str:
        return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()  # fmt: skip

    where, mine = groups.coordinate, {}
    part = training.part
    for held in [*part.held(), *training.tuner.held(part)]:
        cut = held.rule.pack.axis is not None
        place = part.tensor_axis(held)[0] if cut else "whole"
        name = held.parts[0]  # a tied copy has the name of its original
        mine[name, place, where.expert if held.expert else None] = digest(held.parameter)
    gathered: list[dict[Any, str]] = [{} for _ in range(groups.layout.world)]
    dist.all_gather_object(gathered, mine)
    first: dict[Any, str] = {}
    for one in gathered:
        for key, value in one.items():
            assert first.setdefault(key, value) == value, f"replicas of {key} differ"


def check(work: Path, cpu: Device, family: str, tuner: str, layout: str, **train: Any) -> None:
    parallel, world = parse_layout(layout)
    parallel = dataclasses.replace(parallel, distributed_optimizer=False)
    one = bench(work, cpu, family, tuner)
    found = one.difference(layout, parallel, world, **train)
    assert found.logits < 1e-4 and found.loss < 2e-6 and found.gradient < 1e-5, found
    check_steps(one, *one.steps(layout, parallel, world, **train))


def check_steps(one: Bench, losses: list[float], trained: Checkpoint) -> None:
    want_losses, want = one.one
    assert losses == pytest.approx(want_losses, abs=2e-6)
    assert trained.entries.keys() == want.entries.keys()
    for name in want.entries:
        torch.testing.assert_close(
            trained.read(name), want.read(name), atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("tuner", ["full", "lora"])
@pytest.mark.parametrize("family, layout", CASES, ids=lambda value: value)
def test_layout(work: Path, cpu: Device, family: str, layout: str, tuner: str) -> None:
    """Logits, loss, gradients equal Hugging Face's; three steps equal one rank's; replicas are bit-equal."""
    check(work, cpu, family, tuner, layout)


@pytest.mark.parametrize("tuner", ["full", "lora"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_one_rank(work: Path, cpu: Device, family: str, tuner: str) -> None:
    """One rank equals Hugging Face for every family."""
    found = bench(work, cpu, family, tuner).difference("single", schema.Parallel(distributed_optimizer=False), 1)
    assert found.logits < 1e-4 and found.loss < 2e-6 and found.gradient < 1e-5, found
    assert found.tensors > 20


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_is_cut(work: Path, cpu: Device, family: str, layout: str) -> None:
    """Tensor, sequence and pipeline parallelism of every family; experts are cut with the ranks there are."""
    one = bench(work, cpu, family, "full")
    name = layout
    if one.shape.experts:
        name = {"tp2-sp": "tp2-ep2-etp1-sp", "pp2": "pp2-ep2"}[layout]
    parallel, world = parse_layout(name)
    found = one.difference(layout, dataclasses.replace(parallel, distributed_optimizer=False), world)
    assert found.logits < 1e-4 and found.loss < 2e-6 and found.gradient < 1e-5, found


@pytest.mark.parametrize("tuner", ["full", "lora"])
@pytest.mark.parametrize("layout", ["single", "tp2-sp", "pp2-vpp2", "tp2-pp2-sp"])
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recompute(work: Path, cpu: Device, layout: str, tuner: str, recompute: Any) -> None:
    """Recomputing activations changes nothing: also for adapters below a frozen embedding."""
    check(work, cpu, "llama_tied", tuner, layout, recompute=recompute)


@pytest.mark.parametrize(
    "family, layout", [("llama", "dp2"), ("llama_tied", "tp2-dp2-sp"), ("qwen3_moe", "ep2-dp4"), ("llama", "pp2-dp2")]
)
@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_distributed_optimizer(work: Path, cpu: Device, family: str, layout: str, overlap: bool, tuner: str) -> None:
    """Optimizer state cut over data ranks trains what one rank does, with communication hidden or not."""
    parallel, world = parse_layout(layout)
    parallel = dataclasses.replace(
        parallel, distributed_optimizer=True, overlap_grad_reduce=overlap, overlap_param_gather=overlap,
        ddp_bucket_size=4000 if overlap else None,  # many buckets: each parameter is waited for where it is used
    )  # fmt: skip
    one = bench(work, cpu, family, tuner)
    check_steps(one, *one.steps(f"{layout}-{overlap}", parallel, world))


@pytest.mark.parametrize(
    "change",
    [{"pipeline_layout": "1,3"}, {"pipeline_layout": "Et|tttL"}, {"first_stage_layers": 1}, {"last_stage_layers": 1}],
    ids=lambda change: "=".join(map(str, *change.items())),
)  # fmt: skip
def test_uneven_stages(work: Path, cpu: Device, change: dict[str, Any]) -> None:
    """Stages of unequal length hold the layers that the layout says, and train the same."""
    parallel = schema.Parallel(pipeline=2, distributed_optimizer=False, **change)
    one = bench(work, cpu, "llama_tied", "full")
    found = one.difference("uneven", parallel, 2)
    assert found.gradient < 1e-5, found
    check_steps(one, *one.steps("uneven", parallel, 2))


def test_one_rank_steps_equal_torch(work: Path, cpu: Device) -> None:
    """Three steps of one rank are torch's AdamW on the Hugging Face model: clipping, weight decay, loss per token and all."""
    one = bench(work, cpu, "llama", "full")
    losses, weights = run_ranks(1, torch_steps, one.model, one.rows)
    assert one.one[0] == pytest.approx(losses, abs=2e-6)
    for name, value in weights.items():
        torch.testing.assert_close(one.one[1].read(name), value, atol=1e-5, rtol=0)


def torch_steps(model: Path, rows: validate.Rows) -> tuple[list[float], dict[str, torch.Tensor]]:
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    decayed = [p for p in network.parameters() if p.dim() > 1]
    plain = [p for p in network.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": OPTIM.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=OPTIM.lr, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps,
    )  # fmt: skip
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        found = validate._backward(network, rows)  # order of rows does not matter on one device
        torch.nn.utils.clip_grad_norm_(network.parameters(), OPTIM.clip_grad)
        optimizer.step()
        losses.append(float(found["loss"]))
    return losses, {name: value.detach().clone() for name, value in network.state_dict().items()}
