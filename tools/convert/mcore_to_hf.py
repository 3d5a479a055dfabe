"""Megatron-core (torch_dist) -> Hugging Face: mcore_to_hf.py --mcore DIR --output DIR [--dtype bfloat16 --max_shard_size 5GB --overwrite].

The checkpoint may have any layout. One process reads it, with a few hundred MB in memory.
"""

import argparse
import sys

from swift_mega import api
from swift_mega.errors import UserError
from swift_mega.launch.torchrun import is_first_rank


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--mcore", required=True, help="directory of the Megatron checkpoint")
    options.add_argument("--output", required=True, help="Hugging Face directory to write")
    options.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="dtype of the result; default: each tensor's own"
    )
    options.add_argument("--max_shard_size", default="5GB", help="bytes per file")
    options.add_argument(
        "--overwrite", action="store_true", help="replace the existing files, once the new ones are complete"
    )
    given = options.parse_args()
    try:
        api.convert(
            source=given.mcore,
            to="hf",
            output=given.output,
            dtype=given.dtype,
            max_shard_size=given.max_shard_size,
            overwrite=given.overwrite,
        )
    except UserError as error:
        if is_first_rank():
            print(f"mcore_to_hf: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
