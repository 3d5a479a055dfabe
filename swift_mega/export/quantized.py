"""Quantises a model's linears to FP8, from files to files: one weight is in memory at a time, so a laptop can do it for a 400B model."""

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
    """Writes `model` with the linears of attention and MLP in FP8, with one scale per block of (rows, columns).

    dequantize: `model` is itself quantised, in any supported format. It is read in float32, so that FP8 with the same blocks is reproduced
    exactly. Raises UserError where a weight is missing or not finite; `output` is unchanged then.
    """
    target = Path(output)
    if Path(model).resolve().is_relative_to(target.resolve()):
        raise UserError(f"output {target} contains {model}, the input; choose another path")
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
