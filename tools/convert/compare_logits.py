"""Finds the first point where two checkpoints differ: compare_logits.py --a DIR --b DIR.

[--prompts FILE --a_layout tp2-sp --b_backend hf --dtype float64 --tolerance 1e-5 --json FILE --plot FILE.png]

Compares the hidden states after every layer, and the logits. Exit status: 0 equal within the tolerance, 1 not equal, 2 bad input.
Started by python, it starts the ranks on this machine. Started by torchrun or srun, both sides run in the existing ranks.
"""

import argparse
import sys

from swift_mega import api
from swift_mega.errors import UserError
from swift_mega.launch.torchrun import is_first_rank


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for side, role in (("a", "the reference"), ("b", "the checkpoint that is compared with it")):
        options.add_argument(f"--{side}", required=True, help=f"{role}: a Hugging Face or a Megatron directory")
        options.add_argument(
            f"--{side}_model", help="config and tokenizer for a Megatron directory that swift-mega did not write"
        )
        options.add_argument(f"--{side}_adapter", help="directory of a PEFT LoRA adapter to apply")
        options.add_argument(
            f"--{side}_backend",
            f"--{side}_engine",
            choices=("mcore", "hf"),
            help="Megatron-core or transformers; default: mcore where the model_type is supported",
        )
        options.add_argument(f"--{side}_layout", help="layout of Megatron's ranks, such as tp2-sp; default: single")
    options.add_argument("--prompts", help="text file, one prompt a line; default: a few sentences")
    options.add_argument("--tokenizer", help="directory of the tokenizer for both; default: their own")
    options.add_argument("--dtype", choices=("float32", "float64", "bfloat16"), default="float32", help="dtype of both")
    options.add_argument(
        "--tolerance", type=float, help="largest relative difference that is accepted; default: by dtype"
    )
    options.add_argument("--top_k", type=int, default=5, help="how many of the likeliest tokens are compared")
    options.add_argument("--dequantize", action="store_true", help="read quantised sides as plain weights")
    options.add_argument(
        "--scratch", help="folder for A's hidden states while B runs; on several machines a shared one"
    )
    options.add_argument("--json", help="JSON file for the results")
    options.add_argument("--plot", help="PNG file of the difference by layer")
    given = vars(options.parse_args())
    fields = ("model", "adapter", "backend", "layout")
    a, b = (
        api.Candidate(checkpoint=given.pop(side), **{field: given.pop(f"{side}_{field}") for field in fields})
        for side in "ab"
    )
    try:
        found = api.compare(a, b, **given)
    except UserError as error:
        if is_first_rank():
            print(f"compare_logits: error: {error}", file=sys.stderr)
        return 2
    if is_first_rank():
        print(found.table())
    return 0 if found.passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
