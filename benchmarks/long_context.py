"""Measurements of long context: `python benchmarks/long_context.py [--parts a b c d e] [--json FILE] [--plot FILE.png]`.

a  peak memory and time of one layer's forward and backward pass for rows of 4k to 64k tokens, and the formula of memory/memory.py;
   the longest row that fits in 2 GB, with and without chunked loss and tiled MLPs (takes twenty minutes on one shared core)
b  work of the ring ranks, slowest / mean: with our split, and with the whole row split zigzag or contiguously across examples
c  seconds of blocks and merging / seconds of plain attention on the same row; one process runs the work of all ranks
d  padding of packed data: padding of whole rows (ours), and of each example
e  the formula applied to Llama 3.1 8B on H100 GPUs with 80 GB: the longest row for each technique, and the longest published one
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import context_parts
import memory_parts

PARTS = ("a", "b", "c", "d", "e")


def measure(part: str, tokens: int, rounds: int) -> tuple[Any, str]:
    """(results of a part for JSON, its table as text)."""
    if part == "a":
        found = memory_parts.measure(_say)
        return found, memory_parts.table(found)
    if part == "e":
        found = memory_parts.plan()
        return found, memory_parts.plan_table(found)
    results, table = context_parts.part(part, tokens, rounds)
    return [asdict(one) for one in results], table


def main(given: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument(
        "--json", type=Path, help="writes the results to this file; results of parts that are not run stay in it"
    )
    parser.add_argument("--plot", type=Path, help="draws memory over tokens, and the longest rows, to this file")
    parser.add_argument(
        "--tokens", type=int, default=8192, help="tokens of the rows of b and c, a multiple of 16 (default 8192)"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds of b and c, of which medians are printed (default 5)"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="every part as small as can be, to see that all of it runs"
    )
    arguments = parser.parse_args(given)
    if arguments.smoke:
        arguments.tokens = 512
        _smoke(arguments)
        return
    if arguments.tokens <= 0 or arguments.tokens % 16 or arguments.rounds < 1:
        parser.error(
            "--tokens is split into 16 chunks at CP 8, so it must be a multiple of 16, and --rounds at least 1"
        )
    found: dict[str, Any] = {}
    if arguments.json and arguments.json.exists():
        found = json.loads(arguments.json.read_text())
    for part in sorted(set(arguments.parts)):
        found[part], table = measure(part, arguments.tokens, arguments.rounds)
        print(f"({part})\n\n{table}\n", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1))
    if arguments.plot:
        memory_parts.draw(found, arguments.plot)


def _smoke(arguments: argparse.Namespace) -> None:
    """Runs every part with few tokens and one round; part (a) with one choice and two rows. Results must be complete and finite."""
    with tempfile.TemporaryDirectory(prefix="swift-mega-smoke-") as folder:
        plot = Path(folder) / "plot.png"
        small = memory_parts.measure(_say, choices=("+ tile_mlp",), lengths=(1024, 2048), given=100_000_000)
        found = {"a": small, "e": memory_parts.plan()}
        print(memory_parts.table(found["a"]), memory_parts.plan_table(found["e"]), sep="\n")
        memory_parts.draw(found, plot)
        assert plot.stat().st_size > 1000
        assert all(one["peak"] > 0 and one["formula"] > 0 for one in small["points"] + small["longest"]), small
    for part in "bcd":
        results, table = context_parts.part(part, arguments.tokens, 1, examples=500)
        print(table)
        numbers = [value for one in results for value in vars(one).values() if isinstance(value, float)]
        assert results and all(map(math.isfinite, numbers)), results


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
