"""A model's files with its linears in FP8, from files to files: one weight in memory at a time, so a 400B model fits a laptop."""

from pathlib import Path

import torch

from swift_mega.convert.files.hf_write import parse_size
from swift_mega.convert.files.quantised import open_checkpoint
from swift_mega.convert.files.to_fp8 import BLOCK, fp8_linears, write_fp8
from swift_mega.errors import UserError
from swift_mega.models.family import family_of
from swift_mega.models.translate import load_settings
from swift_mega.outputs import staged


def quantize(
    model: str | Path, output: str | Path, *, block: tuple[int, int] = BLOCK, max_shard_size: str = "5GB", overwrite: bool = False,
    dequantize: bool = False,
) -> None:  # fmt: skip
    """Writes `model` with the linears of attention and MLP in FP8, a scale for each block of (rows, columns).

    dequantize: `model` is quantised itself, in this way or another; it is read in float32, so that FP8 of the same blocks stays as
    it is. Raises UserError, with `output` untouched, where a weight is missing or not finite.
    """
    target = Path(output)
    if Path(model).resolve().is_relative_to(target.resolve()):
        raise UserError(f"output {target} holds {model}, which is read; choose another path")
    settings = load_settings(model, dequantize=dequantize)
    checkpoint = open_checkpoint(model, torch.float32 if dequantize else None)
    family = family_of(model).named_like(checkpoint.entries)
    linears = fp8_linears(family, settings, checkpoint)
    with staged(target, overwrite=overwrite) as staging:
        write_fp8(
            checkpoint,
            linears,
            staging,
            max_shard_bytes=parse_size(max_shard_size),
            block=block,
            derived=family.derived,
        )
