"""Every family equals Hugging Face on one rank, full and LoRA, and when it is split over tensor, expert and pipeline ranks.

In float64, because float32 rounds some families' gradients by about 1e-5, depending on the processor. The remaining difference comes from
what transformers computes in float32 in any dtype (its norms and softmaxes). test_layouts.py is in float32.
"""

import dataclasses
from collections.abc import Container
from pathlib import Path

import pytest

import tiny
from swift_mega.config import schema
from swift_mega.device.device import Device
from swift_mega.launch.torchrun import run_ranks
from swift_mega.parallel.layout import parse_layout
from swift_mega.verify import parity
from tests.pairs import kind
from tests.train.bench import Bench

ONE = schema.Parallel(distributed_optimizer=False)
STAGED = (
    "llama_tied",
    "qwen3",
    "gemma2",
    "phi",
    "mixtral",
    "deepseek_v3_moe",
    "qwen3_next",
    "gpt2",
    "falcon",
    "glm4_moe",
)
"""Families with pipeline ranks by default, two of every kind: the contents of a stage do not depend on more."""


@dataclasses.dataclass
class Benches:
    """The bench of each family, full, shared by the tests of the family. Pipelines need eight examples, others four."""

    work: Path
    cpu: Device
    staged: Container[str]
    made: dict[str, Bench] = dataclasses.field(default_factory=dict)

    def full(self, family: str) -> Bench:
        if family not in self.made:
            self.made[family] = self.make(family, "full", tiny.make(self.work / family, family))
        return self.made[family]

    def make(self, family: str, tuner: str, model: Path) -> Bench:
        examples = 8 if family in self.staged else 4
        return Bench(self.work, self.cpu, family, tuner, model=model, examples=examples, dtype="float64")


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory, cpu: Device, request: pytest.FixtureRequest) -> Benches:
    staged = tiny.FAMILIES if request.config.getoption("--full") else STAGED
    return Benches(tmp_path_factory.mktemp("every_family"), cpu, staged)


def measured(bench: Bench, *others: Bench) -> None:
    """One rank: the results of Hugging Face and of this rank, for every bench in turn."""
    for one in (bench, *others):
        one.make_reference()
        parity.measure(one.run(ONE), one.cpu, one.layout(ONE, 1), one.rows, one.folder / "single")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_one_rank_full_and_lora(benches: Benches, family: str) -> None:
    """One rank equals Hugging Face for every family, full and LoRA."""
    one = benches.full(family)
    lora = benches.make(family, "lora", one.model)
    run_ranks(1, measured, one, lora)
    for each in (one, lora):
        found = parity.compare("single", each.folder / "reference", each.folder / "single")
        assert found.logits < 1e-4 and found.loss < 2e-6 and found.gradient < 1e-5, (each.tuner, found)
        assert found.tensors > 20


CUT = [(family, layout) for family in tiny.FAMILIES for layout in ("tp2-sp", "pp2")]


@pytest.mark.parametrize(
    "family, layout",
    [pytest.param(*case, marks=pytest.mark.full) if case[1] == "pp2" and case[0] not in STAGED else case for case in CUT],
)  # fmt: skip
def test_every_family_is_cut(benches: Benches, family: str, layout: str) -> None:
    """Tensor, sequence and pipeline parallelism of every family; with experts, expert parallelism on the same ranks."""
    one = benches.full(family)
    if not (one.folder / "reference").exists():
        run_ranks(1, one.make_reference)
    name = layout
    if one.shape.experts:
        name = {"tp2-sp": "tp2-ep2-etp1-sp", "pp2": "pp2-ep2"}[layout]
    parallel, world = parse_layout(name)
    found = one.difference(layout, dataclasses.replace(parallel, distributed_optimizer=False), world)
    assert found.logits < 1e-4 and found.loss < 2e-6 and found.gradient < 1e-5, found


def test_every_kind_is_staged() -> None:
    assert {kind(family) for family in STAGED} == {kind(family) for family in tiny.FAMILIES}
