"""This rank's parameters into a Hugging Face directory: sizes first, then every owner writes its own tensors in place.

A directory appears whole or not at all: everything is written beside it under a name that nobody loads, then renamed. A rank that
cannot write keeps its place in the exchange of tensors, so that all ranks hear of it and stop with the same message.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from swift_mega.convert.hf_files import Planned, copy_companions, plan_files, some, write_headers, write_tensor
from swift_mega.convert.quantised import drop_quantization
from swift_mega.errors import UserError
from swift_mega.models.build import Held, ModelPart
from swift_mega.parallel.groups import Groups

Value = Callable[[Held], Tensor]


def whole_tensors(
    part: ModelPart, groups: Groups, exported: Iterable[Held], value: Value
) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face tensors, each whole on the one rank that owns it, one parameter in flight.

    Collective over the tensor ranks of data replica 0. exported: `part.held()`, or what a tuner holds. `value` gives what to
    export for a parameter (its data, its gradient, …), shaped like it. The owner is tensor rank 0 of the stage (and expert
    rank).
    """
    for held in exported:
        if held.copy or not _takes_part(part, held):
            continue
        group = groups.expert_tensor if held.expert else groups.tensor
        axis = part.tensor_axis(held) if held.rule.pack.axis is not None else (0, 1)
        shards = _gather(value(held).detach(), group, axis)
        if shards is not None:
            yield from zip(held.parts, _glue(part, held, shards), strict=True)


def _takes_part(part: ModelPart, held: Held) -> bool:
    """Data replica 0 exports; a parameter that tensor ranks share whole comes from tensor rank 0 alone."""
    where = part.coordinate
    if (where.expert_data if held.expert else where.data + where.context) != 0:
        return False
    return held.rule.pack.axis is not None or part.tensor_axis(held)[0] == 0


def _gather(shard: Tensor, group: dist.ProcessGroup, axis: tuple[int, int]) -> list[Tensor] | None:
    rank, size = axis
    if size == 1:
        return [shard]
    shard = shard.contiguous()
    shards = [torch.empty_like(shard) for _ in range(size)] if rank == 0 else None
    dist.gather(shard, shards, group=group, group_dst=0)
    return shards


def _glue(part: ModelPart, held: Held, shards: list[Tensor]) -> list[Tensor]:
    pack = held.rule.pack
    pieces = [pack.split(shard, part.settings.heads) for shard in shards]
    if pack.axis is None:
        return list(pieces[0])
    whole = [
        torch.cat(tensors, dim=pack.axis) if len(tensors) > 1 else tensors[0] for tensors in zip(*pieces, strict=True)
    ]
    return [tensor[: part.settings.shape.vocab] for tensor in whole] if pack.padded else list(pack.fuse(whole))


def owned(part: ModelPart, exported: Iterable[Held]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the Hugging Face tensors that this rank will yield from `whole_tensors`, in order."""
    mine: dict[str, tuple[int, ...]] = {}
    for held in exported:
        if not held.copy and _takes_part(part, held) and part.tensor_axis(held)[0] == 0:
            mine.update(zip(held.parts, part.part_shapes(held), strict=True))
    return mine


def save(
    part: ModelPart, groups: Groups, directory: str | Path, *, source: str | Path,
    dtypes: Mapping[str, torch.dtype] | torch.dtype, max_shard_bytes: int, overwrite: bool = False,
) -> None:  # fmt: skip
    """Writes a complete Hugging Face directory. Collective; `source` gives config, tokenizer and chat template.

    dtypes: of the tensors by Hugging Face name, or one for all.
    """

    def companions(staging: Path) -> None:
        copy_companions(Path(source), staging)
        drop_quantization(staging)
        if isinstance(dtypes, torch.dtype):
            _set_dtype(staging / "config.json", dtypes)

    write_directory(
        part, groups, Path(directory), list(part.held()), dtypes=dtypes, max_shard_bytes=max_shard_bytes, overwrite=overwrite,
        companions=companions,
    )  # fmt: skip


def write_directory(
    part: ModelPart, groups: Groups, target: Path, exported: Sequence[Held], *, dtypes: Mapping[str, torch.dtype] | torch.dtype,
    max_shard_bytes: int, companions: Callable[[Path], None], overwrite: bool = False, stem: str = "model",
    value: Value = lambda held: held.parameter,
) -> None:  # fmt: skip
    """Writes `exported` of all ranks as one safetensors directory; rank 0 adds the files that `companions` writes.

    value: what is written for a parameter, shaped like it.
    """
    shapes = _in_order(_gather_owned(part, exported))
    kinds = _kinds(shapes, dtypes)
    planned = plan_files({name: (kinds[name], shape) for name, shape in shapes.items()}, max_shard_bytes, stem)
    staging = staging_of(target)
    agree(on_first_rank(lambda: _begin(target, staging, planned, overwrite)))
    agree(_write(whole_tensors(part, groups, exported, value), staging, planned), staging)
    agree(on_first_rank(lambda: _finish(staging, target, companions)), staging)


def _write(tensors: Iterable[tuple[str, Tensor]], staging: Path, planned: Mapping[str, Planned]) -> str | None:
    """Writes this rank's tensors; returns what went wrong. It goes on taking tensors then: other ranks wait in `_gather`."""
    problem = None
    with torch.no_grad():
        for name, tensor in tensors:
            if problem is None:
                try:
                    write_tensor(staging, planned[name], tensor)
                except OSError as error:
                    problem = cannot_write(staging, error)
    return problem


def on_first_rank(action: Callable[[], None]) -> str | None:
    """Rank 0 acts; returns what went wrong there."""
    if dist.get_rank() == 0:
        try:
            action()
        except UserError as error:
            return str(error)
    return None


def agree(problem: str | None, staging: Path | None = None) -> None:
    """Every rank raises the UserError of the first rank that has a problem; none is left waiting. Rank 0 removes `staging`."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    said = next((text for text in problems if text is not None), None)
    if said is None:
        return
    if staging is not None and dist.get_rank() == 0:
        shutil.rmtree(staging, ignore_errors=True)
    raise UserError(said)


def _kinds(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype] | torch.dtype
) -> dict[str, torch.dtype]:
    if isinstance(dtypes, torch.dtype):
        return dict.fromkeys(shapes, dtypes)
    if unknown := [name for name in shapes if name not in dtypes]:
        raise UserError(
            f"no dtype is known for {some(unknown)}, which the source of this checkpoint did not have; give "
            "--torch_dtype bfloat16 or float32"
        )
    return {name: dtypes[name] for name in shapes}


def _gather_owned(part: ModelPart, exported: Sequence[Held]) -> dict[str, tuple[int, ...]]:
    gathered: list[dict[str, tuple[int, ...]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, owned(part, exported))
    shapes: dict[str, tuple[int, ...]] = {}
    for mine in gathered:
        twice = shapes.keys() & mine.keys()
        assert not twice, f"two ranks own {sorted(twice)[:3]}"
        shapes.update(mine)
    return shapes


def _in_order(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Layer by layer in number order, so that a file holds whole layers and a listing reads well."""

    def key(name: str) -> list[tuple[int, str | int]]:
        return [(1, int(word)) if word.isdigit() else (0, word) for word in re.split(r"(\d+)", name)]  # fmt: skip

    return {name: shapes[name] for name in sorted(shapes, key=key)}


def _begin(target: Path, staging: Path, planned: Mapping[str, Planned], overwrite: bool) -> None:
    check_output(target, overwrite)
    try:
        begin_staging(staging)
        write_headers(staging, planned)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise UserError(cannot_write(staging, error)) from None


def _finish(staging: Path, target: Path, companions: Callable[[Path], None]) -> None:
    try:
        companions(staging)
        publish(staging, target)
    except OSError as error:
        raise UserError(cannot_write(target, error)) from None


def staging_of(target: Path) -> Path:
    """Where `target` is written until it is complete."""
    return target.with_name(f"{target.name}.writing")


def begin_staging(staging: Path) -> None:
    """An empty staging directory, in place of one that a killed save left: never complete, never loaded."""
    if staging.is_dir():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)


def cannot_write(path: Path, error: OSError) -> str:
    """What to tell the user of an OSError while `path` was written."""
    return f"cannot write {path}: {error.strerror or error}; free the space or choose another --output"


def check_output(target: Path, overwrite: bool) -> None:
    """UserError where the output is there already and may not be replaced."""
    if target.exists() and not target.is_dir():
        raise UserError(f"output {target} is a file and is left as it is; choose another path")
    if target.is_dir() and not overwrite and any(target.iterdir()):
        raise UserError(
            f"output {target} exists already and is left as it is; choose another path, or pass --overwrite true"
        )


def publish(staging: Path, target: Path) -> None:
    """Makes a complete staging directory the target, replacing an older one, which is `.old` for the moment in between."""
    old = target.with_name(f"{target.name}.old")
    if target.exists():
        if old.exists():
            shutil.rmtree(old)
        os.rename(target, old)
    os.rename(staging, target)
    if old.exists():
        shutil.rmtree(old)


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    config = json.loads(path.read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2) + "\n")
