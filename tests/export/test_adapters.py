"""From any layout, PEFT loads every tensor of an exported adapter, and computes what Megatron computes.

The oracle is PEFT over transformers: its load report, its logits, and its own merge.
"""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from swift_mega import api
from swift_mega.config import schema
from swift_mega.export.checkpoint import save_checkpoint
from swift_mega.models.translate import load_settings
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.layout import parse_layout, plan_layout
from swift_mega.train.wire import build_training
from swift_mega.verify import parity
from tests import tiny

ROWS = parity.example_rows(131, examples=8, longest=16)
TOLERANCE = 1e-4
Logits = dict[int, Tensor]


def run_of(model: Path, *adapters: Path, **tuner: Any) -> schema.Run:
    return schema.Run(
        model=schema.Model(path=str(model), dtype="float32", adapters=tuple(map(str, adapters))),
        tuner=schema.Lora(**{"rank": 4, "alpha": 8.0, **tuner}),
    )


def in_layout(name: str, run: schema.Run) -> tuple[schema.Run, Any]:
    parallel, world = parse_layout(name)
    run = dataclasses.replace(run, parallel=dataclasses.replace(parallel, distributed_optimizer=False))
    return run, plan_layout(parallel, load_settings(str(run.model.path)).shape, world)


def export_and_logits(run: schema.Run, layout: Any, output: Path, cpu: Any, rows: list[list[int]]) -> Logits:
    """In every rank: builds the run, writes its adapter to `output`, and returns Megatron's logits of every row (without rows: none)."""
    groups = parallel_groups.init(layout, seed=run.train.seed)
    training = build_training(run, cpu, groups, steps=1)
    save_checkpoint(
        training.tuner,
        training.part,
        groups,
        output,
        source=str(run.model.path),
        max_shard_size="5GB",
        dtype=torch.float32,
    )
    found: Logits = {}
    if rows:
        where = groups.coordinate
        collected = parity.collect_logits(training, parity.microbatches(rows, layout, where.data))
        if groups.is_last_stage and where.tensor == 0:
            for number, examples in enumerate(collected):
                for place, value in enumerate(examples[:2]):
                    found[2 * (where.data + layout.data * number) + place] = value.clone()
    everyone: list[Logits] = [{} for _ in range(layout.world)]
    dist.all_gather_object(everyone, found)
    parallel_groups.close()
    return {number: value for part in everyone for number, value in part.items()}


def through_transformers(network: Any) -> Logits:
    with torch.no_grad():
        return {n: network(input_ids=torch.tensor(row)[None], use_cache=False).logits[0] for n, row in enumerate(ROWS)}


def largest(a: Logits, b: Logits) -> float:
    assert a.keys() == b.keys() == set(range(len(ROWS)))
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def base(model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def with_peft(model: Path, adapter: Path) -> Any:
    """The base with the adapter, after PEFT reported no unused and no missing tensor."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|not found).*adapter.*")
        network = PeftModel.from_pretrained(base(model), str(adapter))
        report = network.load_adapter(str(adapter), adapter_name="once_more")
    assert report.missing_keys == [] and report.unexpected_keys == []
    network.set_adapter("default")
    return network.eval()


CASES = [
    ("llama", ("single", "tp2-sp", "pp2"), {}),
    ("qwen2", ("tp2", "pp2"), {"target_modules": ("q_proj", "v_proj", "gate_proj", "down_proj")}),
    ("qwen3", ("tp2-sp", "pp2"), {"rslora": True}),
    ("llama_bias", ("tp2",), {"target_modules": ("layers.1.self_attn.q_proj", "o_proj")}),
    ("qwen3_moe", ("single", "ep2"), {}),
    ("mixtral", ("tp2-ep2-etp2-sp", "ep2"), {}),
    ("gpt2", ("tp2-sp", "pp2"), {}),
    ("falcon_new", ("tp2-sp",), {}),
    ("bloom_six_heads", ("pp2",), {}),
    # more tensor ranks than key heads: some ranks have no row of a key
    ("llama_4_1", ("tp2-sp", "tp4", "tp2-pp2"), {}),
    ("qwen3_4_2", ("tp4-sp",), {"target_modules": ("k_proj", "o_proj")}),
    ("phi3_4_1", ("tp4",), {}),
]


@pytest.mark.parametrize(("name", "layouts", "tuner"), CASES, ids=[case[0] for case in CASES])
def test_peft_computes_what_megatron_computes(ranks, cpu, tmp_path, name, layouts, tuner):
    """A random adapter, loaded in each layout and exported again, gives the same file. The logits of PEFT, of the merged model and of
    PEFT's merged model are all within 1e-4 of Megatron's, and far from the base model's."""
    model = tiny.make(tmp_path / "hf", name)
    adapter = tmp_path / "adapter"
    run, layout = in_layout("single", run_of(model, **tuner))
    ranks(1, parity.random_adapter, run, cpu, layout, adapter)
    peft = with_peft(model, adapter)
    expected, plain = through_transformers(peft), through_transformers(base(model))
    assert largest(expected, plain) > 0.01, "the adapter does nothing, so nothing is tested"

    for layout_name in layouts:
        run, layout = in_layout(layout_name, run_of(model, adapter, **tuner))
        logits = ranks(layout.world, export_and_logits, run, layout, tmp_path / layout_name, cpu, ROWS)
        assert largest(logits, expected) < TOLERANCE, layout_name
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / layout_name / file).read_bytes() == (adapter / file).read_bytes(), layout_name
        assert sorted(path.name for path in (tmp_path / layout_name).iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
            "report.json",
        ]

    api.export(model=str(model), adapters=str(adapter), output=str(tmp_path / "merged"))
    merged = base(tmp_path / "merged")
    assert largest(through_transformers(merged), expected) < TOLERANCE
    theirs = peft.merge_and_unload().state_dict()
    ours = merged.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=2e-6)


LAYOUTS = {
    "llama": ("tp2", "tp4", "tp2-pp2-sp", "pp2-vpp2", "dp2"),
    "qwen3_moe_mixed": ("ep2", "tp2-ep2-etp1-sp", "tp2-ep2-etp2-sp", "pp2-ep2"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_initial_values_do_not_depend_on_the_layout(ranks, cpu, tmp_path, name):
    """Byte for byte the file of one rank; another seed gives another file."""
    model = tiny.make(tmp_path / "hf", name)
    for layout_name in ("single", *LAYOUTS[name]):
        run, layout = in_layout(layout_name, run_of(model))
        ranks(layout.world, export_and_logits, run, layout, tmp_path / layout_name, cpu, [])
    one = (tmp_path / "single" / "adapter_model.safetensors").read_bytes()
    for layout_name in LAYOUTS[name]:
        assert (tmp_path / layout_name / "adapter_model.safetensors").read_bytes() == one, layout_name
    run = dataclasses.replace(run_of(model), train=schema.Train(seed=7))
    run, layout = in_layout("single", run)
    ranks(1, export_and_logits, run, layout, tmp_path / "seed7", cpu, [])
    assert (tmp_path / "seed7" / "adapter_model.safetensors").read_bytes() != one


def test_initial_values_are_pefts_distribution(ranks, cpu, tmp_path):
    """A: uniform within 1/sqrt(in), different in each module. B: zero, so that training starts from the base model."""
    model = tiny.make(tmp_path / "hf", "llama", hidden_size=128, intermediate_size=256)
    run, layout = in_layout("single", run_of(model, rank=16))
    ranks(1, export_and_logits, run, layout, tmp_path / "out", cpu, [])
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    downs = {name: value for name, value in tensors.items() if "lora_A" in name}
    assert all(not value.any() for name, value in tensors.items() if "lora_B" in name) and len(downs) == 28
    for value in downs.values():
        bound = value.shape[1] ** -0.5
        assert float(value.abs().max()) <= bound and abs(float(value.std()) - bound / 3**0.5) < 0.05 * bound
        assert abs(float(value.mean())) < 0.1 * bound
    flat = [tuple(value.flatten()[:8].tolist()) for value in downs.values()]
    assert len(set(flat)) == len(flat)


def test_the_config_is_what_peft_reads(ranks, cpu, tmp_path):
    from peft import PeftConfig

    model = tiny.make(tmp_path / "hf", "qwen2")
    run, layout = in_layout(
        "tp2", run_of(model, rank=3, alpha=5.0, rslora=True, dropout=0.25, target_modules=("k_proj", "up_proj"))
    )
    ranks(2, export_and_logits, run, layout, tmp_path / "out", cpu, [])
    config = PeftConfig.from_pretrained(tmp_path / "out")
    assert (config.r, config.lora_alpha, config.use_rslora, config.lora_dropout) == (3, 5.0, True, 0.25)
    assert config.target_modules == {"k_proj", "up_proj"} and config.bias == "none" and config.inference_mode
    assert config.task_type == "CAUSAL_LM" and config.base_model_name_or_path == str(model.resolve())
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA"
