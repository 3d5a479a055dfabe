"""How the ranks of the context axis are used: Ulysses inside (neighbours exchange heads), ring outside; pure arithmetic, no torch."""

import math
from dataclasses import dataclass
from typing import get_args

from swift_mega.config.schema import ContextKind as Kind
from swift_mega.errors import UserError

TE_KINDS: tuple[str, ...] = tuple(kind for kind in get_args(Kind) if kind.startswith("te:"))
"""The kinds that Transformer Engine computes, on CUDA."""
WITH_INNER = ("hybrid", "te:a2a+p2p")
"""The kinds whose inner size the user can choose."""


@dataclass(frozen=True)
class Mesh:
    """Sets of `ulysses` neighbouring ranks exchange heads. `ring` such sets pass keys on, or gather them all (`gather`).

    te: Transformer Engine does this communication. It splits every example separately, into 2 * size chunks, two of them for each
    rank.
    """

    ulysses: int = 1
    ring: int = 1
    gather: bool = False
    te: bool = False

    @property
    def size(self) -> int:
        return self.ulysses * self.ring

    @property
    def multiple(self) -> int:
        """A row's tokens must be a multiple of this."""
        return self.size * (2 if self.ring > 1 or self.te else 1)

    @property
    def example_multiple(self) -> int:
        """The tokens of each example of the row, with the padding that follows them, must be a multiple of this."""
        return self.multiple if self.te else 1

    @property
    def communication(self) -> str:
        """Transformer Engine's name for the communication between context ranks (cp_comm_type)."""
        if self.gather:
            return "all_gather"
        if self.ring > 1 and self.ulysses > 1:
            return "a2a+p2p"
        return "p2p" if self.ring > 1 else "a2a"

    @property
    def name(self) -> str:
        if self.te:
            inner = f"te:a2a{self.ulysses}+p2p" if self.communication == "a2a+p2p" else None
            return inner or f"te:{self.communication.replace('_', '')}"
        if self.gather:
            return "allgather"
        if self.ring > 1 and self.ulysses > 1:
            return f"ulysses{self.ulysses}"
        return "ring" if self.ring > 1 else "ulysses"

    def place(self, rank: int) -> tuple[int, int]:
        """(Ulysses rank, ring rank)."""
        return rank % self.ulysses, rank // self.ulysses


WHOLE = Mesh()
"""The mesh of ranks that have whole rows."""


def key_copies(kv_heads: int, ulysses: int) -> int:
    """How many copies of each key head there must be, so that Ulysses ranks can share them evenly: the smallest number that works."""
    return math.lcm(kv_heads, ulysses) // kv_heads


def choose_mesh(kind: Kind, size: int, *, heads: int, kv_heads: int, ulysses: int | None = None) -> tuple[Mesh, str]:
    """The mesh of `size` context ranks, and why, in words.

    heads, kv_heads: of one tensor rank. ulysses: the inner size of `WITH_INNER`; None: the largest that needs no copy of a key head.
    UserError, with sizes that work, where the ranks cannot share the heads so.
    """
    if kind in ("te:p2p", "te:allgather"):
        return Mesh(1, size, gather=kind == "te:allgather", te=True), "as set"
    if kind in ("te:a2a", "te:a2a+p2p"):
        return _te_mesh(kind, size, heads, kv_heads, ulysses), "as set"
    if kind == "ring":
        return Mesh(1, size), "as set"
    if kind == "allgather":
        return Mesh(1, size, gather=True), "as set"
    if kind == "ulysses":
        if heads % size:
            sizes = _either([n for n in range(2, heads + 1) if heads % n == 0])
            raise UserError(
                f"parallel.cp=ulysses over {size} context ranks splits heads, and {size} does not divide the {heads} query heads "
                f"of a tensor rank; choose parallel.context={sizes}, or parallel.cp=auto"
            )
        return Mesh(size, 1), _copies(kv_heads, size)
    free = [n for n in range(1, size + 1) if size % n == 0 and heads % n == 0 and kv_heads % n == 0]
    if kind == "auto":
        inner = free[-1]
        return Mesh(inner, size // inner), (
            f"{inner} of {size} ranks can split {kv_heads} key head{'s' * (kv_heads != 1)} of a tensor rank without copies"
            + (f"; a ring of {size // inner} for the rest" if inner < size else "")
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


def check_te(kind: str, *, no_te_context: str | None, windows: bool) -> None:
    """UserError where Transformer Engine is asked for and has no kernels for the model. The rules are those of its
    attn_forward_func_with_cp.

    no_te_context: why not, from `ModelShape`.
    """
    if kind not in TE_KINDS:
        return
    if no_te_context is not None:
        raise UserError(
            f"parallel.cp={kind} is Transformer Engine's attention, and this model {no_te_context}; set parallel.cp=auto"
        )
    if windows and kind in ("te:p2p", "te:a2a+p2p"):
        raise UserError(
            f"parallel.cp={kind}: this model has sliding windows, which Transformer Engine supports over context ranks with te:a2a and "
            "te:allgather only; choose one of these, or parallel.cp=auto"
        )


def _te_mesh(kind: Kind, size: int, heads: int, kv_heads: int, ulysses: int | None) -> Mesh:
    """The mesh for Transformer Engine, which shares query and key heads evenly and makes no copies of a key head."""
    shared = math.gcd(heads, kv_heads)
    has = f"the {heads} query and {kv_heads} key heads of a tensor rank, which Transformer Engine splits without copies"
    if kind == "te:a2a":
        if shared % size:
            sizes = _either([n for n in range(2, shared + 1) if shared % n == 0])
            raise UserError(
                f"parallel.cp=te:a2a: {size} context ranks do not divide {has}; choose parallel.context={sizes}, or parallel.cp=auto"
            )
        return Mesh(size, 1, te=True)
    fits = [n for n in range(2, size) if size % n == 0 and shared % n == 0]
    if not fits:
        raise UserError(
            f"parallel.cp=te:a2a+p2p needs an inner size between 2 and {size - 1} that divides {size} context ranks and {has}, and there "
            "is none; choose parallel.cp=te:p2p or auto"
        )
    if ulysses is not None and ulysses not in fits:
        raise UserError(
            f"parallel.ulysses={ulysses} with parallel.cp=te:a2a+p2p does not divide {size} context ranks and {has} into a mesh; choose "
            f"{_either(fits)}"
        )
    inner = ulysses or fits[-1]
    return Mesh(inner, size // inner, te=True)


def _copies(kv_heads: int, ulysses: int) -> str:
    copies = key_copies(kv_heads, ulysses)
    if copies == 1:
        return "as set"
    heads = f"{kv_heads} key head{'s' * (kv_heads != 1)}"
    return f"as set; each of {heads} of a tensor rank is sent {copies} times, since {ulysses} ranks share them"


def _either(sizes: list[int]) -> str:
    return " or ".join(map(str, sizes)) if sizes else "1"
