"""The versions of transformers that models can be read with: an older one gives the same config.json another meaning, without an error.

pip enforces the range where swift_mega is installed; a source tree on PYTHONPATH may find any version.
"""

import functools
from importlib import metadata

from swift_mega.errors import UserError

LOWEST, BELOW = (5, 23), (6,)
"""The range in setup.py; tests/models/test_transformers_version.py compares the two."""


@functools.cache
def check_transformers() -> None:
    """UserError where the installed transformers is outside the range that the families are written for."""
    version = metadata.version("transformers")
    lowest, below = (".".join(map(str, each)) for each in (LOWEST, BELOW))
    remedy = f'pip install "transformers>={lowest},<{below}"'
    have = tuple(int(number) for number in version.split(".")[:2])
    if have < LOWEST:
        raise UserError(
            f"transformers {version} is installed, and models are read with {lowest} or newer: older ones misread some config.json "
            f"(MiniMax-M2 before 5.18: all 128 features of a head rotated in place of 64), without an error; {remedy}"
        )
    if have >= BELOW:
        raise UserError(
            f"transformers {version} is installed, and models are read with {lowest} up to, not including, {below}: what later ones read "
            f"in a config.json is not known here; {remedy}"
        )
