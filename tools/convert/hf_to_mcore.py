"""Hugging Face -> Megatron-core (torch_dist): hf_to_mcore.py --model DIR --output DIR.

[--tp 2 --pp 2 --ep 2 --etp 1 --dtype bfloat16 --dequantize --dry_run]

Started by python, one process writes for all ranks, with a few hundred MB in memory. Started by torchrun or srun, each rank does its part.
"""

import argparse
import sys

from swift_mega import api
from swift_mega.config.schema import Parallel
from swift_mega.errors import UserError
from swift_mega.launch.torchrun import is_first_rank


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True, help="Hugging Face directory")
    options.add_argument("--output", help="directory to write; must be absent or empty. Not needed with --dry_run")
    for name, what in (("tp", "tensor"), ("pp", "pipeline"), ("ep", "expert")):
        options.add_argument(f"--{name}", type=int, default=1, help=f"{what} parallel size")
    options.add_argument("--etp", type=int, help="expert tensor parallel size; default: --tp")
    options.add_argument("--dtype", choices=("bfloat16", "float32"), help="dtype of the result; default: the source's")
    options.add_argument("--dequantize", action="store_true", help="read a quantised model as plain weights")
    options.add_argument(
        "--dry_run", action="store_true", help="only show which parameters each rank would have and read"
    )
    given = options.parse_args()
    if given.output is None and not given.dry_run:
        options.error("--output DIR is missing")
    parallel = Parallel(tensor=given.tp, pipeline=given.pp, expert=given.ep, expert_tensor=given.etp)
    chosen = {"source": given.model, "parallel": parallel, "dtype": given.dtype, "dequantize": given.dequantize}
    try:
        if given.dry_run:
            print(api.plan(**chosen).table())
        else:
            api.convert(to="mcore", output=given.output, **chosen)
    except UserError as error:
        if is_first_rank():
            print(f"hf_to_mcore: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
