"""Builds every tiny model with Transformer Engine's modules and with Megatron's own: `python -m tests.models.on_te WORK`, where TE is
installed.

A program and not a test: Megatron changes its defaults where it finds Transformer Engine, so no other test may share a process with it.
WORK/found.json says for each family and layout why it is refused, or for each tuner what is wrong (nothing: an empty list) and which
classes were built.

The modules are made on the CPU, because the facade says that this is the current device. torch.cuda.is_available is replaced by a function
that returns True, only while the layers are made. The CUDA kernels do not run here.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from swift_mega.device import device

CPU = device.setup()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402

import tiny  # noqa: E402
from swift_mega.config import schema  # noqa: E402
from swift_mega.convert.files.hf_files import Checkpoint  # noqa: E402
from swift_mega.convert.megatron.mcore import load_mcore, save_mcore  # noqa: E402
from swift_mega.convert.save import save  # noqa: E402
from swift_mega.convert.source import Source  # noqa: E402
from swift_mega.errors import UserError  # noqa: E402
from swift_mega.launch.torchrun import run_ranks  # noqa: E402
from swift_mega.models.build import ModelPart, NamedParameter  # noqa: E402
from swift_mega.models.modules.experts import check_biases  # noqa: E402
from swift_mega.models.translate import load_settings  # noqa: E402
from swift_mega.parallel.groups import Groups, init  # noqa: E402
from swift_mega.parallel.layout import Layout, parse_layout, plan_layout  # noqa: E402
from swift_mega.train.build import build_part  # noqa: E402
from swift_mega.tuners.tuner import find_tuner  # noqa: E402

# Modules as on CUDA, tensors on the CPU.
DTYPE = torch.bfloat16  # Transformer Engine's modules have no float32 here
ON_TE = device.Device(kind="cuda", device=device.CPU, backend="gloo", name="CPU")
LAYOUTS = ("single", "tp2-sp", "tp2-ep2-etp1-sp")
TILED = ("llama", "gpt2", "apertus", "cohere", "deepseek_v3_moe", "qwen2_moe")
"""Families that are also built with MLPs and norms by tiles of tokens, as "tiled LAYOUT"."""
MARKS = ("tensor_model_parallel", "sequence_parallel", "partition_dim", "allreduce")
"""The attributes of a parameter that Megatron's gradient reduction, norm and optimizer read."""


@contextlib.contextmanager
def cuda_answers() -> Iterator[None]:
    """torch.cuda.is_available returns True."""
    truth, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    try:
        yield
    finally:
        torch.cuda.is_available = truth


def made(run: schema.Run, groups: Groups, source: Source, where: device.Device, *, reads_inputs: bool) -> ModelPart:
    """This rank's part, filled from the Hugging Face directory."""
    with cuda_answers() if where is ON_TE else contextlib.nullcontext():
        return build_part(run, where, groups, dtype=DTYPE, reads_inputs=reads_inputs, source=source)


def wrong(part: ModelPart, local: ModelPart) -> list[str]:
    """How the parameters of `part` differ from those of the local modules."""
    named = list(part.named_parameters())
    found = differences(named, list(local.named_parameters()))
    for each in named:
        rules = [rule for pattern, rule in part.family.patterns if pattern.fullmatch(each.name)]
        if len(rules) != 1 and not each.copy:
            found.append(f"{each.name} is covered by {len(rules)} rules")
    filled = {id(each.parameter) for each in named}
    for name, value in itertools.chain.from_iterable(chunk.state_dict(keep_vars=True).items() for chunk in part.chunks):
        if not name.endswith("_extra_state") and id(value) not in filled:
            found.append(f"{name} of the state is no parameter that a rule fills")
    return found


def differences(mine: Sequence[NamedParameter], others: Sequence[NamedParameter]) -> list[str]:
    """How parameters of the same names differ: in their Hugging Face tensors, shape, dtype, numbers, attributes."""
    here, there = {each.name: each for each in mine}, {each.name: each for each in others}
    found = [f"{name} is only in one of the two" for name in sorted(here.keys() ^ there.keys())]
    for name in sorted(here.keys() & there.keys()):
        one, other = here[name].parameter, there[name].parameter
        if here[name].parts != there[name].parts:
            found.append(f"{name} is made of {here[name].parts}, not {there[name].parts}")
        if one.shape != other.shape or one.dtype != other.dtype:
            found.append(f"{name} is {one.dtype} {list(one.shape)}, not {other.dtype} {list(other.shape)}")
        elif not torch.equal(one, other):
            found.append(f"{name} has other numbers")
        for mark in MARKS:
            if marked(one, mark) != marked(other, mark):
                found.append(f"{name}.{mark} is {marked(one, mark)}, not {marked(other, mark)}")
    return found


def marked(parameter: Tensor, mark: str) -> Any:
    """An attribute that is missing counts as Megatron's default for it."""
    return getattr(parameter, mark, {"allreduce": True}.get(mark, False))


def classes(part: ModelPart) -> list[str]:
    """The classes that have the parameters, as "place: package.class" without layer numbers."""
    found = set()
    for chunk in part.chunks:
        for name, module in chunk.named_modules():
            if next(module.parameters(recurse=False), None) is not None:
                kind, base = type(module).__mro__[:2]
                # A subclass made by `bound` of models/specs.py counts as the class that was given to it.
                kind = base if base.__name__ == kind.__name__ else kind
                place = ".".join(word for word in name.split(".") if not word.isdigit())
                found.add(f"{place}: {kind.__module__.split('.')[0]} {kind.__name__}")
    return sorted(found)


def same_files(one: Path, other: Path) -> list[str]:
    """How two Hugging Face directories differ."""
    mine, theirs = Checkpoint(one), Checkpoint(other)
    found = [f"{name} is only in one of the two directories" for name in mine.entries.keys() ^ theirs.entries.keys()]
    both = mine.entries.keys() & theirs.entries.keys()
    return found + [
        f"{name} comes back otherwise" for name in both if not torch.equal(mine.read(name), theirs.read(name))
    ]


def compare(directory: Path, groups: Groups, run: schema.Run, *, adapters: bool) -> tuple[list[str], list[str]]:
    """What is wrong with one family in one layout, on this rank, and its classes. Collective."""
    source = Source(directory)
    local = made(run, groups, source, CPU, reads_inputs=adapters)
    part = made(run, groups, source, ON_TE, reads_inputs=adapters)
    found, kinds = wrong(part, local), classes(part)
    if adapters:
        tuner = find_tuner(schema.Lora(rank=4, target_modules=("all-linear",)))
        for each in (local, part):
            tuner.attach(each, seed=run.train.seed)
        found += differences(list(tuner.exported(part)), list(tuner.exported(local)))
    else:
        with tempfile.TemporaryDirectory() if groups.rank == 0 else contextlib.nullcontext("") as made_here:
            everyone = [made_here]
            dist.broadcast_object_list(everyone)
            scratch = Path(everyone[0])
            save(part, groups, scratch / "hf", source=directory, dtypes=DTYPE, max_shard_bytes=1 << 40)
            found += same_files(scratch / "hf", directory)
            if groups.layout.world > 1:  # on one rank, checkpoints differ only in the shards, and take as long
                found += exchanged(part, local, groups, scratch, source)
            dist.barrier()
    return found, kinds


def exchanged(part: ModelPart, local: ModelPart, groups: Groups, scratch: Path, source: Source) -> list[str]:
    """What is wrong after the Megatron checkpoint of each kind of modules was read into the other kind."""
    found = []
    for name, writer, reader in (("local", local, part), ("te", part, local)):
        save_mcore(writer, groups, scratch / name, source.tensors)
        for named in reader.named_parameters():
            named.parameter.data.fill_(7)
        load_mcore(reader, groups, scratch / name)
        found += [f"checkpoint {name}: {each}" for each in wrong(part, local)]
    return found


def of_rank(models: Mapping[str, Path], layouts: Mapping[str, Layout], run: schema.Run) -> dict[str, Any]:
    """One rank: all models in their layouts, all with the same number of ranks, and what is wrong on any rank.

    The groups of a process are made once, because their threads stay.
    """
    answers: dict[str, Any] = {}
    groups = init(next(iter(layouts.values())))
    for name, layout in layouts.items():
        answers[name] = {}
        for tuner in ("full", "lora"):
            mine = dataclasses.replace(groups, layout=layout)
            try:
                found, kinds = compare(models[name], mine, run, adapters=tuner == "lora")
            except Exception:  # any error belongs to this family; the others are still tested
                found, kinds = [traceback.format_exc()], []
            everyone: list[list[str]] = [[] for _ in range(layout.world)]
            dist.all_gather_object(everyone, found)
            answers[name][tuner] = {"wrong": sorted(set(itertools.chain.from_iterable(everyone))), "classes": kinds}
    return answers


def layout_of(name: str, directory: Path) -> Layout:
    """The layout for one model; UserError where the model cannot have it."""
    parallel, world = parse_layout(name)
    settings = load_settings(directory)
    layout = plan_layout(parallel, settings.shape, world)
    check_biases(settings, layout.expert_tensor)
    return layout


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    options.add_argument("work", type=Path)
    options.add_argument("--families", nargs="*", default=list(tiny.FAMILIES))
    given = options.parse_args()
    with cuda_answers():
        import transformer_engine.pytorch  # noqa: F401
    models = {name: tiny.make(given.work / name, name, dtype=DTYPE) for name in given.families}
    found: dict[str, Any] = {}
    tiled = schema.Train(tile_mlp=True)
    cases = [(name, name, list(models), schema.Train()) for name in LAYOUTS]
    cases += [(f"tiled {name}", name, [one for one in TILED if one in models], tiled) for name in LAYOUTS[1:]]
    for title, name, names, train in cases:
        layouts, refused = {}, {}
        for family in names:
            try:
                layouts[family] = layout_of(name, models[family])
            except UserError as error:
                refused[family] = {"refused": str(error)}
        run = schema.Run(parallel=parse_layout(name)[0], train=train)
        answers = run_ranks(parse_layout(name)[1], of_rank, models, layouts, run, device_kind="cpu") if layouts else {}
        found[title] = answers | refused
    (given.work / "found.json").write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
