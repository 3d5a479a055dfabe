"""Runs that repeat bit by bit: every op adds in a fixed order, or one error names the op that cannot.

torch.use_deterministic_algorithms does most of it, and our kernels check whether it is on. Libraries below torch read environment
variables when they are first used.
"""

import os
import traceback
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic

from swift_mega.errors import UserError

ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", (":4096:8", ":16:8")),
    # Tree, ring and CollNet add in an order that the topology fixes; switches (NVLS) do not.
    "NCCL_ALGO": ("^NVLS,NVLSTree", ("^NVLS,NVLSTree", "^NVLS", "Tree", "Ring", "CollnetDirect", "CollnetChain")),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0", ("0",)),
}
"""Variables that libraries read: the value that is set where there is none, and all values that are accepted."""


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Switches deterministic ops on until the end of the context, in this process, if `wanted` (train.deterministic).

    Enter it before CUDA computes and NCCL communicates. UserError where the environment says the contrary, or an op has no deterministic
    form.
    """
    if not wanted:
        yield
        return
    set_environment(os.environ)
    switch: Any = torch.utils.deterministic
    filling = switch.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Filling would cost a pass over each new tensor, and only helps code that reads memory it never wrote.
    switch.fill_uninitialized_memory = False
    try:
        yield
    except RuntimeError as error:
        if "use_deterministic_algorithms" not in str(error):
            raise
        raise UserError(_no_such_form(error)) from error
    finally:
        torch.use_deterministic_algorithms(False)
        switch.fill_uninitialized_memory = filling


def set_environment(environ: MutableMapping[str, str]) -> None:
    """Sets the variables that are not set. UserError where one tells its library to do otherwise."""
    for name, (value, fitting) in ENVIRONMENT.items():
        if environ.setdefault(name, value) not in fitting:
            raise UserError(
                f"train.deterministic=true, but {name}={environ[name]} in the environment lets results differ from run to run; unset it, "
                f"or set it to {' or '.join(fitting)}"
            )


def _no_such_form(error: RuntimeError) -> str:
    """The message for torch's error, which begins with the op, or for cuBLAS's, which begins with the word Deterministic."""
    op = str(error).split(" does not have a deterministic implementation")[0].split("\n")[0]
    where = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"train.deterministic=true: {op} has no deterministic form in torch {torch.__version__} on this device "
        f"({where.filename}:{where.lineno}); set train.deterministic=false, or choose settings that do not use it"
    )
