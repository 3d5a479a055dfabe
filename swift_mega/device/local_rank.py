"""Which of its machine's ranks a process is, and so which of the machine's devices is its own. Reads an environment, asks no device.

Every launcher says it in its own words: torchrun and we set LOCAL_RANK, srun sets SLURM_LOCALID, and a caller may have set RANK alone.
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

    Modulo: a launcher that shows each process only its own device (srun --gpus-per-task=1) leaves the local rank as it is.
    """
    return local % devices


def whole(environ: Mapping[str, str], name: str, default: int, *, least: int) -> int:
    """A whole number from the environment."""
    text = environ.get(name, "")
    if not text:
        return default
    if not text.strip().isdecimal() or int(text) < least:
        raise UserError(f"{name}={text!r} in the environment: expected a whole number of at least {least}")
    return int(text)
