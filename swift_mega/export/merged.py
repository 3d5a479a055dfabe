"""Merges an adapter into base weights, from files to files: each tensor is read, added to in float32, and written.

The base directory is never changed. Only one tensor is in memory at a time, so a 400B model can be merged on a laptop.
"""

from pathlib import Path

import torch

import swift_mega.tuners as tuners
from swift_mega.config.parse import parse_size
from swift_mega.convert.files.hf_write import (
    Writer,
    bytes_needed,
    copy_companions,
    edit_config,
    plan_files,
    write_headers,
)
from swift_mega.convert.files.quantised import drop_quantization, open_checkpoint
from swift_mega.convert.files.report import write_report
from swift_mega.convert.files.tensors import TensorSource
from swift_mega.discover import scan
from swift_mega.errors import UserError
from swift_mega.export.companions import of_adapter
from swift_mega.outputs import staged
from swift_mega.tuners.lora_files import known_family, read_adapter_config
from swift_mega.tuners.merged import Merged


def merged_of(base: TensorSource, adapters: str | Path) -> Merged:
    """`base` with the adapter in a PEFT directory merged in, by the tuner that writes such adapters; UserError where there is none."""
    path, config = read_adapter_config(adapters)
    kind = config.get("peft_type")
    known = {tuner.peft_type: tuner for tuner in scan(tuners, "TUNER").values() if tuner.peft_type is not None}
    if kind not in known:
        raise UserError(f"{path}: peft_type is {kind!r}; only {', '.join(sorted(known))} can be merged")
    return known[kind].merge(base, adapters)  # type: ignore[no-any-return]


def merge(
    model: str | Path,
    adapters: str | Path,
    output: str | Path,
    *,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    dequantize: bool = False,
) -> None:
    """Writes `model` with `adapters` merged in as a Hugging Face directory, in the dtypes of `model`.

    dequantize: a quantised `model` is merged in float32 and written as plain weights, in the dtype that its config.json names.
    Raises UserError where the adapter names a module that the model does not have; `output` is unchanged then.
    """
    base = open_checkpoint(model, torch.float32 if dequantize else None)
    target = Path(output)
    for source in (model, adapters):
        if Path(source).resolve().is_relative_to(target.resolve()):
            raise UserError(f"output {target} contains {source}, the input; choose another path")
    sums, trained = merged_of(base, adapters), of_adapter(adapters)
    base, kinds = sums.base, sums.dtypes
    planned = plan_files(
        {name: (kinds[name], entry.shape) for name, entry in base.entries.items()}, parse_size(max_shard_size)
    )
    with staged(target, overwrite=overwrite, needed=bytes_needed(planned, Path(model))) as staging:
        write_headers(staging, planned)
        derived = family.derived if (family := known_family(base)) else lambda name: False
        with Writer(staging, planned, allow_nonfinite=derived) as writer:
            for name, place in planned.items():
                value = base.read(name)
                # The sum is in float32 or wider; the writer rounds it, and raises an error where it exceeds the range of the dtype.
                wide = torch.promote_types(place.dtype, torch.float32)
                writer.write(name, sums.merged(name, value, wide) if name in sums.changed else value)
            found = writer.finish()
        copy_companions(Path(model), staging)
        trained.write(staging)
        edit_config(staging, sums.config_edits)
        if dequantize:
            drop_quantization(staging)
        write_report(staging, planned, found)
