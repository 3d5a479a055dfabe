"""A model whose MLPs and norms are computed in tiles of tokens gives the same loss and gradients, in every layout."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import random

import tiny
from swift_mega.config import schema
from swift_mega.device.device import Device
from swift_mega.errors import UserError
from swift_mega.launch.torchrun import run_ranks
from swift_mega.models.modules.tiles import TiledNorm, check_tiles, tile_size
from swift_mega.models.translate import load_settings
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.layout import parse_layout, plan_layout
from swift_mega.train.wire import build_training
from swift_mega.verify import parity
from tests.largest import Largest
from tests.pairs import both_tuners, covering, kind, of_layouts

ONE = schema.Parallel(distributed_optimizer=False)
TILE = 5  # rows have 5 to 48 tokens: several tiles, and a short last one
CASES = [
    *(("llama", layout) for layout in ("single", "tp2-sp", "tp2", "tp2-pp2-sp", "cp2", "dp2")),
    *(("gpt2", layout) for layout in ("single", "tp2-sp")),  # biases
    ("apertus", "tp2"),  # an activation with parameters
    ("gemma2", "tp2-sp"),  # norms after MLP and attention
    ("falcon", "tp2"),  # MLP parallel to attention
    ("cohere", "tp2-sp"),  # the same, without RMSNorm
    *(("deepseek_v3_moe", layout) for layout in ("single", "tp2-ep2-etp1-sp")),  # dense layers, shared experts, latents
    *(("qwen2_moe", layout) for layout in ("ep2", "tp2-ep2-etp2-sp")),  # a gate on the shared experts
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiles")


def run_of(
    work: Path,
    family: str,
    tuner: str,
    parallel: schema.Parallel,
    *,
    bare: bool = False,
    megatron: Any = None,
    **train: Any,
) -> schema.Run:
    """bare: without the initial values of an adapter."""
    model = work / family
    if not model.exists():
        tiny.make(model, family, num_hidden_layers=2)
    adapter = work / f"{family}-adapter"
    run = schema.Run(
        model=schema.Model(path=str(model), dtype="float64", megatron=megatron or {}),
        parallel=parallel,
        train=schema.Train(**train),
        tuner=schema.Lora(rank=4, alpha=8.0) if tuner == "lora" else schema.Full(),
    )
    return (
        run
        if tuner == "full" or bare
        else dataclasses.replace(run, model=dataclasses.replace(run.model, adapters=(str(adapter),)))
    )


def measure(work: Path, cpu: Device, name: str, run: schema.Run, world: int) -> Path:
    """Loss and gradients, once for each name."""
    output = work / name
    if not output.exists():
        assert run.model.path is not None
        shape = load_settings(run.model.path).shape
        if run.model.adapters and not Path(run.model.adapters[0]).exists():
            bare = dataclasses.replace(
                run, model=dataclasses.replace(run.model, adapters=()), parallel=ONE, train=schema.Train()
            )
            run_ranks(1, parity.random_adapter, bare, cpu, plan_layout(ONE, shape, 1), Path(run.model.adapters[0]))
        rows = parity.example_rows(shape.vocab, examples=8)
        run_ranks(world, parity.measure, run, cpu, plan_layout(run.parallel, shape, world), rows, output)
    return output


def check(work: Path, cpu: Device, family: str, tuner: str, layout: str, *, name: str = "", **train: Any) -> None:
    parallel, world = parse_layout(layout)
    parallel = dataclasses.replace(parallel, distributed_optimizer=False)
    if parallel.tensor * parallel.pipeline * parallel.context * parallel.expert < world:
        parallel = dataclasses.replace(parallel, overlap_grad_reduce=True, ddp_bucket_size=500)
    want = measure(work, cpu, f"{family}-{tuner}-{layout}", run_of(work, family, tuner, parallel), world)
    given = {"tile_mlp": True, "mlp_tile_size": TILE} | train
    have = measure(work, cpu, f"{want.name}-tiled{name}", run_of(work, family, tuner, parallel, **given), world)
    found = parity.compare(layout, want, have)
    assert found.logits < 1e-10 and found.loss < 1e-10 and found.gradient < 1e-10, found
    assert found.tensors > 10


@pytest.mark.parametrize("family, layout, tuner", covering(both_tuners(CASES), of_layouts(kind)))
def test_tiles_change_nothing(work: Path, cpu: Device, family: str, layout: str, tuner: str) -> None:
    """Loss and every gradient with tiles equal those without, in float64; also with data ranks and overlapped communication in small
    buckets."""
    check(work, cpu, family, tuner, layout)


@pytest.mark.parametrize("layout", ["tp2-sp", "tp2-pp2-sp"])
def test_with_recomputed_layers(work: Path, cpu: Device, layout: str) -> None:
    """Tiles in a layer that is itself recomputed."""
    check(work, cpu, "llama", "full", layout, name="-full", recompute="full")


def test_with_inputs_of_layers_on_the_host(work: Path, cpu: Device) -> None:
    """Tiles in a recomputed layer whose input was copied to the host and back."""
    check(work, cpu, "llama", "full", "tp2-sp", name="-offload", recompute="full", offload_activations=True)


@pytest.mark.parametrize("family, module", [("llama", "mlp"), ("qwen2_moe", "shared_experts")])
def test_with_recomputed_modules(work: Path, cpu: Device, family: str, module: str) -> None:
    """Megatron's own recomputation of an MLP, with tiles inside."""
    layout = "tp2-sp" if family == "llama" else "ep2"
    megatron = {"recompute_modules": [module]}
    check(work, cpu, family, "lora", layout, name=f"-{module}", recompute="selective", megatron=megatron)


def built(
    work: Path, cpu: Device, family: str, layout: str, tuner: str = "full", dropout: float = 0.0, **train: Any
) -> Any:
    """In a rank: the training of a run, and its groups."""
    parallel, world = parse_layout(layout)
    run = run_of(
        work, family, tuner, dataclasses.replace(parallel, distributed_optimizer=False), tile_mlp=True, **train
    )
    if dropout:
        run = dataclasses.replace(run, tuner=dataclasses.replace(run.tuner, dropout=dropout))
    groups = parallel_groups.init(plan_layout(parallel, load_settings(work / family).shape, world), seed=1)
    return build_training(run, cpu, groups, steps=1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe"])
def test_what_a_layer_keeps(work: Path, cpu: Device, ranks: Any, family: str) -> None:
    """Only input and normalised input are kept. No tensor is larger than these, forward or backward."""
    tiny.make(work / f"{family}-kept", family)
    ranks(1, keeps_two_tensors, work, cpu, f"{family}-kept")


def keeps_two_tensors(work: Path, cpu: Device, family: str) -> None:
    layer = built(work, cpu, family, "single", mlp_tile_size=8).part.chunks[0].decoder.layers[0]
    mlp = getattr(layer.mlp, "shared_experts", layer.mlp)
    hidden = mlp.config.hidden_size
    for tokens in (64, 256):
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        x = torch.randn(tokens, 1, hidden, dtype=torch.float64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), Largest() as largest:
            out = mlp(layer.pre_mlp_layernorm(x))
        with largest:
            (out if isinstance(out, torch.Tensor) else out[0]).sum().backward()
        assert sorted(kept.values()) == [tokens * hidden] * 2
        weights = max(parameter.numel() for parameter in mlp.parameters())
        assert largest.numbers <= max(tokens * hidden, weights)
    assert tokens * hidden > weights and isinstance(layer.pre_mlp_layernorm, TiledNorm)
    assert (x.grad != 0).all()


@pytest.mark.parametrize("layout", ["single", "tp2-sp"])
def test_dropout_is_the_same_when_a_tile_is_computed_again(work: Path, cpu: Device, ranks: Any, layout: str) -> None:
    """The recomputed tile drops the same numbers as in the forward pass, and later random numbers are as if nothing was recomputed."""
    tiny.make(work / f"llama-{layout}", "llama")
    ranks(parse_layout(layout)[1], drops_the_same, work, cpu, f"llama-{layout}", layout)


def drops_the_same(work: Path, cpu: Device, family: str, layout: str) -> None:
    training = built(work, cpu, family, layout, "lora", 0.5, bare=True, mlp_tile_size=4)
    mlp = training.part.chunks[0].decoder.layers[1].mlp.train()
    for name, parameter in mlp.named_parameters():
        if ".up_" in name:
            torch.nn.init.normal_(parameter)
    trained = [parameter for parameter in mlp.parameters() if parameter.requires_grad]
    x = torch.randn(10, 1, mlp.config.hidden_size, dtype=torch.float64, requires_grad=True)
    *before, named = random._get_all_rng_states()
    found = []
    for way in (lambda: mlp(x)[0], lambda: torch.cat([mlp._tile(piece) for piece in x.split(4)])):
        random._set_all_rng_states(*before, dict(named))
        out = way()
        drawn = torch.rand(3)
        gradients = torch.autograd.grad(out, [x, *trained], torch.ones_like(out))
        found.append([out.detach(), *gradients, drawn, torch.rand(3)])
    for number, (tiled, plain) in enumerate(zip(*found, strict=True)):
        torch.testing.assert_close(tiled, plain, rtol=0, atol=1e-11, msg=lambda m, n=number: f"{n}: {m}")
    random._set_all_rng_states(*before, dict(named))
    first = mlp(x)[0]
    assert not torch.equal(first, mlp(x)[0]), "nothing is dropped"


@pytest.mark.parametrize(
    ("family", "megatron", "message"),
    [
        ("mixtral", {}, "train.tile_mlp=true: every MLP of this model is routed experts"),
        ("llama", {"fp8": "hybrid"}, "train.tile_mlp=true with model.megatron.fp8=hybrid: Transformer Engine counts the calls"),
        ("llama", {"tp_comm_overlap": True}, "train.tile_mlp=true with model.megatron.tp_comm_overlap=True: its buffers"),
    ],
)  # fmt: skip
def test_what_cannot_be_tiled_is_refused(work: Path, family: str, megatron: dict[str, Any], message: str) -> None:
    """Refused before ranks start; without tile_mlp there is no message."""
    model = load_settings(tiny.make(work / f"{family}-refused", family))
    with pytest.raises(UserError) as caught:
        check_tiles(model, schema.Train(tile_mlp=True), megatron)
    assert str(caught.value).startswith(message)
    assert check_tiles(model, schema.Train(), megatron) is None


def test_what_is_left_out_is_said(work: Path) -> None:
    """With routed experts, only dense MLPs and shared experts are tiled."""
    some = load_settings(tiny.make(work / "deepseek-note", "deepseek_v3_moe"))
    note = check_tiles(some, schema.Train(tile_mlp=True), {})
    assert (
        note is not None
        and f"not the routed experts of {sum(some.moe_layers)} of {len(some.moe_layers)} layers" in note
    )
    dense = load_settings(tiny.make(work / "llama-note", "llama"))
    assert check_tiles(dense, schema.Train(tile_mlp=True), {}) is None


def test_the_size_of_a_tile() -> None:
    assert tile_size(schema.Train(), 64) is None
    assert tile_size(schema.Train(tile_mlp=True), 64) == 64
    assert tile_size(schema.Train(tile_mlp=True, mlp_tile_size=7), 64) == 7
