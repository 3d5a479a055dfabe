"""A Megatron checkpoint written by one process equals what the ranks of its layout write, and Megatron's own loader reads it in any
layout."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from swift_mega import api
from swift_mega.config import schema
from swift_mega.convert import blueprint as blueprints
from swift_mega.convert import whole
from swift_mega.convert.files.hf_files import Checkpoint
from swift_mega.convert.megatron import torch_dist
from swift_mega.convert.megatron.mcore import load_mcore
from swift_mega.convert.source import Source
from swift_mega.errors import UserError
from swift_mega.models.build import build
from swift_mega.models.family import family_of
from swift_mega.models.megatron_config import transformer_config
from swift_mega.models.translate import load_settings
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.layout import Layout, parse_layout, plan_layout
from tests import tiny
from tests.convert.megatron.test_mcore import same_bits
from tests.pairs import Case, covering

CASES = {
    "llama_tied": ("tp2-pp2", "tp4"),
    "llama_bias": ("tp2",),
    "qwen2": ("tp8",),  # twice as many ranks as key heads
    "qwen3_moe": ("tp2-ep2-etp1", "pp2-ep2"),
    "qwen3_moe_mixed": ("tp2-ep2-etp2",),
    "deepseek_v3_moe": ("tp2-ep2-etp1", "tp2-pp2-ep2-etp1"),
    "gpt_oss": ("tp2-ep2-etp1",),
    "ernie4_5_moe": ("pp2-ep2",),
    "phi": ("tp2",),
    "phi3": ("tp2-pp2",),
    "gpt2": ("tp2", "tp2-pp2"),
    "qwen3_next": ("tp2-etp1", "tp2-pp2"),
    "apertus": ("tp2",),
}


def by_axes(case: Case) -> set[frozenset[str]]:
    """Each family once, and the axes of each layout together once, whatever their sizes."""
    return {frozenset((case[0],)), frozenset(word.rstrip("0123456789") for word in case[1].split("-"))}


def layout_of(directory: Path, name: str) -> tuple[schema.Parallel, Layout]:
    parallel, world = parse_layout(name)
    return parallel, plan_layout(parallel, load_settings(directory).shape, world, training=False)


def by_ranks(directory: Path, output: Path, parallel: schema.Parallel) -> None:
    """Under existing ranks, `convert` lets each rank do its part, and Megatron saves."""
    api.convert(source=str(directory), to="mcore", output=str(output), parallel=parallel)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every whole tensor of a checkpoint, read by torch's own reader."""
    found = {
        key: torch.empty(value.size, dtype=value.properties.dtype)
        for key, value in torch_dist.read_metadata(folder).state_dict_metadata.items()
        if isinstance(value, TensorStorageMetadata)
    }
    dcp.load(found, checkpoint_id=folder, no_dist=True)
    return found


def described(folder: Path) -> tuple[dict[str, Any], set[str]]:
    """Shape, dtype and chunks of every tensor, and the keys of entries that are no tensor."""
    found = torch_dist.read_metadata(folder).state_dict_metadata
    sizes = {
        key: (
            tuple(value.size),
            value.properties,
            sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in value.chunks),
        )
        for key, value in found.items()
        if isinstance(value, TensorStorageMetadata)
    }
    return sizes, {key for key, value in found.items() if isinstance(value, BytesStorageMetadata)}


@pytest.mark.parametrize(
    "name, layout_name", covering([(name, word) for name in CASES for word in CASES[name]], by_axes)
)
def test_what_the_ranks_would_have_written(ranks, tmp_path, name, layout_name):
    """Keys, shapes, dtypes, chunks, objects, the other files and all numbers are equal."""
    directory = tiny.make(tmp_path / "hf", name, dtype=torch.bfloat16)
    parallel, layout = layout_of(directory, layout_name)
    theirs, mine = tmp_path / "ranks", tmp_path / "one"
    ranks(layout.world, by_ranks, directory, theirs, parallel)
    api.convert(source=str(directory), to="mcore", output=str(mine), parallel=parallel)
    assert described(mine / "release") == described(theirs / "release")
    one, many = tensors(mine / "release"), tensors(theirs / "release")
    assert one.keys() == many.keys() and all(torch.equal(one[key], many[key]) for key in many)
    names = [
        {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix != ".distcp"}
        for folder in (mine, theirs)
    ]
    assert names[0] == names[1]


def loaded(directory: Path, mcore: Path, layout: Layout, blueprint: blueprints.Blueprint, cpu: Any) -> int:
    """One rank: compares what Megatron's loader gives it with the bytes of the Hugging Face files."""
    groups = parallel_groups.init(layout)
    checkpoint, settings = Checkpoint(directory), load_settings(directory)
    config = transformer_config(settings, layout, device=cpu, dtype=torch.float32, train=schema.Train(), given={})
    part = build(family_of(directory), settings, layout, groups.coordinate, device=cpu, config=config)
    for named in part.named_parameters():
        named.parameter.data.fill_(7)
    load_mcore(part, groups, mcore)
    where = layout.coordinate(dist.get_rank())
    planned = {(share.slot.name, share.copy): share for share in blueprints.shards_of(blueprint, layout, where)}
    for named in part.named_parameters():
        share = planned.pop(("embedding.word_embeddings.weight" if named.copy else named.name, named.copy))
        assert torch.equal(named.parameter, blueprints.value_of(checkpoint, share, settings, torch.float32)), named.name
    assert not planned
    parallel_groups.close()
    return 1


@pytest.mark.parametrize(
    ("name", "written", "layouts"),
    [
        ("llama_tied", "tp8-pp4", ("single", "tp2-pp2", "pp4")),
        ("qwen3_moe", "pp2", ("single", "tp2-ep2-etp1", "ep2")),
    ],
)
def test_megatron_reads_it_in_any_layout(ranks, cpu, tmp_path, name, written, layouts):
    """From one set of files, also from one of a layout of 32 ranks that was never started on this machine."""
    directory = tiny.make(tmp_path / "hf", name)
    parallel, layout = layout_of(directory, written)
    assert written != "tp8-pp4" or layout.world == 32
    api.convert(source=str(directory), to="mcore", output=str(tmp_path / "mcore"), parallel=parallel)
    for word in layouts:
        _, layout = layout_of(directory, word)
        blueprint = ranks(1, blueprints.make_blueprint, Source(directory))
        # The vocabulary is padded for the layout that a checkpoint is written in; Megatron allows another length when it loads.
        ranks(layout.world, loaded, directory, tmp_path / "mcore", layout, blueprint, cpu)


def streamed(directory: Path, output: Path, layout: Layout, most: int) -> None:
    blueprint = blueprints.make_blueprint(Source(directory), dtype=torch.bfloat16)
    checkpoint = Checkpoint(directory)
    whole.write_mcore(blueprint, layout, output, checkpoint, most=most)
    kinds = {name: entry.dtype for name, entry in checkpoint.entries.items()}
    whole.read_mcore(
        blueprint, output, output.with_suffix(".hf"), source=directory, dtypes=kinds, max_shard_bytes=1 << 30, most=most
    )


@pytest.mark.parametrize("name", ["llama_bias", "qwen3_moe", "phi3", "gpt_oss", "gpt2", "qwen3_next", "phi"])
def test_small_bands_are_the_same_numbers(ranks, tmp_path, monkeypatch, name):
    """Parameters streamed in pieces of a few rows, in many files, have the same bits as whole ones, also after the way back."""
    monkeypatch.setattr(torch_dist, "FILE_BYTES", 20_000)
    directory = tiny.make(tmp_path / "hf", name, dtype=torch.bfloat16)
    _, layout = layout_of(directory, "tp2-pp2")
    ranks(1, streamed, directory, tmp_path / "small", layout, 700)
    ranks(1, streamed, directory, tmp_path / "large", layout, 1 << 30)
    small, large = tensors(tmp_path / "small" / "release"), tensors(tmp_path / "large" / "release")
    assert small.keys() == large.keys() and all(torch.equal(small[key], large[key]) for key in large)
    embedding = torch_dist.read_metadata(tmp_path / "small" / "release").state_dict_metadata[
        "embedding.word_embeddings.weight"
    ]
    assert len(embedding.chunks) > 10 and len(list((tmp_path / "small" / "release").glob("*.distcp"))) > 3
    for folder in ("small.hf", "large.hf"):
        same_bits(tmp_path / folder, directory)


def peak(directory: Path, output: Path, layout: Layout) -> tuple[int, int]:
    """The peak memory in bytes of a conversion there and back, minus the memory in use before."""
    blueprints.make_blueprint(
        Source(directory), dtype=torch.float32
    )  # what is imported on first use is not the conversion's
    used = []
    for step in ("there", "back"):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _status("VmRSS")
        blueprint = blueprints.make_blueprint(Source(directory), dtype=torch.float32)
        if step == "there":
            whole.write_mcore(blueprint, layout, output, Checkpoint(directory), most=8 << 20)
        else:
            whole.read_mcore(
                blueprint,
                output,
                output.with_suffix(".hf"),
                source=directory,
                dtypes=torch.float32,
                max_shard_bytes=1 << 30,
                most=8 << 20,
            )
        used.append(_status("VmHWM") - before)
    return used[0], used[1]


def _status(word: str) -> int:
    found = re.search(rf"{word}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


def test_memory_does_not_grow_with_the_model(ranks, tmp_path):
    """A model of 300 MB whose largest tensor has 32 MB, in pieces of 8 MB."""
    sizes = dict(
        hidden_size=512, intermediate_size=1536, vocab_size=16384, num_hidden_layers=20, tie_word_embeddings=False
    )
    directory = tiny.make(tmp_path / "hf", "llama", **sizes)
    _, layout = layout_of(directory, "tp2-pp2")
    there, back = ranks(1, peak, directory, tmp_path / "mcore", layout)
    size = sum(entry.bytes for entry in Checkpoint(directory).entries.values())
    assert size > 250e6 and max(there, back) < 80e6, (size, there, back)
    have, want = load_file(tmp_path / "mcore.hf" / "model.safetensors"), load_file(directory / "model.safetensors")
    assert all(torch.equal(have[name], want[name]) for name in want)


def test_nothing_is_said_of_a_training_run_where_there_was_none(tmp_path, capsys):
    directory = tiny.make(tmp_path / "hf", "llama")
    api.convert(source=str(directory), to="mcore", output=str(tmp_path / "mcore"))
    api.convert(source=str(tmp_path / "mcore"), to="hf", output=str(tmp_path / "back"))
    assert "training run" not in capsys.readouterr().out


def test_numbers_that_are_none_stop_it(tmp_path):
    directory = tiny.make(tmp_path / "hf", "llama")
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.2\.mlp\.up_proj\.weight .* 1 value that is not finite"):
        api.convert(source=str(directory), to="mcore", output=str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_checkpoint_has_no_context_size(tmp_path: Path) -> None:
    directory = tiny.make(tmp_path / "hf", "llama")
    with pytest.raises(UserError, match=r"parallel.context=2: context ranks have the same weights.*remove it"):
        api.convert(
            source=str(directory), to="mcore", output=str(tmp_path / "out"), parallel=schema.Parallel(context=2)
        )
    assert not (tmp_path / "out").exists()
