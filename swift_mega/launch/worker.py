"""`python -m swift_mega.launch.worker JOB PARENT`: one rank as a fresh interpreter, since CUDA can't be forked.

JOB holds the pickled seat, folder, body and arguments that `torchrun` wrote.
"""

import pickle
import sys
from pathlib import Path

from swift_mega.launch import rank


def main(job: str, parent: str) -> None:
    rank.settle(int(parent))
    seat, folder, body, args = pickle.loads(Path(job).read_bytes())
    rank.run_seat(seat, folder, body, args)


if __name__ == "__main__":
    main(*sys.argv[1:])
