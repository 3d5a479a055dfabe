"""Draws docs/token_layout.svg: which context rank has which tokens of a packed row, from the code that splits it.

`--check` only compares the file with the current code.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from swift_mega.parallel.mesh import Mesh
from swift_mega.parallel.sequence import pieces

TARGET = Path(__file__).parent.parent / "docs" / "token_layout.svg"
EXAMPLES = (0, 6, 36, 40, 45, 52, 55, 64)
"""Begin of each example in the packed row, then the end of the row (cu_seqlens)."""
MESHES = (
    ("--cp ulysses", Mesh(4, 1)),
    ("--cp ring, allgather", Mesh(1, 4)),
    ("--cp hybrid, Ulysses 2 x ring 2", Mesh(2, 2)),
    ("--cp te:p2p", Mesh(1, 4, te=True)),
)
COLOURS = ("#4477aa", "#66ccee", "#ccbb44", "#ee6677")
LEFT, WIDTH, HEIGHT, GAP = 230, 640, 26, 14


def draw() -> str:
    """The picture as SVG text."""
    tokens = EXAMPLES[-1]
    lines = list(
        _row(
            0,
            f"row of {len(EXAMPLES) - 1} examples",
            [(a, b, "#dddddd", "") for a, b in zip(EXAMPLES, EXAMPLES[1:], strict=False)],
            tokens,
        )
    )
    for number, (name, mesh) in enumerate(MESHES, 1):
        bounds = _padded(mesh.example_multiple)
        ranges = [
            (start, stop, COLOURS[rank], str(rank))
            for rank in range(mesh.size)
            for start, stop in pieces(bounds, mesh, rank)
        ]
        lines += _row(number, name, sorted(ranges), bounds[-1])
    height = (len(MESHES) + 1) * (HEIGHT + GAP) + GAP
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 10} {height}" font-family="sans-serif" font-size="13">'
    return "\n".join((head, *lines, "</svg>", ""))


def _padded(multiple: int) -> tuple[int, ...]:
    """cu_seqlens with each example padded to a multiple of `multiple` tokens."""
    bounds = [0]
    for start, stop in zip(EXAMPLES, EXAMPLES[1:], strict=False):
        bounds.append(bounds[-1] - (start - stop) // multiple * multiple)
    return tuple(bounds)


def _row(number: int, name: str, ranges: list[tuple[int, int, str, str]], tokens: int) -> Iterator[str]:
    top, scale = GAP + number * (HEIGHT + GAP), WIDTH / tokens
    yield f'<text x="4" y="{top + 18}">{name}</text>'
    for start, stop, colour, text in ranges:
        x, width = LEFT + start * scale, (stop - start) * scale
        yield f'<rect x="{x:.1f}" y="{top}" width="{width:.1f}" height="{HEIGHT}" fill="{colour}" stroke="white"/>'
        if text:
            yield f'<text x="{x + width / 2:.1f}" y="{top + 18}" text-anchor="middle">{text}</text>'


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(TARGET.read_text() != draw())
    TARGET.write_text(draw())
