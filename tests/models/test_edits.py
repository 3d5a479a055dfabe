"""Edits: all that follows from an edit comes from its class, so a new kind of layer needs no change where edits are applied and asked."""

import ast
import dataclasses
import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from swift_mega import models
from swift_mega.config import schema
from swift_mega.convert.blueprint import META, make_blueprint
from swift_mega.convert.source import Source
from swift_mega.errors import UserError
from swift_mega.memory.choices import Choices
from swift_mega.memory.memory import memory
from swift_mega.memory.weights import layer_numbers
from swift_mega.models import modules, translate
from swift_mega.models.edits import Edit
from swift_mega.models.family import family_of
from swift_mega.models.linears import modules_of
from swift_mega.models.megatron_config import transformer_config
from swift_mega.models.settings import Settings
from swift_mega.models.specs import layer_specs
from swift_mega.models.translate import load_settings
from swift_mega.parallel.layout import parse_layout, plan_layout
from swift_mega.train.flops import weights_per_token

LAYERS = (False, True, False, True)


class Mixer(torch.nn.Module):
    """Stands for a module that computes something new."""


@dataclass(frozen=True, kw_only=True)
class Mixing(Edit):
    """An edit as a new module would bring it."""

    wheels: int
    no_memory_formula = "wheels"

    def edit(self, spec: Any, parts: Any) -> None:
        spec.submodules.self_attention = (Mixer, parts.column, parts.row)

    def limits(self, shape: Any) -> Any:
        return dataclasses.replace(
            shape, shared_counts=(("wheels", self.wheels),), no_context_parallel="rolls from token to token"
        )

    def check_layout(self, layout: Any) -> None:
        if layout.pipeline == 4:
            raise UserError("no room for wheels")

    def megatron_fields(self) -> dict[str, Any]:
        return {"qk_l2_norm": True}

    def attention_linears(self) -> tuple[str, ...]:
        return ("linear_proj",)

    def attention_weights(self, shape: Any) -> int:
        return self.wheels * shape.hidden


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("edits") / "llama", "llama")


@pytest.fixture
def edited(plain: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of a family that differs from Llama by Mixing in every other layer."""
    llama = family_of(plain)

    def changed(config: Any) -> Settings:
        return dataclasses.replace(llama.translate(config), edits=(Mixing(wheels=6, layers=LAYERS),))

    family = dataclasses.replace(llama, translate=changed)
    monkeypatch.setattr(translate, "family_of", lambda directory: family)
    return load_settings(plain)


def test_only_its_layers_are_edited(edited: Settings) -> None:
    specs = layer_specs(edited, te=False, reads_inputs=False)
    assert tuple(isinstance(spec.submodules.self_attention, tuple) for spec in specs) == LAYERS
    assert [kind.edits for kind in edited.layer_kinds] == [edited.edits if here else () for here in LAYERS]
    assert edited.edits[0].only([1, 2]).layers == (True, False)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("tp4", "parallel.tensor=4 does not divide the model's 6 wheels"),
        ("cp2", "splits rows of tokens, and this model rolls from token to token"),
        ("pp4", "no room for wheels"),
    ],
)
def test_layouts_that_it_cannot_have_are_refused(edited: Settings, plain: Path, layout: str, said: str) -> None:
    def check(settings: Settings) -> Any:
        parallel, world = parse_layout(layout)
        found = plan_layout(parallel, settings.shape, world)
        return transformer_config(
            settings, found, device=META, dtype=torch.float32, train=schema.Train(), given={}
        ).qk_l2_norm

    with pytest.raises(UserError, match=said):
        check(edited)
    assert check(dataclasses.replace(edited, edits=(), shape=load_plain(edited))) is False


def load_plain(settings: Settings) -> Any:
    return dataclasses.replace(settings.shape, shared_counts=(), no_context_parallel=None)


def test_megatrons_fields_are_set(edited: Settings) -> None:
    layout = plan_layout(schema.Parallel(), edited.shape, 1)
    config = transformer_config(edited, layout, device=META, dtype=torch.float32, train=schema.Train(), given={})
    assert config.qk_l2_norm


def test_adapters_operations_and_memory_ask_it(edited: Settings, plain: Path) -> None:
    family, before = family_of(plain), dataclasses.replace(edited, edits=(), shape=load_plain(edited))
    gone = modules_of(family, before) - modules_of(family, edited)
    assert gone == {f"model.layers.{i}.self_attn.{x}_proj" for i in (1, 3) for x in "qkv"}
    assert modules_of(family, edited) < modules_of(family, before)
    attention = 32 * 8 * (2 * (8 + 4))
    assert weights_per_token(before) - weights_per_token(edited) == 2 * (attention - 6 * 32)
    layout = plan_layout(schema.Parallel(), edited.shape, 1)
    memory(before, layout, Choices(), 64)
    with pytest.raises(UserError, match="and this model has wheels; measure a small run instead"):
        memory(edited, layout, Choices(), 64)


def test_an_edit_without_a_formula_is_refused(edited: Settings) -> None:
    """A new edit says nothing of memory until its author does."""
    assert Edit.no_memory_formula == "attention of its own kind"
    layout = plan_layout(schema.Parallel(), edited.shape, 1)
    with pytest.raises(UserError, match="this model has attention of its own kind"):
        memory(dataclasses.replace(edited, edits=(Edit(),)), layout, Choices(), 64)


def numbers_of_a_layer(directory: Path) -> int:
    """One rank: the parameters of layer 0 that Megatron builds."""
    slots = [slot for slot in make_blueprint(Source(directory)).slots if slot.numbers.get("i") == 0]
    return sum(torch.Size(slot.shape).numel() for slot in slots)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama_bias", {}),
        ("qwen3", {}),
        ("hunyuan", {}),
        ("stablelm_qk_norm", {"use_parallel_residual": False}),
    ],
)
def test_parameters_of_a_layer(ranks: Any, tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    """The formula's parameters are those that Megatron builds, with norms of queries and keys of each kind that has a formula."""
    directory = tiny.make(tmp_path / family, family, **changes)
    settings = load_settings(directory)
    layout = plan_layout(schema.Parallel(), settings.shape, 1)
    assert layer_numbers(settings, layout) == ranks(1, numbers_of_a_layer, directory)


def subclasses(of: type) -> set[type]:
    return {below for one in of.__subclasses__() for below in (one, *subclasses(one))}


def test_only_families_know_which_edits_there_are() -> None:
    """Outside models/modules no module but families, and what families share, imports an edit."""
    for found in pkgutil.iter_modules(modules.__path__):
        importlib.import_module(f"{modules.__name__}.{found.name}")
    edits = {one.__name__ for one in subclasses(Edit) if one.__module__.startswith(modules.__name__)}
    assert {"DeltaNet", "Latent", "Routing", "WholeQKNorm"} < edits
    folder = Path(models.__path__[0])
    knows = {
        file.relative_to(folder.parent).as_posix()
        for file in folder.parent.rglob("*.py")
        if not {folder / "families", folder / "modules"} & set(file.parents)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and edits & {alias.name for alias in node.names}
    }
    assert knows == {"models/decoder.py"}
