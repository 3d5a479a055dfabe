"""Conversion of checkpoints, the report on a conversion, merging of adapters, and quantisation to FP8."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from swift_mega.api.ready import on_device
from swift_mega.api.resizing import asks, resized
from swift_mega.config import schema
from swift_mega.config.parse import parse_size
from swift_mega.convert import blueprint_report
from swift_mega.convert.blueprint import make_blueprint
from swift_mega.convert.blueprint_report import ConversionReport, rest_of
from swift_mega.convert.check import carried_of
from swift_mega.convert.files import stream
from swift_mega.convert.files.resized import weights_of
from swift_mega.convert.files.which_files import PICKLES, unread
from swift_mega.convert.megatron.mcore import (
    companions_of,
    is_mcore,
    iteration_directory,
    load_mcore,
    save_mcore,
    widest,
)
from swift_mega.convert.megatron.padding import check_padding
from swift_mega.convert.save import save
from swift_mega.convert.source import Source
from swift_mega.convert.whole import read_mcore, write_mcore
from swift_mega.device.device import Device
from swift_mega.errors import UserError
from swift_mega.export import merged, quantized
from swift_mega.launch.torchrun import is_alone, is_first_rank, run_ranks
from swift_mega.models.build import build
from swift_mega.models.megatron_config import transformer_config
from swift_mega.models.quantization import quantization_of, stored_dtype
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.layout import Layout, plan_layout, ranks_needed
from swift_mega.train.build import build_part, dequantised_dtype


def convert(
    *,
    source: str,
    to: str,
    output: str,
    model: str | None,
    parallel: schema.Parallel | None,
    dtype: str | None,
    max_shard_size: str,
    overwrite: bool,
    dequantize: bool,
    rows: schema.Model | None,
) -> None:
    """Does what `api.convert` says."""
    if rows is not None and asks(rows):
        if is_mcore(source):
            raise UserError(
                f"{source} is a Megatron checkpoint, to which rows cannot be added; convert it to Hugging Face files first"
            )
        # Checks that every tensor of the original model is read once.
        plan(source=source, dtype=dtype, dequantize=dequantize)
        with resized(schema.Run(model=dataclasses.replace(rows, path=source))) as larger:
            assert larger.model.path is not None
            run = schema.Run(parallel=parallel or schema.Parallel())
            _convert(run, larger.model.path, to, output, None, dtype, max_shard_size, overwrite)
        return
    run = schema.Run(model=schema.Model(dequantize=dequantize), parallel=parallel or schema.Parallel())
    _convert(run, source, to, output, model, dtype, max_shard_size, overwrite)


def _convert(
    run: schema.Run,
    source: str,
    to: str,
    output: str,
    model: str | None,
    dtype: str | None,
    max_shard_size: str,
    overwrite: bool,
) -> None:
    """`convert` of a source whose vocabulary stays. run: the layout, and whether quantised weights are read."""
    if run.parallel.context > 1:
        raise UserError(
            f"parallel.context={run.parallel.context}: context ranks have the same weights, so a checkpoint is the same for every "
            "context size; remove it"
        )
    kind = getattr(torch, dtype) if dtype else None
    if to == "mcore":
        _to_megatron(run, _source(run, source, kind), output, kind, overwrite)
    elif (Path(source) / "config.json").is_file() and not is_mcore(source):
        _rewrite(run, _source(run, source, kind), output, dtype, parse_size(max_shard_size), overwrite)
    else:
        _from_megatron(run, source, output, model, kind, parse_size(max_shard_size), overwrite)


def _to_megatron(run: schema.Run, source: Source, output: str, kind: torch.dtype | None, overwrite: bool) -> None:
    """A Hugging Face directory as a Megatron checkpoint in the run's layout. kind: as `convert`'s dtype."""
    tensors, layout = source.tensors, _layout_for(run, source)
    if is_first_rank():
        for note in source.settings.notes:
            print(note)
    say_of_source(source, kept=True)
    wide = kind or widest(tensors, source.family)
    if is_alone():
        run_ranks(1, _whole_to_mcore, layout, wide, source, output, overwrite)
        return
    minutes = run.parallel.distributed_timeout_minutes
    run_ranks(layout.world, on_device, _to_mcore, run, layout, wide, source, output, overwrite, timeout_minutes=minutes)


def _rewrite(
    run: schema.Run, source: Source, output: str, dtype: str | None, shard_bytes: int, overwrite: bool
) -> None:
    """A Hugging Face directory as another one, of other dtype and file sizes."""
    tensors = source.tensors
    derived: Callable[[str], bool] = _nothing
    if source.is_known:
        plan(source=str(source.directory), dtype=dtype, dequantize=run.model.dequantize)
        derived = source.family.derived
    say_of_source(source, kept=source.is_known)
    if not source.is_known:
        print(f"model_type {source.config['model_type']} is not known: tensors are copied, not checked against it")
    kind = getattr(torch, dtype) if dtype else None
    stream.restream(tensors, output, dtype=kind, max_shard_bytes=shard_bytes, overwrite=overwrite, derived=derived)


def _from_megatron(
    run: schema.Run,
    source: str,
    output: str,
    model: str | None,
    kind: torch.dtype | None,
    shard_bytes: int,
    overwrite: bool,
) -> None:
    """Converts a Megatron checkpoint to a Hugging Face directory. model: as in `convert`. kind: `dtype` of `convert`."""
    iteration_directory(source)
    if run.model.dequantize:
        raise UserError(
            f"dequantize=True, but the weights of {source} are Megatron's, which are plain; set dequantize=False"
        )
    folder, kinds = companions_of(source, model)
    if kinds is None and kind is None:
        raise UserError(f"the dtypes of {source} are unknown, since {folder} has no weights; give --torch_dtype")
    # Where the original model is quantised, Megatron's weights are the dequantised ones, and the output is plain too.
    run = dataclasses.replace(run, model=schema.Model(dequantize=quantization_of(folder) is not None))
    original = Source(folder, dequantize=run.model.dequantize, names=kinds or ())
    layout, minutes = _layout_for(run, original), run.parallel.distributed_timeout_minutes
    if (said := check_padding(source, folder, original.settings.shape.vocab)) and is_first_rank():
        print(said)
    rest = (source, kind or kinds, shard_bytes, overwrite)
    if not is_alone():
        wide = _promoted(kinds) if kinds else kind
        run_ranks(layout.world, on_device, _to_hf, run, layout, wide, original, output, *rest, timeout_minutes=minutes)
        return
    number, size = run_ranks(1, _whole_to_hf, original, output, *rest)
    if number:
        print(f"{number} tensors and objects of a training run's state ({size / 1e9:.3f} GB) in {source} were not read")


def say_of_source(source: Source, *, kept: bool = False, trained: bool = False) -> None:
    """Prints one line about tensors of a directory that are not read and, with `kept`, one about tensors that are carried only."""
    if not is_first_rank():
        return
    if said := unread(weights_of(source.directory)):
        print(said)
    if kept and (carried := carried_of(source.settings, source.tensors.entries)):
        print(f"{rest_of(carried, {})}{', and not trained' if trained else ''}")


def _nothing(name: str) -> bool:
    return False


def _source(run: schema.Run, directory: str, kind: torch.dtype | None) -> Source:
    return Source(directory, dequantize=dequantised_dtype(run.model, kind or stored_dtype(directory)) or False)


def plan(
    *, source: str, dtype: str | None, dequantize: bool, parallel: schema.Parallel | None = None
) -> ConversionReport:
    """Does what `api.plan` says."""
    run = schema.Run(model=schema.Model(dequantize=dequantize), parallel=parallel or schema.Parallel())
    kind = getattr(torch, dtype) if dtype else None
    model_source = _source(run, source, kind)
    layout = _layout_for(run, model_source)
    checkpoint = model_source.tensors if model_source.has_weights or _other_weights(source) else None
    if checkpoint is not None:
        kind = kind or widest(checkpoint, model_source.family)
    blueprint = run_ranks(1, make_blueprint, model_source)
    return blueprint_report.make(
        blueprint, layout, dtype=kind or torch.bfloat16, directory=Path(source), checkpoint=checkpoint
    )


def _other_weights(source: str) -> bool:
    """Whether a directory has weight files of a form that `convert` does not read; opening them raises the error with the reason."""
    return any(file.suffix in (".safetensors", *PICKLES) for file in Path(source).glob("*"))


def _layout_for(run: schema.Run, source: Source) -> Layout:
    return plan_layout(run.parallel, source.settings.shape, ranks_needed(run.parallel), training=False)


def _promoted(kinds: Mapping[str, torch.dtype]) -> torch.dtype:
    wide = next(iter(kinds.values()))
    for kind in kinds.values():
        wide = torch.promote_types(wide, kind)
    return wide


def _whole_to_mcore(layout: Layout, kind: torch.dtype, source: Source, output: str, overwrite: bool) -> None:
    write_mcore(make_blueprint(source, kind), layout, output, source.tensors, overwrite=overwrite)


def _whole_to_hf(
    original: Source, output: str, source: str, dtypes: Any, shard_bytes: int, overwrite: bool
) -> tuple[int, int]:
    return read_mcore(
        make_blueprint(original),
        source,
        output,
        source=original.directory,
        dtypes=dtypes,
        max_shard_bytes=shard_bytes,
        overwrite=overwrite,
    )


def _to_mcore(
    run: schema.Run,
    device: Device,
    layout: Layout,
    kind: torch.dtype,
    source: Source,
    output: str,
    overwrite: bool,
) -> None:
    groups = parallel_groups.init(layout, timeout_minutes=run.parallel.distributed_timeout_minutes)
    try:
        part = build_part(run, device, groups, dtype=kind, reads_inputs=False, source=source)
        save_mcore(part, groups, output, source.tensors, overwrite=overwrite)
    finally:
        parallel_groups.close()


def _to_hf(
    run: schema.Run,
    device: Device,
    layout: Layout,
    kind: torch.dtype,
    original: Source,
    output: str,
    source: str,
    dtypes: Any,
    shard_bytes: int,
    overwrite: bool,
) -> None:
    groups = parallel_groups.init(layout, timeout_minutes=run.parallel.distributed_timeout_minutes)
    try:
        settings = original.settings
        config = transformer_config(settings, layout, device=device, dtype=kind, train=run.train, given={})
        part = build(original.family, settings, layout, groups.coordinate, device=device, config=config)
        load_mcore(part, groups, source)
        save(
            part,
            groups,
            output,
            source=original.directory,
            dtypes=dtypes,
            max_shard_bytes=shard_bytes,
            overwrite=overwrite,
            convert_carried=True,
        )
    finally:
        parallel_groups.close()


def export(
    *, model: str, adapters: str, output: str, merge: bool, max_shard_size: str, overwrite: bool, dequantize: bool
) -> None:
    """Does what `api.export` says."""
    if not merge:
        raise UserError("merge=False: an adapter is in PEFT's format already; nothing to export")
    say_of_source(Source(model))
    merged.merge(model, adapters, output, max_shard_size=max_shard_size, overwrite=overwrite, dequantize=dequantize)


def quantize(
    *, model: str, output: str, block: tuple[int, int], max_shard_size: str, overwrite: bool, dequantize: bool
) -> None:
    """Does what `api.quantize` says."""
    say_of_source(Source(model))
    quantized.quantize(
        model, output, block=block, max_shard_size=max_shard_size, overwrite=overwrite, dequantize=dequantize
    )
