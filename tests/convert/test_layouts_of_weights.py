"""Hugging Face to every rank of every layout and back: each parameter equals the slow oracle, and every byte comes back.

A round trip alone proves nothing, because the inverse undoes an error. So the parameters of the ranks are also compared with
tests/by_hand.py, by the names and numbers that Megatron's own modules give.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state as state
from safetensors.torch import load_file, save_file
from torch import Tensor

from swift_mega.config import schema
from swift_mega.convert.files.hf_files import Checkpoint
from swift_mega.convert.megatron.mcore import widest
from swift_mega.convert.save import save
from swift_mega.convert.source import Source
from swift_mega.errors import UserError
from swift_mega.models.build import ModelPart
from swift_mega.models.config_json import read_config
from swift_mega.models.translate import load_settings
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.groups import Groups
from swift_mega.parallel.layout import parse_layout, plan_layout
from swift_mega.train.build import build_part
from tests import by_hand, tiny
from tests.pairs import covering, kind, once

DENSE = ("tp2-dp2", "tp4", "pp2-dp2", "pp4", "tp2-pp2-sp", "pp2-vpp2-dp2", "pp2:1,3")
MOE = (
    "ep2-dp4",
    "ep4-dp4",
    "pp2-ep2-dp2",
    "tp2-ep2-etp1-sp-dp2",
    "tp2-ep2-etp2-sp-dp2",
    "tp4-etp1",
    "tp4-ep2-etp2",
    "pp2:3,1",
)
FEWER = ("tp2-pp2-sp", "ep2-dp4", "tp2-ep2-etp2-sp-dp2")


COUNTED = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "granite", "gemma", "smollm3", "seed_oss")
"""Types whose layout tests/by_hand.py computes. For the other types, tests/train/test_layouts.py compares the values that tensor and
expert ranks compute; here their bytes have to come back."""


QUICK: dict[str, tuple[str, ...]] = {
    "llama": ("tp4", "tp2-pp2-sp", "pp2:1,3"),
    "llama_tied": ("pp4", "tp2-dp2", "pp2-vpp2-dp2"),
    "llama_bias": ("tp2-pp2-sp",),
    "qwen2_window": ("pp2-vpp2-dp2",),
    "qwen3_tied": ("pp2-dp2", "pp2:1,3"),
    "qwen3_moe": FEWER[1:],
    "qwen3_moe_mixed": (*MOE, "pp2-vpp2-dp2"),
    **dict.fromkeys(("mixtral", "deepseek_v3_moe", "qwen3_next"), FEWER),
    **dict.fromkeys(("phi", "phi3", "gpt2", "falcon_new", "gemma2"), FEWER[:1]),
}
"""Without --full: every layout of DENSE and MOE runs with a family of COUNTED, and a pipeline with one family of every kind. All other
families run tensor ranks, and expert ranks where they have experts, on two ranks."""


def quick_layouts(name: str) -> tuple[str, ...]:
    experts = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"} & tiny.FAMILIES[name].keys()
    return QUICK.get(name, ("tp2-ep2-etp1-sp",) if experts else ("tp2-sp",))


def layouts_for(name: str) -> tuple[str, ...]:
    """The layouts worth their time: a family whose weights have the same layout as another's is not tried in all of them."""
    if tiny.FAMILIES[name].get("multi_query") is True:  # one key head for all tensor ranks
        return ("pp2-dp2", "tp4")
    if tiny.FAMILIES[name]["model_type"] not in COUNTED[:6]:
        experts = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}
        if "gpt_oss" in name:  # Megatron shards experts with biases over expert ranks only
            return ("ep2-dp4", "tp2-ep2-etp1-sp-dp2", "tp4-etp1")
        return FEWER if experts & tiny.FAMILIES[name].keys() else FEWER[:1]
    if "rope_parameters" in tiny.FAMILIES[name] or name == "mistral":
        return ("tp2-pp2-sp",)
    if name in ("qwen2", "qwen3"):
        return ("tp4", "tp2-pp2-sp", "pp2:1,3")
    if name == "qwen3_moe_mixed":
        return DENSE + MOE
    return FEWER if "moe" in name or name == "mixtral" else DENSE


def hugging_face(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory, read by safetensors itself."""
    return {name: value for file in sorted(directory.glob("*.safetensors")) for name, value in load_file(file).items()}


def part_of(name: str, directory: Path, dtype: torch.dtype, cpu: Any) -> tuple[ModelPart, Groups]:
    """This rank's part in the layout `name`. 'pp2:1,3' has the listed numbers of layers; the remaining ranks are data ranks."""
    name, _, layers = name.partition(":")
    parallel, world = parse_layout(name)
    if layers:
        parallel, world = schema.Parallel(pipeline=parallel.pipeline, pipeline_layout=layers), 4
    layout = plan_layout(parallel, load_settings(directory).shape, world, training=False)
    groups = parallel_groups.init(layout)
    run = schema.Run(parallel=parallel)
    return build_part(run, cpu, groups, dtype=dtype, reads_inputs=False, source=Source(directory)), groups


def equals_by_hand(part: ModelPart, directory: Path, hf: Mapping[str, Tensor]) -> int:
    """Compares every parameter of this rank; returns their number."""
    config = read_config(directory)
    if config["model_type"] not in COUNTED:
        return sum(1 for _ in part.named_parameters())
    experts = config.get("num_experts", config.get("num_local_experts", 0)) or 0
    place = by_hand.Place(
        tensor=(state.get_tensor_model_parallel_rank(), state.get_tensor_model_parallel_world_size()),
        expert_tensor=(state.get_expert_tensor_parallel_rank(), state.get_expert_tensor_parallel_world_size()),
        first_expert=state.get_expert_model_parallel_rank() * (experts // state.get_expert_model_parallel_world_size()),
        groups=config["num_key_value_heads"],
        queries=config["num_attention_heads"] // config["num_key_value_heads"],
        head_dim=config["head_dim"],
        vocab=config["vocab_size"],
        vocab_unit=128,
        hf_type=config["model_type"],
    )
    count = 0
    for chunk in part.chunks:
        for name, parameter in chunk.named_parameters():
            words = name.split(".")
            # Megatron numbers layers from 1, over all stages.
            layer = chunk.decoder.layers[int(words[2])].layer_number - 1 if words[1] == "layers" else None
            expected = by_hand.parameter(name, layer, hf, place).to(parameter.dtype)
            assert parameter.shape == expected.shape, f"{name}: {parameter.shape} for {expected.shape}"
            assert torch.equal(parameter, expected), f"{name} (layer {layer})"
            count += 1
    return count


def same_bits(found: Path, source: Path) -> None:
    """The same tensors, dtypes and bytes, NaN and negative zero included."""
    have, want = hugging_face(found), hugging_face(source)
    assert have.keys() == want.keys()
    for name, value in want.items():
        assert have[name].dtype == value.dtype, name
        assert torch.equal(have[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), name


def there_and_back(layouts: tuple[str, ...], directory: Path, output: Path, cpu: Any) -> list[int]:
    """Runs in every rank: load, compare, save, for each layout. Returns the number of parameters that rank 0 compared."""
    hf, checkpoint = hugging_face(directory), Checkpoint(directory)
    dtypes = {name: entry.dtype for name, entry in checkpoint.entries.items()}
    compared = []
    for name in layouts:
        part, groups = part_of(name, directory, widest(checkpoint), cpu)
        compared.append(equals_by_hand(part, directory, hf))
        save(part, groups, output / name, source=directory, dtypes=dtypes, max_shard_bytes=1 << 40)
        parallel_groups.close()
    return compared


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_every_layout_there_and_back(ranks, cpu, tmp_path, name, request):
    """Every family in its layouts: parameters equal the hand-written layout, and files are as before."""
    source = tiny.make(tmp_path / "hf", name)
    layouts = layouts_for(name) if request.config.getoption("--full") else quick_layouts(name)
    compared = ranks(world_of(layouts), there_and_back, layouts, source, tmp_path, cpu)
    assert all(count > 5 for count in compared)
    for layout in layouts:
        same_bits(tmp_path / layout, source)
        assert (tmp_path / layout / "config.json").read_bytes() == (source / "config.json").read_bytes()


def world_of(layouts: tuple[str, ...]) -> int:
    """The number of ranks, the same for all these layouts; a layout with listed layers has four."""
    (world,) = {4 if ":" in layout else parse_layout(layout)[1] for layout in layouts}
    return world


def test_quick_layouts_leave_none_out():
    counted = {name for name, fields in tiny.FAMILIES.items() if fields["model_type"] in COUNTED}
    assert {layout for name in counted for layout in quick_layouts(name)} >= {*DENSE, *MOE, *FEWER}
    kinds = {kind(name) for name in tiny.FAMILIES}
    assert {kind(name) for name in tiny.FAMILIES if any("pp2" in one for one in quick_layouts(name))} == kinds


@pytest.mark.parametrize("name", tiny.FEW_KEY_HEADS)
def test_more_ranks_than_key_heads_there_and_back(ranks, cpu, tmp_path, name, request):
    """With more ranks than key heads, each rank has the rows that Megatron takes from a group, as computed by hand, and writes its own
    rows."""
    source = tiny.make(tmp_path / "hf", name)
    layouts = ("tp4",) if name.endswith("_2") else ("tp4", "tp2-pp2-sp")
    if name.endswith("_1") and name != "llama_4_1" and not request.config.getoption("--full"):
        layouts = ("tp2",)
    experts = name.startswith(("mixtral", "gpt_oss"))
    layouts = tuple(f"{layout}-ep2-etp1" if experts else layout for layout in layouts)
    assert all(count > 5 for count in ranks(world_of(layouts), there_and_back, layouts, source, tmp_path, cpu))
    for layout in layouts:
        same_bits(tmp_path / layout, source)


@pytest.mark.parametrize("name", ["llama_bias", "qwen2_window", "qwen3_moe_mixed"])
def test_one_rank_there_and_back(ranks, cpu, tmp_path, name):
    source = tiny.make(tmp_path / "hf", name)
    ranks(1, there_and_back, ("single",), source, tmp_path, cpu)
    same_bits(tmp_path / "single", source)


def cast(directory: Path, kinds: list[torch.dtype]) -> Path:
    """Gives the tensors of a directory these dtypes, one after another."""
    (file,) = directory.glob("*.safetensors")
    tensors = {name: value.to(kinds[n % len(kinds)]) for n, (name, value) in enumerate(sorted(load_file(file).items()))}
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


KINDS = ("bfloat16", "float16", "bfloat16 float32", "bfloat16 float16 float32", "float64 bfloat16")
LAYOUTS = {"qwen3_tied": ("tp2-pp2-sp", "pp4"), "mixtral": ("tp2-ep2-etp2-sp-dp2", "pp2-ep2-dp2")}


@pytest.mark.parametrize(
    "name, layout, kinds",
    covering([(name, layout, kinds) for name in LAYOUTS for layout in LAYOUTS[name] for kinds in KINDS], once),
)
def test_dtypes_are_kept_tensor_by_tensor(ranks, cpu, tmp_path, name, layout, kinds):
    """In memory in the narrowest dtype that can represent all of them; written in each tensor's own dtype."""
    source = cast(tiny.make(tmp_path / "hf", name), [getattr(torch, kind) for kind in kinds.split()])
    ranks(4, there_and_back, (layout,), source, tmp_path, cpu)
    same_bits(tmp_path / layout, source)


EXTREME = {torch.float32: (torch.int32, 0x7F7FFFFF, -0x7FFFFFFF), torch.bfloat16: (torch.int16, 0x7F7F, -0x7FFF)}
"""The bits of the largest number, and of the negative number next to zero."""
PLACES = ("lm_head.weight", "model.layers.2.self_attn.k_proj.weight", "model.layers.0.mlp.down_proj.weight")


def with_values(directory: Path, values: Tensor, names: tuple[str, ...]) -> Path:
    """A tiny llama in which the named tensors begin with these numbers."""
    source = tiny.make(directory, "llama", dtype=values.dtype)
    tensors = hugging_face(source)
    for name in names:
        tensors[name].view(-1)[: len(values)] = values
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


@pytest.mark.parametrize("kind", EXTREME)
def test_special_values_are_kept(ranks, cpu, tmp_path, kind):
    """Negative zero, subnormals and the largest numbers keep their bits."""
    integer, largest, smallest = EXTREME[kind]
    odd = torch.tensor([0, 1, largest, smallest, torch.iinfo(integer).min], dtype=integer).view(kind)
    assert odd.isfinite().all() and odd[-1].signbit() and odd[-1] == 0
    source = with_values(tmp_path / "hf", odd, PLACES)
    ranks(4, back_only, ("tp2-pp2-sp",), source, tmp_path, cpu)
    same_bits(tmp_path / "tp2-pp2-sp", source)


@pytest.mark.parametrize(
    "value, name",
    covering([(value, name) for value in (math.nan, math.inf, -math.inf) for name in PLACES], once, lambda case: 1),
)
def test_what_is_not_finite_is_named(ranks, cpu, tmp_path, name, value):
    """The rank that has the number names it, on whichever stage; all ranks stop with its message."""
    source = with_values(tmp_path / "hf", torch.tensor([0.5, value, value]), (name,))
    with pytest.raises(
        UserError, match=rf"{re.escape(name)} .* has 2 values that are not finite, the first \({value}\) at \[0, 1\]"
    ):
        ranks(4, back_only, ("tp2-pp2-sp",), source, tmp_path, cpu)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def back_only(layouts: tuple[str, ...], directory: Path, output: Path, cpu: Any) -> None:
    checkpoint = Checkpoint(directory)
    for name in layouts:
        part, groups = part_of(name, directory, widest(checkpoint), cpu)
        dtypes = {name: entry.dtype for name, entry in checkpoint.entries.items()}
        save(part, groups, output / name, source=directory, dtypes=dtypes, max_shard_bytes=1 << 40)
        parallel_groups.close()


@pytest.mark.parametrize("vocab", [127, 128, 129, 300])
def test_vocabularies_that_ranks_do_not_divide(ranks, cpu, tmp_path, vocab):
    """Padded in Megatron (a rank may have padding only) and trimmed in the files; every divisor of the padded size is a case."""
    source = tiny.make(tmp_path / "hf", "llama", vocab_size=vocab, num_hidden_layers=2)
    ranks(4, there_and_back, ("tp2-dp2", "tp4"), source, tmp_path, cpu)
    for layout in ("tp2-dp2", "tp4"):
        same_bits(tmp_path / layout, source)


# --- what is written is a model


def write_in_shards(directory: Path, output: Path, max_shard_bytes: int, cpu: Any) -> None:
    part, groups = part_of("tp2-pp2-sp", directory, torch.float32, cpu)
    save(part, groups, output, source=directory, dtypes=torch.float32, max_shard_bytes=max_shard_bytes)
    parallel_groups.close()


def logits(directory: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model.eval()(torch.arange(20)[None] * 5 % 131).logits


@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "qwen3_moe", "mixtral"])
def test_transformers_loads_what_is_written(ranks, cpu, tmp_path, name):
    """Several files and an index, with config, tokenizer and chat template beside them; the logits have the same bits."""
    source = tiny.make(tmp_path / "hf", name)
    for file in ("tokenizer.json", "chat_template.jinja", "tokenizer_config.json"):
        (source / file).write_text("{} " + file)
    limit = 40_000
    ranks(4, write_in_shards, source, tmp_path / "out", limit, cpu)
    out = tmp_path / "out"
    files = sorted(out.glob("*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(files) > 3 and sorted(set(index["weight_map"].values())) == [file.name for file in files]
    for file in files:
        assert sum(value.numel() * 4 for value in load_file(file).values()) <= limit
    companions = ("generation_config.json", "tokenizer.json", "chat_template.jinja", "tokenizer_config.json")
    for file in companions:
        assert (out / file).read_bytes() == (source / file).read_bytes()
    same_bits(out, source)
    for directory in (source, out):  # the placeholder tokenizer files are no real tokenizer
        (directory / "tokenizer_config.json").unlink()
        (directory / "tokenizer.json").unlink()
    assert torch.equal(logits(out), logits(source))
    assert not list(tmp_path.glob("*.writing")) and not list(tmp_path.glob("*.old"))


def test_one_dtype_for_all_is_said_in_the_config(ranks, cpu, tmp_path):
    source = tiny.make(tmp_path / "hf", "qwen3")

    def body() -> None:
        part, groups = part_of("tp2", source, torch.float32, cpu)
        save(part, groups, tmp_path / "out", source=source, dtypes=torch.bfloat16, max_shard_bytes=1 << 40)

    ranks(2, body)
    assert read_config(tmp_path / "out")["dtype"] == "bfloat16" and read_config(source)["dtype"] == "float32"
    have, want = hugging_face(tmp_path / "out"), hugging_face(source)
    assert have.keys() == want.keys() and all(torch.equal(have[name], want[name].bfloat16()) for name in want)
