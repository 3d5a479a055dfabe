"""Checkpoints of the bare model: names without transformers' base_model_prefix, as published for GPT-2 (with buffers that nothing reads)
and Qwen3-Embedding. Exports keep the names of the source.

The oracle is transformers and PEFT, which load such a directory.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from swift_mega import api
from swift_mega.config import schema
from swift_mega.convert import blueprint as blueprints
from swift_mega.convert.files.hf_files import Checkpoint
from swift_mega.convert.source import Source
from swift_mega.errors import UserError
from swift_mega.launch.torchrun import run_ranks
from swift_mega.models.family import families, family_of
from swift_mega.models.translate import load_settings
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.layout import parse_layout, plan_layout
from swift_mega.train.build import build_part
from swift_mega.verify import parity
from tests import tiny

PREFIX = "transformer."


def weights(directory: Path) -> dict[str, Tensor]:
    """The tensors of a directory without the buffers."""
    return {
        name: value
        for name, value in load_file(directory / "model.safetensors").items()
        if not name.endswith((".attn.bias", "masked_bias"))
    }


@pytest.fixture(scope="module", params=["gpt2", "gpt2_untied"])
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tiny.make(tmp_path_factory.mktemp("bare") / "hf", request.param)
    tensors = {name.removeprefix(PREFIX): value for name, value in load_file(source / "model.safetensors").items()}
    for layer in range(4):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(16, 16, dtype=torch.bool).tril()[None, None]
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def same(found: Path, source: Path) -> None:
    have, want = load_file(found / "model.safetensors"), weights(source)
    assert have.keys() == want.keys() and "h.0.attn.c_attn.weight" in have
    assert all(torch.equal(have[name], value) for name, value in want.items())


def test_through_megatrons_checkpoint(tmp_path, published):
    """Hugging Face -> Megatron's checkpoint at TP2 x PP2 -> Hugging Face at PP2 gives the bits and names of the source."""
    parallel = schema.Parallel(tensor=2, pipeline=2, sequence=True)
    api.convert(source=str(published), to="mcore", output=str(tmp_path / "mcore"), parallel=parallel)
    back = str(tmp_path / "back")
    api.convert(source=str(tmp_path / "mcore"), to="hf", output=back, parallel=schema.Parallel(pipeline=2))
    same(tmp_path / "back", published)


def test_bloom_is_published_bare_too(tmp_path):
    source = tiny.make(tmp_path / "hf", "bloom")
    tensors = {name.removeprefix(PREFIX): value for name, value in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    parallel = schema.Parallel(tensor=2, pipeline=2, sequence=True)
    api.convert(source=str(source), to="mcore", output=str(tmp_path / "mcore"), parallel=parallel)
    api.convert(source=str(tmp_path / "mcore"), to="hf", output=str(tmp_path / "back"))
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys() and "word_embeddings_layernorm.bias" in back
    assert all(torch.equal(back[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("name", ["qwen3_tied", "gpt_neox_serial", "qwen3_moe", "gpt_oss", "deepseek_v3_dense"])
def test_any_family_may_be_bare(tmp_path, name):
    """For every family: transformers reads bare names as it reads prefixed ones, and Megatron's checkpoint and FP8 keep names and bits."""
    from transformers import AutoModelForCausalLM

    named, bare = tiny.make(tmp_path / "named", name), tmp_path / "bare"
    shutil.copytree(named, bare)
    prefix = family_of(named).prefix
    tensors = {name.removeprefix(prefix): value for name, value in load_file(named / "model.safetensors").items()}
    save_file(tensors, bare / "model.safetensors", metadata={"format": "pt"})
    tokens = torch.arange(3, 20)[None]
    theirs = [AutoModelForCausalLM.from_pretrained(folder)(tokens).logits for folder in (named, bare)]
    assert torch.equal(*theirs)
    for source, to in ((bare, "mcore"), (tmp_path / "mcore", "hf")):
        api.convert(source=str(source), to=to, output=str(tmp_path / to))
    back = load_file(tmp_path / "hf" / "model.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], value) for name, value in tensors.items())
    for source in (named, bare):
        api.quantize(model=str(source), output=f"{source}_fp8", block=(16, 16))
    eight, plain = (load_file(tmp_path / f"{folder}_fp8" / "model.safetensors") for folder in ("bare", "named"))
    assert eight.keys() == {name.removeprefix(prefix) for name in plain}
    assert [value.dtype for value in eight.values()].count(torch.float8_e4m3fn) == 4 * FP8_LINEARS.get(name, 7)


FP8_LINEARS = {"gpt_neox_serial": 4, "qwen3_moe": 4 + 3 * 4, "gpt_oss": 4, "deepseek_v3_dense": 8}
"""Linears per layer, where they are not q, k, v, o, gate, up, down; gpt-oss stacks those of its experts."""


def test_the_prefix_is_transformers(tmp_path):
    """For every type: the prefix equals base_model_prefix of its class for causal language models in transformers."""
    import transformers

    models = Path(transformers.__file__).parent / "models"
    for hf_type, family in families().items():
        folder = models / {"gemma3_text": "gemma3"}.get(hf_type, family.read_as.get(hf_type, hf_type))
        code = "".join(file.read_text() for file in folder.glob("modeling_*.py"))
        names = set(re.findall(r"base_model_prefix = \"(\w+)\"", code))
        # No names: InternLM 3, whose class is Llama's.
        assert family.prefix.removesuffix(".") in (names or {"model"}), (hf_type, names)


def planned(directory: Path, rank: int) -> dict[str, Tensor]:
    """What the blueprint says that tensor rank `rank` of two has, by arithmetic alone."""
    checkpoint = Checkpoint(directory)
    blueprint = blueprints.make_blueprint(Source(directory))
    layout = plan_layout(parse_layout("tp2")[0], blueprint.settings.shape, 2)
    assert blueprints.check_tiling(blueprint, layout) == sum(value.numel() for value in weights(directory).values())
    return {
        share.slot.name: blueprints.value_of(checkpoint, share, blueprint.settings, torch.float32)
        for share in blueprints.shards_of(blueprint, layout, layout.coordinate(rank))
    }


def named(directory: Path, cpu: object) -> dict[str, Tensor]:
    """What tensor rank 0 of two really has."""
    groups = parallel_groups.init(plan_layout(parse_layout("tp2")[0], load_settings(directory).shape, 2))
    part = build_part(schema.Run(), cpu, groups, dtype=torch.float32, reads_inputs=False, source=Source(directory))
    parallel_groups.close()
    return {named.name: named.parameter.detach().clone() for named in part.named_parameters()}


def test_the_plan_of_a_rank_is_what_it_holds(ranks, cpu, published):
    found, expected = ranks(1, planned, published, 0), ranks(2, named, published, cpu)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_gradients_of_another_family_are_transformers(tmp_path):
    """Qwen3 as an embedding model: tied, and without the prefix `model.`."""
    source = tiny.make(tmp_path, "qwen3_tied")
    tensors = {name.removeprefix("model."): value for name, value in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    for tuner in ("full", "lora"):
        report = api.verify(str(source), ["tp2-sp"], tuner=tuner)
        assert report.passed, report.table()


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_gradients_are_transformers(published, tuner):
    """Gradients are computed in float64 and written in float32."""
    report = api.verify(str(published), ["single", "tp2-sp", "pp2"], tuner=tuner, tolerance=1e-7)
    assert report.passed, report.table()


def random_adapter(model: Path, output: Path, cpu: object) -> Path:
    run = schema.Run(model=schema.Model(path=str(model), dtype="float32"), tuner=schema.Lora(rank=4, alpha=8.0))
    layout = plan_layout(schema.Parallel(), load_settings(model).shape, 1)
    run_ranks(1, parity.random_adapter, run, cpu, layout, output)
    return output


def test_an_adapter_is_pefts_and_is_merged(cpu, tmp_path, published):
    """PEFT loads every tensor of the adapter. The merged directory has the base's names and buffers, and PEFT's merged weights."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = random_adapter(published, tmp_path / "adapter", cpu)
    assert json.loads((adapter / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    assert "base_model.model.transformer.h.3.mlp.c_proj.lora_B.weight" in Checkpoint(adapter).entries
    api.export(model=str(published), adapters=str(adapter), output=str(tmp_path / "merged"))
    base, merged = (load_file(directory / "model.safetensors") for directory in (published, tmp_path / "merged"))
    assert merged.keys() == base.keys()

    network = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(published), str(adapter))
    report = network.load_adapter(str(adapter), adapter_name="once_more")
    assert report.missing_keys == [] and report.unexpected_keys == []
    network.delete_adapter("once_more")
    theirs = network.merge_and_unload().state_dict()
    changed = 0
    for name, value in merged.items():
        if name in weights(published):
            expected = theirs[name if name == "lm_head.weight" else PREFIX + name]
            torch.testing.assert_close(value, expected, rtol=0, atol=2e-6)
            changed += not torch.equal(value, base[name])
    assert changed == 4 * 4


def test_an_adapter_of_transposed_linears_needs_a_known_model(tmp_path, published, cpu):
    """A square weight fits both [in, out] and [out, in]: for a model of no known family the merge is refused."""
    adapter = random_adapter(published, tmp_path / "adapter", cpu)
    config = published / "config.json"
    before = config.read_text()
    config.write_text(before.replace('"model_type": "gpt2"', '"model_type": "unheard_of"'))
    try:
        with pytest.raises(UserError, match=r"has fan_in_fan_out=True, and which weights of .* is not known"):
            api.export(model=str(published), adapters=str(adapter), output=str(tmp_path / "merged"))
    finally:
        config.write_text(before)


def load(directory: Path, cpu: object) -> str:
    parallel, world = parse_layout("single")
    groups = parallel_groups.init(plan_layout(parallel, load_settings(directory).shape, world))
    try:
        build_part(schema.Run(), cpu, groups, dtype=torch.float32, reads_inputs=False, source=Source(directory))
    except UserError as error:
        return str(error)
    finally:
        parallel_groups.close()
    return ""


TIED = {
    "gpt2": ("transformer.wte.weight", "lm_head.weight"),
    "gpt_neox_serial": ("gpt_neox.embed_in.weight", "embed_out.weight"),
}


@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_is_a_copy_of_the_embedding(ranks, cpu, tmp_path, name):
    """A tied head is accepted as a copy of the embedding under the names of the family; a head that differs is refused by these names."""
    directory, (embedding, head) = tiny.make(tmp_path, name), TIED[name]
    tensors = load_file(directory / "model.safetensors")
    assert head not in tensors
    tensors[head] = tensors[embedding].clone()
    save_file(tensors, directory / "model.safetensors")
    assert ranks(1, load, directory, cpu) == ""
    tensors[head][0, 0] += 1
    save_file(tensors, directory / "model.safetensors")
    assert f"but {head} differs from {embedding}; set tie_word" in ranks(1, load, directory, cpu)


def test_layers_left_over_are_counted_by_their_names(ranks, cpu, tmp_path):
    directory = tiny.make(tmp_path, "gpt2")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "n_layer": 2}))
    assert "config.json states 2 layers, and layers up to 3 are there" in ranks(1, load, directory, cpu)


def test_modules_have_the_names_of_transformers(published):
    family = family_of(published).named_like(Checkpoint(published).entries)
    assert family.module("h.0.attn.c_attn.weight") == "transformer.h.0.attn.c_attn"
    assert family.module("lm_head.weight") == "lm_head"
    assert family_of(published).named_like(["transformer.wte.weight"]) is family_of(published)
