"""`python -m swift_mega.launch.worker JOB PARENT`: one rank as a fresh interpreter, since CUDA can't be forked.

JOB holds the pickled seat and folder, and pickled in it body and arguments, that `torchrun` wrote: these import Megatron, which on CUDA
must find this rank's device set up.
"""

import pickle
import sys
from pathlib import Path

from swift_mega.device import device as devices
from swift_mega.launch import rank


def main(job: str, parent: str) -> None:
    rank.settle(int(parent))
    seat, folder, work = pickle.loads(Path(job).read_bytes())
    if seat.kind == "cuda":
        devices.setup()
    body, args = pickle.loads(work)
    rank.run_seat(seat, folder, body, args)


if __name__ == "__main__":
    main(*sys.argv[1:])
