"""What a tuner may do before and while weights are loaded: another shape of the model, and weights that are kept in another form."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from swift_mega.config import schema
from swift_mega.convert.files.hf_files import Checkpoint
from swift_mega.convert.files.spans import Entry
from swift_mega.convert.files.tensors import TensorSource
from swift_mega.convert.source import Source
from swift_mega.device.device import Device
from swift_mega.export.checkpoint import save_checkpoint
from swift_mega.launch.torchrun import run_ranks
from swift_mega.models.build import ModelPart, NamedParameter
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.layout import parse_layout, plan_layout
from swift_mega.train.wire import build_training
from swift_mega.tuners.full import Full
from swift_mega.tuners.tuner import Tuner
from swift_mega.verify import parity

LAYERS = SIZE = 4
NEW = f"model.layers.{SIZE}."


class Rounded(Full):
    """Keeps the first matrices of MLPs in bfloat16, and gives them to their linears when these compute."""

    def prepare(self, named: NamedParameter) -> Callable[[Tensor], None] | None:
        if not named.name.endswith("linear_fc1.weight"):
            return None
        self.kept = getattr(self, "kept", {})
        return lambda value: self.kept.update({id(named.parameter): value.to(torch.bfloat16)})

    def attach(self, part: ModelPart, *, seed: int) -> None:
        assert len(self.kept) == sum(len(chunk.decoder.layers) for chunk in part.chunks)
        for module in (module for chunk in part.chunks for module in chunk.modules()):
            weight = getattr(module, "weight", None)
            if id(weight) in self.kept:
                assert weight.numel() == 0
                weight.requires_grad_(False)
                module.register_forward_pre_hook(self._restore)

    def _restore(self, module: Any, given: tuple[Any, ...]) -> None:
        module.weight.data = self.kept[id(module.weight)].to(module.weight.dtype)


class Deeper(Tuner):
    """One more layer: a copy of the last one whose outputs are zero (LLaMA-Pro, arXiv:2401.02415). Only this layer is trained."""

    Settings = schema.Full

    def reshape(self, source: Source) -> Source:
        folder = source.directory.parent / f"{source.directory.name}-deeper"
        folder.mkdir(exist_ok=True)
        config = json.loads((source.directory / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": LAYERS + 1}))
        deeper = Source(folder, names=())
        deeper.tensors = Extended(source.tensors)
        return deeper

    def config_edits(self) -> dict[str, Any]:
        return {"num_hidden_layers": LAYERS + 1}

    def attach(self, part: ModelPart, *, seed: int) -> None:
        for named in part.named_parameters():
            named.parameter.requires_grad_(f".layers.{LAYERS}." in named.name)

    def exported(self, part: ModelPart) -> Any:
        return part.named_parameters()


class Extended(TensorSource):
    def __init__(self, base: TensorSource) -> None:
        self.base, self.directory = base, base.directory
        last = f"model.layers.{LAYERS - 1}."
        added = {name.replace(last, NEW): entry for name, entry in base.entries.items() if name.startswith(last)}
        self.entries: dict[str, Entry] = {**base.entries, **added}

    def read_into(self, target: Tensor, name: str, axis: Any = None, start: int = 0, stop: int | None = None) -> None:
        if name.startswith(NEW) and name.endswith(("o_proj.weight", "down_proj.weight")):
            target.zero_()
        else:
            self.base.read_into(target, name.replace(NEW, f"model.layers.{LAYERS - 1}."), axis, start, stop)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("seams") / "model", "llama", num_hidden_layers=LAYERS)


def logits(model: Path, device: Device, layout: str, tuner: type[Tuner]) -> list[Tensor] | None:
    """Logits of the fixed rows, on ranks of the last stage."""
    from swift_mega.train import build

    parallel, world = parse_layout(layout)
    parallel = dataclasses.replace(parallel, distributed_optimizer=False)
    run = schema.Run(model=schema.Model(path=str(model), dtype="float64"), tuner=schema.Full(), parallel=parallel,
                     optim=schema.Optim(clip_grad=0.0))  # fmt: skip
    source = tuner(run.tuner).reshape(Source(model))
    mine = plan_layout(parallel, source.settings.shape, world)
    groups = parallel_groups.init(mine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "find_tuner", tuner)
        training = build_training(run, device, groups, steps=1)
    if tuner is Deeper:
        trained = [name for chunk in training.part.chunks for name, p in chunk.named_parameters() if p.requires_grad]
        assert len(training.part.chunks[0].decoder.layers) == LAYERS + 1 and len(trained) == 6
    rows = parity.microbatches(parity.example_rows(131, examples=4), mine, groups.coordinate.data)
    found = parity.collect_logits(training, rows)
    if tuner is Deeper:
        given: dict[str, Any] = dict(source=model, max_shard_size="1GB", dtype=torch.float64)
        save_checkpoint(training.tuner, training.part, groups, model.with_name("written"), **given)
    parallel_groups.close()
    return [each for row in found for each in row]


def of_transformers(model: Path, edit: Callable[[Any], None]) -> list[Tensor]:
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    edit(network)
    with torch.no_grad():
        return [network(torch.tensor(row)[None]).logits[0] for row in parity.example_rows(131, examples=4)]


@pytest.mark.parametrize(("layout", "world"), [("tp2", 2), ("dp2", 2)])
def test_a_weight_can_be_kept_in_another_form(layout: str, world: int, model: Path, cpu: Device) -> None:
    def round_them(network: Any) -> None:
        for layer in network.model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight.data = linear.weight.data.to(torch.bfloat16).double()

    want = of_transformers(model, round_them)
    have = run_ranks(world, logits, model, cpu, layout, Rounded)
    every = want if layout == "tp2" else want[:2]
    assert max(float((a - b).abs().max()) for a, b in zip(every, have, strict=True)) < 1e-6
    plain = of_transformers(model, lambda network: None)
    assert max(float((a - b).abs().max()) for a, b in zip(plain, want, strict=True)) > 1e-3


def test_a_model_can_get_another_shape(model: Path, cpu: Device) -> None:
    have = run_ranks(1, logits, model, cpu, "tp1", Deeper)
    want = of_transformers(model, lambda network: None)
    assert max(float((a - b).abs().max()) for a, b in zip(want, have, strict=True)) < 1e-6
    again = of_transformers(model.with_name("written"), lambda network: None)
    assert max(float((a - b).abs().max()) for a, b in zip(want, again, strict=True)) == 0.0
    assert f"{NEW}mlp.up_proj.weight" in Checkpoint(model.with_name("written")).entries
