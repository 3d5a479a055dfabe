"""Which linears get an adapter: Hugging Face's names, in Megatron's fused linears, compared with PEFT's own choice."""

from pathlib import Path
from typing import Any

import pytest
import torch

from swift_mega.config import schema
from swift_mega.convert.source import Source
from swift_mega.errors import UserError
from swift_mega.models.build import ModelPart
from swift_mega.models.family import family_of
from swift_mega.models.translate import load_settings
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.layout import parse_layout, plan_layout
from swift_mega.train.build import build_part
from swift_mega.tuners.targets import check_targets, find_targets, linear_names, modules_of
from swift_mega.tuners.tuner import find_tuner
from tests import tiny

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny.make(folder / name, name) for name in ("llama", "qwen3_moe_mixed", "mixtral", "llama_bias")}


def dense_modules() -> set[str]:
    attention = {f"model.layers.{i}.self_attn.{name}" for i in range(4) for name in ATTENTION}
    return attention | {f"model.layers.{i}.mlp.{name}" for i in range(4) for name in MLP}


def test_every_linear_of_a_dense_model(models):
    """All linears but the head, which is PEFT's meaning of all-linear."""
    assert modules_of(family_of(models["llama"]), load_settings(models["llama"])) == dense_modules()


def test_biases_are_no_linears(models):
    assert modules_of(family_of(models["llama_bias"]), load_settings(models["llama_bias"])) == dense_modules()


def test_dense_and_expert_layers_each_have_their_own(models):
    """Layer 1 of qwen3_moe_mixed is dense, the others have 4 experts; the router is no target."""
    directory = models["qwen3_moe_mixed"]
    expected = {module for module in dense_modules() if ".mlp." not in module or ".1." in module}
    expected |= {f"model.layers.{i}.mlp.experts.{e}.{name}" for i in (0, 2, 3) for e in range(4) for name in MLP}
    assert modules_of(family_of(directory), load_settings(directory)) == expected
    assert linear_names(family_of(directory), load_settings(directory)) == sorted((*ATTENTION, *MLP))


def test_names_of_mixtral(models):
    assert linear_names(family_of(models["mixtral"]), load_settings(models["mixtral"])) == [
        "k_proj",
        "o_proj",
        "q_proj",
        "v_proj",
        "w1",
        "w2",
        "w3",
    ]


@pytest.mark.parametrize("name", ["llama", "llama_bias"])
def test_all_linear_is_what_peft_chooses(models, name):
    """PEFT searches the modules of the transformers model. The two choices must agree; otherwise a merged model would differ."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM")
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(models[name]), config)
    chosen = {
        key.removeprefix("base_model.model.").split(".lora_A")[0]
        for key, _ in peft.named_parameters()
        if "lora_A" in key
    }
    assert chosen == modules_of(family_of(models[name]), load_settings(models[name]))


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("llama", (), "tuner.target_modules is empty; choose all-linear, or from down_proj, gate_proj, k_proj, o_proj"),
        (
            "llama",
            ("q_proj", "query"),
            "'query' names no linear of this model; choose all-linear, or from down_proj, gate_proj",
        ),
        ("llama", ("proj",), "'proj' names no linear"),
        ("llama", ("lm_head",), "'lm_head' names no linear"),
        ("llama", ("embed_tokens",), "'embed_tokens' names no linear"),
        ("llama", ("all_linear",), "'all_linear' names no linear"),
        ("llama", ("Q_proj",), "'Q_proj' names no linear"),
        ("llama", ("layers.4.self_attn.q_proj",), "'layers.4.self_attn.q_proj' names no linear"),
        ("llama", ("self_attn",), "'self_attn' names no linear"),
        ("llama", ("linear_qkv",), "'linear_qkv' names no linear"),
        ("llama", ("q_proj", ""), "'' names no linear"),
        ("qwen3_moe_mixed", ("gate",), "'gate' names no linear"),
        ("qwen3_moe_mixed", ("layers.0.mlp.gate_proj",), "'layers.0.mlp.gate_proj' names no linear"),
        ("qwen3_moe_mixed", ("experts",), "'experts' names no linear"),
        (
            "mixtral",
            ("gate_proj",),
            "'gate_proj' names no linear of this model; choose all-linear, or from k_proj, o_proj, q_proj, v_proj, w1",
        ),
    ],
)
def test_a_name_that_chooses_nothing(models, name, targets, message):
    with pytest.raises(UserError, match=message):
        check_targets(family_of(models[name]), load_settings(models[name]), targets)


def part_of(directory: Path, layout_name: str, cpu: Any) -> ModelPart:
    parallel, world = parse_layout(layout_name)
    groups = parallel_groups.init(plan_layout(parallel, load_settings(directory).shape, world))
    run = schema.Run(parallel=parallel)
    return build_part(run, cpu, groups, dtype=torch.float32, reads_inputs=True, source=Source(directory))


def chosen(directory: Path, layout: str, asked: list[tuple[str, ...]], cpu: Any) -> list[tuple[set[str], set[str]]]:
    """In every rank: for each list of targets, the choice of `find_targets` on all ranks, and the names that the tuner then exports."""
    import torch.distributed as dist

    found = []
    for targets in asked:
        part = part_of(directory, layout, cpu)
        modules = {
            name.removesuffix(".weight")
            for target in find_targets(part, targets)
            for name, yes in zip(target.named.parts, target.parts, strict=True)
            if yes
        }
        tuner = find_tuner(schema.Lora(target_modules=targets, rank=2))
        tuner.attach(part, seed=0)
        exported = {name for named in tuner.exported(part) for name in named.parts}
        trainable = {id(p) for chunk in part.chunks for p in chunk.parameters() if p.requires_grad}
        assert trainable == {id(named.parameter) for named in tuner.exported(part)}
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (modules, exported))
        found.append((set().union(*(m for m, _ in everyone)), set().union(*(e for _, e in everyone))))
        parallel_groups.close()
    return found


DENSE = {
    ("all-linear",): dense_modules(),
    ("q_proj", "v_proj"): {f"model.layers.{i}.self_attn.{name}" for i in range(4) for name in ("q_proj", "v_proj")},
    ("k_proj",): {f"model.layers.{i}.self_attn.k_proj" for i in range(4)},
    ("gate_proj",): {f"model.layers.{i}.mlp.gate_proj" for i in range(4)},
    ("up_proj", "o_proj"): {
        f"model.layers.{i}.{name}" for i in range(4) for name in ("mlp.up_proj", "self_attn.o_proj")
    },
    ("layers.1.self_attn.q_proj",): {"model.layers.1.self_attn.q_proj"},
    ("model.layers.3.mlp.down_proj",): {"model.layers.3.mlp.down_proj"},
    ("1.self_attn.q_proj", "layers.2.mlp.up_proj"): {"model.layers.1.self_attn.q_proj", "model.layers.2.mlp.up_proj"},
    ("self_attn.q_proj", "q_proj", "all-linear"): dense_modules(),
}
EXPERTS = {
    ("gate_proj",): {"model.layers.1.mlp.gate_proj"}
    | {f"model.layers.{i}.mlp.experts.{e}.gate_proj" for i in (0, 2, 3) for e in range(4)},
    ("experts.3.down_proj",): {f"model.layers.{i}.mlp.experts.3.down_proj" for i in (0, 2, 3)},
    ("layers.2.mlp.experts.0.up_proj", "q_proj"): {"model.layers.2.mlp.experts.0.up_proj"}
    | {f"model.layers.{i}.self_attn.q_proj" for i in range(4)},
}


@pytest.mark.parametrize(
    ("name", "layout", "cases"),
    [
        ("llama", "single", DENSE),
        ("llama", "tp2-sp", DENSE),
        ("llama", "pp2", DENSE),
        ("qwen3_moe_mixed", "single", EXPERTS),
        ("qwen3_moe_mixed", "ep2", EXPERTS),
    ],
)
def test_only_the_chosen_parts_of_fused_linears_get_factors(ranks, cpu, models, name, layout, cases):
    """Also on a rank or a stage without any of the chosen linears. The exported parameters are the trained ones."""
    found = ranks(1 if layout == "single" else 2, chosen, models[name], layout, list(cases), cpu)
    for (targets, expected), (modules, exported) in zip(cases.items(), found, strict=True):
        assert modules == expected, targets
        assert exported == {f"base_model.model.{module}.lora_{letter}.weight" for module in expected for letter in "AB"}
