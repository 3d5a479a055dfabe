"""Long context in numbers: `python benchmarks/long_context.py [--parts a e] [--json FILE] [--plot FILE.png]`.

a  peak memory and time of one layer's forward and backward pass over rows of 4k to 64k tokens, beside the formula of plan/memory.py;
   the longest row that fits 2 GB, with and without the loss in chunks and tiled MLPs (ten minutes on one core that others use too)
e  the formula applied to Llama 3.1 8B on H100 GPUs of 80 GB: the longest row, technique by technique, beside the best published
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import memory_parts

Part = tuple[Callable[[Callable[[str], None]], dict[str, Any]], Callable[[dict[str, Any]], str]]
PARTS: dict[str, Part] = {
    "a": (memory_parts.measure, memory_parts.table),
    "e": (lambda say: memory_parts.plan(), memory_parts.plan_table),
}
"""What measures a part, and what makes a table of what it found."""


def main(given: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), default=sorted(PARTS), help="default: all")
    parser.add_argument(
        "--json", type=Path, help="writes what was found to this file; parts that it has and that are not run stay"
    )
    parser.add_argument("--plot", type=Path, help="draws memory over tokens, and the longest rows, to this file")
    arguments = parser.parse_args(given)
    found: dict[str, Any] = {}
    if arguments.json and arguments.json.exists():
        found = json.loads(arguments.json.read_text())
    for part in sorted(set(arguments.parts)):
        measure, table = PARTS[part]
        found[part] = measure(_say)
        print(f"({part})\n\n{table(found[part])}\n", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1))
    if arguments.plot:
        memory_parts.draw(found, arguments.plot)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
