"""A model's files with its linears in FP8, from files to files: one weight in memory at a time, so a 400B model fits a laptop."""

from pathlib import Path

from swift_mega.config.parse import parse_size
from swift_mega.convert.files.to_fp8 import BLOCK, fp8_linears, write_fp8
from swift_mega.convert.source import Source
from swift_mega.errors import UserError
from swift_mega.outputs import staged


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    block: tuple[int, int] = BLOCK,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    dequantize: bool = False,
) -> None:
    """Writes `model` with the linears of attention and MLP in FP8, a scale for each block of (rows, columns).

    dequantize: `model` is quantised itself, in this way or another; it is read in float32, so that FP8 of the same blocks stays as
    it is. Raises UserError, with `output` untouched, where a weight is missing or not finite.
    """
    target = Path(output)
    if Path(model).resolve().is_relative_to(target.resolve()):
        raise UserError(f"output {target} holds {model}, which is read; choose another path")
    source = Source(model, dequantize=dequantize)
    linears = fp8_linears(source.family, source.settings, source.tensors)
    with staged(target, overwrite=overwrite) as staging:
        write_fp8(
            source.tensors,
            linears,
            staging,
            max_shard_bytes=parse_size(max_shard_size),
            block=block,
            derived=source.family.derived,
        )
