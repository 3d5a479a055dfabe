"""No rank raises alone: an error that one rank finds between two collectives is raised on all ranks, with the same words."""

import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import tiny
from swift_mega import api
from swift_mega.config import schema
from swift_mega.convert.files.hf_files import Checkpoint
from swift_mega.convert.load import load
from swift_mega.errors import AgreedError, UserError
from swift_mega.models.build import build
from swift_mega.models.family import family_of
from swift_mega.models.megatron_config import transformer_config
from swift_mega.models.translate import load_settings
from swift_mega.parallel import groups
from swift_mega.parallel.agree import gather
from swift_mega.parallel.layout import plan_layout
from swift_mega.train.monitor import Monitor


def said_by_all(action: Callable[[], object]) -> list[str]:
    """The error of each rank. If a rank went on, or waits for one that raised, this does not return."""
    try:
        action()
    except AgreedError as error:
        said = str(error)
    except UserError as error:
        said = f"alone: {error}"
    else:
        said = "nothing"
    every = [""] * dist.get_world_size()
    dist.all_gather_object(every, said)
    return every


def load_what_is_cut_short(directory: Path) -> list[str]:
    """The first of two data replicas reads; the other waits for its data."""
    from swift_mega.device.device import setup

    layout = plan_layout(schema.Parallel(), load_settings(directory).shape, 2)
    mine = groups.init(layout)
    settings = load_settings(directory)
    config = transformer_config(settings, layout, device=setup(), dtype=torch.float32, train=schema.Train(), given={})
    part = build(family_of(directory), settings, layout, mine.coordinate, device=setup(), config=config)
    checkpoint = Checkpoint(directory)
    dist.barrier()
    if dist.get_rank() == 0:
        (file,) = directory.glob("*.safetensors")
        os.truncate(file, file.stat().st_size // 2)
    found = said_by_all(lambda: load(part, checkpoint, mine))
    groups.close()
    return found


def run_with(recipe: list[str], *changes: str) -> list[str]:
    run = api.load_recipe(None, [*recipe, *changes]).run
    return said_by_all(lambda: api.train(run))


def train_where_rank_0_cannot_write(recipe: list[str], folder: Path) -> dict[str, list[str]]:
    """All work of rank 0 alone, and a file on one machine that another machine does not have."""
    found = {}
    mine = recipe[1] if dist.get_rank() == 0 else "data.dataset=/nowhere/rows.jsonl"
    found["rows"] = run_with([recipe[0], mine, *recipe[2:]], f"train.output_dir={folder / 'rows'}")
    if dist.get_rank() == 0:
        (folder / "open" / "args.json.part").mkdir(parents=True)
        (folder / "merge").mkdir()
        (folder / "merge" / "checkpoint-2-merged.writing").write_text("in the way")
    dist.barrier()
    stays = "train.add_version=false"
    found["open"] = run_with(recipe, f"train.output_dir={folder / 'open'}", stays)
    found["merge"] = run_with(recipe, f"train.output_dir={folder / 'merge'}", stays, "export.merge_lora=true")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(folder / "log" / "logging.jsonl"))

    step, Monitor.step = Monitor.step, full  # type: ignore[method-assign,assignment]
    found["log"] = run_with(recipe, f"train.output_dir={folder / 'log'}", stays)
    Monitor.step = step  # type: ignore[method-assign]
    return found


def wait_on_the_host(folder: Path) -> tuple[list[int], list[str]]:
    """A rank that comes later than the timeout of a collective; and machines that do not find each other."""
    here = dist.get_rank()
    again = {"backend": "gloo", "rank": here, "world_size": 2, "timeout": timedelta(seconds=1)}
    dist.destroy_process_group()
    dist.init_process_group(store=dist.FileStore(str(folder / "one"), 2), **again)
    gather(here)
    if here == 0:
        time.sleep(1.5)
    came = gather(here)
    dist.destroy_process_group()
    dist.init_process_group(store=dist.FileStore(str(folder / "other"), 2), **again)
    os.environ["GLOO_SOCKET_IFNAME"] = "nowhere0"
    with pytest.raises(UserError) as error:
        gather(here)
    every = [""] * 2
    dist.all_gather_object(every, str(error.value))
    return came, every


def test_ranks_wait_for_one_another_on_the_host(ranks, tmp_path: Path) -> None:
    came, errors = ranks(2, wait_on_the_host, tmp_path, timeout=60)
    assert came == [0, 1]
    assert all(
        "cannot connect over gloo" in said and "set GLOO_SOCKET_IFNAME on every machine" in said for said in errors
    )


def test_a_file_that_cannot_be_read_on(ranks, tmp_path: Path) -> None:
    directory = tiny.make(tmp_path / "model", "llama", num_hidden_layers=2)
    one, other = ranks(2, load_what_is_cut_short, directory, timeout=60)
    assert one == other and "has changed since its header was read" in one and not one.startswith("alone")


def test_what_rank_0_cannot_write(ranks, tmp_path: Path) -> None:
    model = tiny.make_chat(tmp_path / "model", "llama", num_hidden_layers=2)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"query": f"{n}?", "response": f"{n}."}) for n in range(4)))
    recipe = [
        f"model.path={model}",
        f"data.dataset={rows}",
        "train.steps=2",
        "train.global_batch_size=2",
        "monitor.progress=false",
    ]
    found = ranks(2, train_where_rank_0_cannot_write, recipe, tmp_path, timeout=120)
    expected = {
        "rows": "/nowhere/rows.jsonl",
        "open": f"cannot write {tmp_path}/open",
        "merge": f"{tmp_path}/merge/checkpoint-2-merged",
        "log": "No space left on device",
    }
    for what, part in expected.items():
        one, other = found[what]
        assert one == other and part in one and not one.startswith("alone"), (what, found[what])
    assert not list(tmp_path.glob("*/*.writing/*"))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_problem_is_everybodys(ranks, rank: int) -> None:
    one, other = ranks(2, one_has_a_problem, rank, timeout=30)
    assert one == other == f"rank {rank} has one"


def one_has_a_problem(rank: int) -> list[str]:
    from swift_mega.parallel.agree import agree

    return said_by_all(lambda: agree(f"rank {rank} has one" if dist.get_rank() == rank else None))


def record_where_one_rank_is_full(folder: Path) -> list[str]:
    """The last of two stages has the norm and the head. It cannot write, and no other rank asks for these files before the end."""
    from swift_mega.device.device import setup
    from swift_mega.verify import distance as compare
    from swift_mega.verify.states import Side

    model = folder / "model"
    parallel = schema.Parallel(pipeline=2)
    shape = load_settings(model).shape
    side = Side(
        checkpoint=model,
        config=model,
        model=None,
        backend="mcore",
        mcore_files=False,
        layout=plan_layout(parallel, shape, 2),
        layers=shape.layers,
        hidden=shape.hidden,
        vocab=shape.vocab,
        adapter=None,
        dequantize=False,
    )
    states = folder / "states"
    if dist.get_rank() == 0:
        # Blocks the file of the last stage.
        (states / "prompt1" / f"{shape.layers + 1}.safetensors").mkdir(parents=True)
    dist.barrier()
    return said_by_all(lambda: compare.record(side, setup(), [[1, 2, 3], [4, 5, 6], [7, 8]], torch.float32, states))


def test_states_that_one_stage_cannot_write(ranks, tmp_path: Path) -> None:
    tiny.make(tmp_path / "model", "llama", num_hidden_layers=2)
    one, other = ranks(2, record_where_one_rank_is_full, tmp_path, timeout=60)
    assert one == other and one.startswith(f"{tmp_path}/states: ") and one.endswith("folder with --scratch"), one
