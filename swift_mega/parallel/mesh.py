"""How the ranks of the context axis are used: Ulysses inside (neighbours exchange heads), ring outside; pure arithmetic, no torch."""

import math
from dataclasses import dataclass
from typing import Literal

from swift_mega.errors import UserError

Kind = Literal["auto", "ring", "ulysses", "hybrid", "allgather"]


@dataclass(frozen=True)
class Mesh:
    """`ulysses` neighbours exchange heads, `ring` sets of them pass keys on, or gather them all (`gather`)."""

    ulysses: int = 1
    ring: int = 1
    gather: bool = False

    @property
    def size(self) -> int:
        return self.ulysses * self.ring

    @property
    def multiple(self) -> int:
        """A row's tokens must be a multiple of this."""
        return self.size * (2 if self.ring > 1 else 1)

    @property
    def name(self) -> str:
        if self.gather:
            return "allgather"
        if self.ring > 1 and self.ulysses > 1:
            return f"ulysses{self.ulysses}"
        return "ring" if self.ring > 1 else "ulysses"

    def place(self, rank: int) -> tuple[int, int]:
        """(Ulysses rank, ring position)."""
        return rank % self.ulysses, rank // self.ulysses


WHOLE = Mesh()
"""Of ranks that have whole rows."""


def key_copies(kv_heads: int, ulysses: int) -> int:
    """How often each key head must be there, so that Ulysses ranks can share them: the least that works."""
    return math.lcm(kv_heads, ulysses) // kv_heads


def choose_mesh(kind: Kind, size: int, *, heads: int, kv_heads: int, ulysses: int | None = None) -> tuple[Mesh, str]:
    """The mesh of `size` context ranks, and why, in words.

    heads, kv_heads: of one tensor rank. ulysses: the inner size of `hybrid`; None: as large as can be without a copy of a key head.
    UserError, with sizes that work, where the heads cannot be shared so.
    """
    if kind == "ring":
        return Mesh(1, size), "as asked"
    if kind == "allgather":
        return Mesh(1, size, gather=True), "as asked"
    if kind == "ulysses":
        if heads % size:
            sizes = _either([n for n in range(2, heads + 1) if heads % n == 0])
            raise UserError(
                f"parallel.cp=ulysses over {size} context ranks shares out heads, and {size} does not divide the {heads} query heads "
                f"of a tensor rank; choose parallel.context={sizes}, or parallel.cp=auto"
            )
        return Mesh(size, 1), _copies(kv_heads, size)
    free = [n for n in range(1, size + 1) if size % n == 0 and heads % n == 0 and kv_heads % n == 0]
    if kind == "auto":
        inner = free[-1]
        return Mesh(inner, size // inner), (
            f"{inner} is as far as {kv_heads} key head{'s' * (kv_heads != 1)} of a tensor rank can be shared among {size} without a copy"
            + (f"; the ring does the other {size // inner}" if inner < size else "")
        )
    fits = [n for n in range(2, size) if size % n == 0 and heads % n == 0]
    if not fits:
        raise UserError(
            f"parallel.cp=hybrid needs an inner size that divides {size} context ranks and {heads} query heads of a tensor rank, between 2 "
            f"and {size - 1}, and there is none; choose parallel.cp=auto"
        )
    inner = ulysses if ulysses is not None else max([n for n in free if 1 < n < size], default=fits[0])
    if inner not in fits:
        raise UserError(
            f"parallel.ulysses={inner} does not divide {size} context ranks and {heads} query heads of a tensor rank into a mesh; choose "
            f"{_either(fits)}"
        )
    return Mesh(inner, size // inner), _copies(kv_heads, inner)


def _copies(kv_heads: int, ulysses: int) -> str:
    copies = key_copies(kv_heads, ulysses)
    if copies == 1:
        return "as asked"
    heads = f"{kv_heads} key head{'s' * (kv_heads != 1)}"
    return f"as asked; each of {heads} of a tensor rank is sent {copies} times, since {ulysses} ranks share them"


def _either(sizes: list[int]) -> str:
    return " or ".join(map(str, sizes)) if sizes else "1"
