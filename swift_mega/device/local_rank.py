"""Which rank of its machine a process is, and so which of the machine's devices it uses. Reads an environment, queries no device.

Launchers use different variables: torchrun and our launcher set LOCAL_RANK, srun sets SLURM_LOCALID, and a caller may have set only
RANK.
"""

from collections.abc import Mapping

from swift_mega.errors import UserError


def find_local_rank(environ: Mapping[str, str]) -> int:
    """LOCAL_RANK, else SLURM_LOCALID, else RANK modulo LOCAL_WORLD_SIZE (default: WORLD_SIZE, one machine); 0 where none is set."""
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        if environ.get(name):
            return whole(environ, name, 0, least=0)
    ranks = whole(environ, "LOCAL_WORLD_SIZE", whole(environ, "WORLD_SIZE", 1, least=1), least=1)
    return whole(environ, "RANK", 0, least=0) % ranks


def device_index(local: int, devices: int) -> int:
    """The device of local rank `local`, where the process sees `devices` of them.

    Modulo, because a launcher that shows each process only its own device (srun --gpus-per-task=1) leaves the local rank as it is.
    """
    return local % devices


def whole(environ: Mapping[str, str], name: str, default: int, *, least: int) -> int:
    """A whole number from the environment, or `default` where it is not set. UserError where it is no such number, or below `least`."""
    text = environ.get(name, "")
    if not text:
        return default
    if not text.strip().isdecimal() or int(text) < least:
        raise UserError(f"{name}={text!r} in the environment: expected a whole number of at least {least}")
    return int(text)
