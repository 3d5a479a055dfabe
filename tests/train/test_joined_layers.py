"""Dropout and recomputed modules, in layers whose parts are joined by our code and in Megatron's own; the oracles are transformers and
runs without them."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from swift_mega.config import schema
from swift_mega.device.device import Device
from swift_mega.launch.torchrun import run_ranks
from swift_mega.models.translate import load_settings
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.layout import parse_layout, plan_layout
from swift_mega.train.step import run_schedule
from swift_mega.train.wire import Training, build_training
from swift_mega.verify import parity

PLAIN = ("llama", "starcoder2")
JOINED = ("gemma2", "glm4", "cohere", "granite", "falcon_new", "phi")
RECOMPUTED = ("llama", "starcoder2", "gemma2", "cohere", "phi", "falcon_new")
"""Megatron's layer; with biases; with norms after the branches; parallel branches with one norm for both; the same with biases; and
with a norm each."""
RATE = 0.25


def recipe(
    model: Path, parallel: schema.Parallel, megatron: dict[str, Any], tuner: str = "full", **train: Any
) -> schema.Run:
    return schema.Run(
        model=schema.Model(path=str(model), megatron=megatron),
        train=schema.Train(**train),
        tuner=schema.Lora() if tuner == "lora" else schema.Full(),
        parallel=dataclasses.replace(parallel, distributed_optimizer=False),
    )


def built(run: schema.Run, device: Device, world: int) -> Training:
    assert run.model.path is not None
    layout = plan_layout(run.parallel, load_settings(run.model.path).shape, world)
    return build_training(run, device, parallel_groups.init(layout, seed=1), steps=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    work = tmp_path_factory.mktemp("joined")
    return {name: tiny.make(work / name, name) for name in (*PLAIN, *JOINED)}


# ------------------------------------------------------------------------------------------------ dropout


def test_dropout(models: dict[str, Path], tmp_path: Path, cpu: Device) -> None:
    dropped = {
        "phi": {"resid_pdrop": RATE, "embd_pdrop": RATE},
        "starcoder2": {"residual_dropout": RATE, "embedding_dropout": RATE},
    }
    theirs = {name: tiny.make(tmp_path / name, name) for name in dropped}
    for name, shares in run_ranks(1, dropouts, cpu, models, theirs, dropped).items():
        for share in shares:
            assert abs(share - RATE) < 0.05, (name, share)


def dropouts(
    device: Device, models: dict[str, Path], theirs: dict[str, Path], fields: dict[str, dict[str, float]]
) -> Any:
    found = {
        name: branches(built(recipe(model, schema.Parallel(), {"hidden_dropout": RATE}), device, 1))
        for name, model in models.items()
    }
    for name, model in theirs.items():
        same_as_transformers(
            built(recipe(model, schema.Parallel(), {"hidden_dropout": RATE}), device, 1), model, fields[name]
        )
    return found


def branches(training: Training) -> list[float]:
    """The shares of zeros in the outputs of attention and of the MLP. The other values are 1 / (1 - rate) times the output without
    dropout."""
    layer, shares = training.part.chunks[0].decoder.layers[0], []
    for silent in (layer.mlp.linear_fc2, layer.self_attention.linear_proj):
        kept = [(parameter, parameter.detach().clone()) for parameter in silent.parameters()]
        with torch.no_grad():
            for parameter, _ in kept:
                parameter.zero_()
            x = torch.randn(40, 1, layer.config.hidden_size)
            added = {}
            for training_now in (False, True):
                layer.train(training_now)
                added[training_now] = layer_of(layer, training, x) - x
            for parameter, value in kept:
                parameter.copy_(value)
        left = added[True].abs() > 1e-9
        torch.testing.assert_close(added[True][left], added[False][left] / (1 - RATE), rtol=1e-3, atol=1e-5)
        shares.append(float((~left).float().mean()))
    parallel_groups.close()
    return shares


def layer_of(layer: Any, training: Training, x: Tensor) -> Tensor:
    from swift_mega.models.modules.attention import segments

    positions, bounds = torch.arange(len(x)), torch.tensor([0, len(x)], dtype=torch.int32)
    row = segments(training.part.settings, positions, bounds, torch.float32, None)
    result: Tensor = layer(hidden_states=x, attention_mask=None, packed_seq_params=row)[0]
    return result


def same_as_transformers(training: Training, model: Path, fields: dict[str, float]) -> None:
    """With one seed, one order of random draws (embedding, attention, MLP) and one mask for each, hidden states equal transformers' in
    training."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model, **fields)
    network = AutoModelForCausalLM.from_pretrained(model, config=config).train()
    tokens = torch.arange(5, 35)
    chunk = training.part.chunks[0]
    chunk.train()
    with torch.no_grad():
        torch.manual_seed(7)
        want = network.base_model(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
        torch.manual_seed(7)
        found = chunk(tokens, torch.arange(30), torch.tensor([0, 30], dtype=torch.int32))[:, 0]
    torch.testing.assert_close(found, want, rtol=0, atol=1e-4)
    parallel_groups.close()


# ------------------------------------------------------------------------------------------------ recomputation


def test_recomputed_modules(models: dict[str, Path], tmp_path: Path, cpu: Device) -> None:
    """With dropout, over two ranks that share tokens: each module runs twice, and gradients have the same bits."""
    for name, calls in run_ranks(2, recomputed, cpu, models).items():
        assert calls == {"mlp": (2, 4), "layernorm": (2, 4)}, (name, calls)


def recomputed(device: Device, models: dict[str, Path]) -> dict[str, dict[str, tuple[int, int]]]:
    parallel, _ = parse_layout("tp2-sp")
    found = {}
    for tuner, name in [*(("full", name) for name in RECOMPUTED), ("lora", "gemma2")]:
        model = models[name]
        plain = recipe(model, parallel, {"hidden_dropout": RATE}, tuner)
        chosen = {"hidden_dropout": RATE, "recompute_modules": ["mlp", "layernorm"]}
        want, once = step(built(plain, device, 2))
        have, twice = step(built(recipe(model, parallel, chosen, tuner, recompute="selective"), device, 2))
        for key, gradient in want.items():
            assert torch.equal(have[key], gradient), (name, key)
        found[f"{name}-{tuner}"] = {part: (once[part], twice[part]) for part in once}
    return found


def step(training: Training) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Gradients of two microbatches, and how often the first layer's MLP and first norm ran."""
    layer, calls = training.part.chunks[0].decoder.layers[0], {"mlp": 0, "layernorm": 0}
    for part, module in (("mlp", layer.mlp), ("layernorm", layer.input_layernorm)):
        module.register_forward_pre_hook(lambda *_, part=part: calls.__setitem__(part, calls[part] + 1))
    rows = parity.microbatches(parity.example_rows(131, examples=4), training.groups.layout, 0)
    for chunk in training.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    run_schedule(training, rows, forward_only=False)
    gradients = {name: p.main_grad.clone() for name, p in training.part.chunks[0].named_parameters() if p.requires_grad}
    parallel_groups.close()
    return gradients, calls
