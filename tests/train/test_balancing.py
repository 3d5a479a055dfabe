"""The losses of routers: transformers' load_balancing_loss_func against one rank, and one rank's gradients against every layout.

Three microbatches of two examples, with some untrained tokens and some padding: these are the cases where Megatron's own factors are
wrong.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from swift_mega.config import schema
from swift_mega.convert.files.hf_files import Checkpoint
from swift_mega.convert.save import write_directory
from swift_mega.data.pack import Example, Microbatch, collate
from swift_mega.device.device import Device
from swift_mega.errors import UserError
from swift_mega.export.merged import merge
from swift_mega.launch.torchrun import run_ranks
from swift_mega.models.modules.balancing import balancing_fields
from swift_mega.models.translate import load_settings
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.layout import parse_layout, plan_layout
from swift_mega.train.step import read_router_losses, run_schedule
from swift_mega.train.wire import build_training
from swift_mega.tuners.lora_files import read_adapter
from swift_mega.verify import parity, transformers_side

BALANCE, Z = 0.7, 0.03
FAMILIES = ("mixtral", "qwen2_moe_mixed", "granitemoe", "gpt_oss", "minimax_m2", "ernie4_5_moe", "deepseek_v3_moe")
LAYOUTS = (
    "tp2-cp2-etp1-sp",
    "tp2-pp2-etp1-sp",
    "pp2-vpp2-ep2",
    "tp2-ep2-etp2-dp2-sp",
    "cp2-ulysses-dp2",
    "cp2-allgather-ep2",
)


def examples() -> list[Example]:
    """Eight examples: the answer is trained, and one example has no trained token."""
    draw, made = np.random.default_rng(3), []
    for number in range(8):
        length = int(draw.integers(6, 20))
        trained = np.arange(length) >= length - number % 4
        made.append(Example(tokens=draw.integers(0, 131, length).astype(np.int32), trained=trained))
    return made


def microbatches(pad_to: int, pad_each: int) -> list[Microbatch]:
    made = examples()
    return [collate(made[n : n + 2], pad_to, pad_each=pad_each) for n in range(0, len(made), 2)]


def recipe(model: Path, parallel: schema.Parallel, more: dict[str, Any] | None = None, **train: Any) -> schema.Run:
    return schema.Run(
        model=schema.Model(
            path=str(model), router_aux_loss_coefficient=BALANCE, megatron={"moe_z_loss_coeff": Z, **(more or {})}
        ),
        parallel=dataclasses.replace(parallel, distributed_optimizer=False),
        tuner=schema.Full(),
        train=schema.Train(**train),
    )


def measure(device: Device, runs: Sequence[tuple[schema.Run, Path]], world: int) -> list[dict[str, float]]:
    """One rank: writes each run's gradients, and returns its loss and router losses."""
    found = []
    for run, output in runs:
        assert run.model.path is not None
        layout = plan_layout(run.parallel, load_settings(run.model.path).shape, world)
        groups = parallel_groups.init(layout, seed=1)
        try:
            training = build_training(run, device, groups, steps=1)
            each = layout.mesh.example_multiple
            rows = microbatches(max(8, layout.row_multiple), each)[groups.coordinate.data :: layout.data]
            for chunk in training.chunks:
                chunk.zero_grad_buffer()
            loss = run_schedule(training, rows, forward_only=False).loss
            found.append({"loss": loss, **read_router_losses(training, rows)})
            trained = [named for named in training.tuner.exported(training.part) if named.parameter.requires_grad]
            write_directory(
                training.part,
                groups,
                output / "gradients",
                trained,
                dtypes=torch.float32,
                max_shard_bytes=1 << 40,
                companions=lambda staging: None,
                overwrite=True,
                value=parity._gradient,
            )
        finally:
            parallel_groups.close()
    return found


def oracle(model: Path, *, by_paper: bool = False) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients and losses of transformers. by_paper: for a type without balancing loss in transformers, after arXiv:2412.19437 eq. 17
    to 20."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    network = transformers_side.network_of(model, None, torch.float32)
    config = load_settings(model).megatron
    experts, top_k = config["num_moe_experts"], config["moe_router_topk"]
    rows = examples()
    pairs, count = [rows[n : n + 2] for n in range(0, len(rows), 2)], sum(row.targets for row in rows)
    found, total = {"loss": 0.0, "load_balancing_loss": 0.0, "z_loss": 0.0}, torch.zeros(())
    for pair in pairs:
        longest = max(map(len, pair))
        tokens, mask = torch.zeros(2, longest, dtype=torch.long), torch.zeros(2, longest, dtype=torch.long)
        labels = torch.full((2, longest), -100)
        for place, row in enumerate(pair):
            tokens[place, : len(row)], mask[place, : len(row)] = torch.from_numpy(row.tokens).long(), 1
            labels[place, : len(row)][torch.from_numpy(row.trained)] = torch.from_numpy(row.tokens[row.trained]).long()
        out = network(input_ids=tokens, attention_mask=mask, output_router_logits=True, use_cache=False)
        loss = torch.nn.functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        real, balance, z = mask.flatten().bool(), torch.zeros(()), torch.zeros(())
        for logits in out.router_logits:
            logits = logits.reshape(-1, experts).float()
            if by_paper:
                shares = logits[real].sigmoid() / logits[real].sigmoid().sum(-1, keepdim=True)
                chosen = torch.zeros_like(shares).scatter(1, shares.topk(top_k).indices, 1.0)
                balance = balance + experts / top_k * (chosen.mean(0) * shares.mean(0)).sum()
            else:
                balance = balance + load_balancing_loss_func((logits,), experts, top_k, mask) / top_k
            z = z + logits[real].logsumexp(-1).square().mean()
        total = total + loss / count + (BALANCE * balance + Z * z) / len(pairs)
        parts = (loss / count, *(one / len(pairs) / len(out.router_logits) for one in (balance, z)))
        found = {name: found[name] + float(part.detach()) for name, part in zip(found, parts, strict=True)}
    total.backward()
    return parity._model_gradients(network), found


def equal(want: dict[str, Tensor], found: Path, line: float = 1e-5) -> None:
    have = Checkpoint(found / "gradients")
    assert want.keys() == have.entries.keys()
    for name, gradient in want.items():
        difference = (have.read(name) - gradient).abs().max() / gradient.abs().max().clamp(min=1e-8)
        assert difference < line, (name, float(difference))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("balancing")


@pytest.fixture(scope="module")
def one(work: Path, cpu: Device) -> dict[str, dict[str, float]]:
    """One rank's losses by family, and those of an adapter. The gradients are in work/NAME."""
    runs = [(recipe(tiny.make(work / f"{name}-model", name), schema.Parallel()), work / name) for name in FAMILIES]
    adapter = recipe(work / "mixtral-model", schema.Parallel())
    adapter = dataclasses.replace(adapter, tuner=schema.Lora(rank=4, alpha=8.0))
    again = dataclasses.replace(adapter, model=dataclasses.replace(adapter.model, adapters=(str(work / "adapter"),)))
    losses = run_ranks(1, measure_one, cpu, adapter, work / "adapter", [*runs, (again, work / "lora")])
    return dict(zip([*FAMILIES, "lora"], losses, strict=True))


def measure_one(device: Device, adapter: schema.Run, where: Path, runs: Sequence[tuple[schema.Run, Path]]) -> Any:
    alone = plan_layout(schema.Parallel(), load_settings(adapter.model.path or "").shape, 1)
    parity.random_adapter(adapter, device, alone, where)
    return measure(device, runs, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_rank_is_transformers(work: Path, one: dict[str, dict[str, float]], family: str) -> None:
    gradients, losses = oracle(work / f"{family}-model", by_paper=family.startswith("deepseek"))
    assert one[family] == pytest.approx(losses, rel=1e-5)
    equal(gradients, work / family)


def test_adapters_see_it_through_a_frozen_router(work: Path, one: dict[str, dict[str, float]]) -> None:
    """The gradient of the balancing loss reaches the factors below the router, as in transformers: dA = s B^T dW, dB = s dW A^T."""
    merge(work / "mixtral-model", work / "adapter", work / "merged")
    gradients, losses = oracle(work / "merged")
    assert one["lora"] == pytest.approx(losses, rel=1e-5)
    equal(parity._chain_rule(read_adapter(work / "adapter"), gradients), work / "lora")


def test_layouts_are_one_rank(work: Path, cpu: Device, one: dict[str, dict[str, float]]) -> None:
    model, want = work / "qwen2_moe_mixed-model", one["qwen2_moe_mixed"]
    runs = [(recipe(model, parse_layout(name)[0]), work / name) for name in LAYOUTS]
    runs += [
        (recipe(model, parse_layout("tp2-pp2-etp1-sp")[0], recompute="full"), work / "full"),
        (
            recipe(model, parse_layout("pp2-dp2")[0], {"recompute_modules": ["moe"]}, recompute="selective"),
            work / "moe",
        ),
    ]
    for losses in run_ranks(4, measure, cpu, runs, 4):
        assert losses == pytest.approx(want, rel=1e-5)
    whole = Checkpoint(work / "qwen2_moe_mixed" / "gradients")
    for _, output in runs:
        equal({name: whole.read(name) for name in whole.entries}, output)


@pytest.mark.parametrize(
    "coefficient, given, experts, said",
    [
        (0.1, {}, False, "router_aux_loss_coefficient=0.1: this model has no experts"),
        (0.0, {"moe_z_loss_coeff": 0.1}, False, "moe_z_loss_coeff=0.1: this model has no experts"),
        (-1.0, {}, True, "router_aux_loss_coefficient=-1.0: expected a number of at least 0"),
        (0.0, {"moe_aux_loss_coeff": [0.1]}, True, r"moe_aux_loss_coeff=\[0.1\]: expected a number"),
        (0.1, {"moe_aux_loss_coeff": 0.2}, True, "=0.1 and model.megatron.moe_aux_loss_coeff=0.2 are one setting"),
        (0.1, {"moe_router_load_balancing_type": "seq_aux_loss"}, True, "'seq_aux_loss': what it balances depends on"),
        (0.1, {"moe_router_load_balancing_type": "none"}, True, "'none' excludes the balancing loss"),
        (0.0, {"moe_router_load_balancing_type": "aux_loss"}, True, "'aux_loss' without a coefficient has no effect"),
    ],
)
def test_settings_that_contradict(coefficient: float, given: dict[str, Any], experts: bool, said: str) -> None:
    with pytest.raises(UserError, match=said):
        balancing_fields(coefficient, given, experts=experts)


def test_two_names_of_the_coefficient() -> None:
    both = balancing_fields(0.1, {}, experts=True)
    assert both == balancing_fields(0.0, {"moe_aux_loss_coeff": 0.1}, experts=True)
    assert both == {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1}
    assert balancing_fields(0.0, {}, experts=False) == {}
