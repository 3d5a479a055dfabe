"""Permutations that depend on their key alone, not on the machine or on library versions.

Indices are sorted by a hash of (key, index), so a resumed run has the same order as the first run.
"""

import numpy as np
from numpy.typing import NDArray


def shuffled(length: int, *key: int) -> NDArray[np.int64]:
    """A permutation of range(length), [length] int64; the integers of `key` are the seed.

    The hash is splitmix64's finaliser (Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195).
    """
    with np.errstate(over="ignore"):
        state = np.arange(length, dtype=np.uint64)
        for part in (*key, len(key)):
            state = _mix(state ^ _mix(np.full(1, part % 2**64, dtype=np.uint64)))
    return np.argsort(state, kind="stable")


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
