"""Finds out from environment variables what started this process.

It is torchrun or a caller (RANK, WORLD_SIZE), one process per machine (NNODES), or a launcher that sets no ranks. The last one is an
error: each of its N processes would be a whole run, and all would write the same files.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from swift_mega.device.local_rank import whole
from swift_mega.errors import UserError

PROCESSES = {
    "OMPI_COMM_WORLD_SIZE": "Open MPI's mpirun",
    "PMI_SIZE": "an MPI launcher",
    "MV2_COMM_WORLD_SIZE": "MVAPICH's mpirun",
    "MPI_WORLD_SIZE": "an MPI launcher",
    "PALS_SIZE": "PALS (aprun, mpiexec)",
    "FLUX_JOB_SIZE": "flux run",
    "JSM_NAMESPACE_SIZE": "jsrun",
}
"""Variable with the number of started processes -> name of the launcher that sets it. `_tasks_of_slurm` reads Slurm's variables."""


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The machines of a run, from NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT; one machine where these are not set."""

    count: int = 1
    rank: int = 0
    address: str = "127.0.0.1"
    port: int = 29500

    @staticmethod
    def from_environment(environ: Mapping[str, str]) -> "Nodes":
        count = whole(environ, "NNODES", 1, least=1)
        node = whole(environ, "NODE_RANK", 0, least=0)
        if node >= count:
            raise UserError(f"NODE_RANK={node} with NNODES={count}: machines are numbered from 0 to {count - 1}")
        if count > 1 and not environ.get("MASTER_ADDR"):
            raise UserError(
                f"NNODES={count} without MASTER_ADDR: set it to the address of the machine with NODE_RANK=0"
            )
        return Nodes(
            count=count, rank=node, address=environ.get("MASTER_ADDR", Nodes.address), port=port_of(environ, Nodes.port)
        )


def port_of(environ: Mapping[str, str], default: int) -> int:
    """MASTER_PORT, or `default`; UserError where it is not a port."""
    port = whole(environ, "MASTER_PORT", default, least=1)
    if port > 65535:
        raise UserError(f"MASTER_PORT={port} in the environment: ports are numbered from 1 to 65535")
    return port


def joined() -> bool:
    """Whether torchrun, srun or this launcher started this process as a rank: RANK and WORLD_SIZE are set."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def refuse_copies(environ: Mapping[str, str]) -> None:
    """UserError where a launcher started several processes without setting their ranks.

    NNODES processes, one per machine, are not an error: each of them starts the ranks of its machine.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return
    name, count = _tasks_of_slurm(environ)
    if count < 2:
        name = next((each for each in PROCESSES if whole(environ, each, 1, least=0) > 1), name)
        count = whole(environ, name, 1, least=0) if name in PROCESSES else 1
    if count < 2 or count == whole(environ, "NNODES", 1, least=1):
        return
    launcher = PROCESSES.get(name, "srun")
    raise UserError(
        f"{name}={count}: {launcher} started {count} processes without RANK and WORLD_SIZE, and each would be a whole run that writes "
        "the same files; start one process (for srun: --ntasks=1), which starts its ranks itself (NPROC_PER_NODE or --nproc), or "
        f"set in each RANK, WORLD_SIZE={count}, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun does; on several machines one "
        "process each with NNODES, NODE_RANK and MASTER_ADDR"
    )


def _tasks_of_slurm(environ: Mapping[str, str]) -> tuple[str, int]:
    """(variable, value): the number of Slurm tasks that run the command of this process, and the variable that says so.

    srun sets SLURM_STEP_NUM_TASKS in each task. A batch script and the shell of salloc are one process, for any SLURM_NTASKS: they
    belong to a job, but to no step.
    """
    if environ.get("SLURM_STEP_NUM_TASKS"):
        return "SLURM_STEP_NUM_TASKS", whole(environ, "SLURM_STEP_NUM_TASKS", 1, least=1)
    first = environ.get("SLURM_PROCID", "0") == "0"
    if first and environ.get("SLURM_JOB_ID") and not environ.get("SLURM_STEP_ID"):
        return "SLURM_NTASKS", 1
    return "SLURM_NTASKS", whole(environ, "SLURM_NTASKS", 1, least=1)
