"""`python -m swift_mega.launch.worker JOB PARENT`: one rank as a new interpreter, because a process that uses CUDA cannot be forked.

The file JOB, written by `torchrun`, has the pickled spec and folder; body and arguments are pickled inside it a second time. Unpickling
them imports Megatron, and on CUDA this rank's device has to be set up before that.
"""

import pickle
import sys
from pathlib import Path

from swift_mega.device import device as devices
from swift_mega.launch import rank


def main(job: str, parent: str) -> None:
    rank.settle(int(parent))
    spec, folder, work = pickle.loads(Path(job).read_bytes())
    if spec.kind == "cuda":
        devices.setup()
    body, args = pickle.loads(work)
    rank.run_rank(spec, folder, body, args)


if __name__ == "__main__":
    main(*sys.argv[1:])
