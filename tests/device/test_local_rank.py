"""Which device a rank has, from the environments of the launchers; no process is started."""

import pytest

from swift_mega.device.local_rank import device_index, find_local_rank
from swift_mega.errors import UserError


@pytest.mark.parametrize(
    ("environment", "devices", "index"),
    [
        ({}, 8, 0),  # no launcher
        # torchrun on the second of two machines
        ({"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}, 8, 1),
        # srun, whose script set RANK and WORLD_SIZE for its tasks
        ({"RANK": "11", "WORLD_SIZE": "16", "SLURM_LOCALID": "3"}, 8, 3),
        ({"RANK": "11", "WORLD_SIZE": "16", "SLURM_LOCALID": "3"}, 1, 0),  # srun --gpus-per-task=1
        # torchrun in one srun task for each machine: the task is number 0 of its machine
        ({"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "SLURM_LOCALID": "0"}, 8, 1),
        # a caller on several machines that sets no local rank
        ({"RANK": "9", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "4"}, 4, 1),
        ({"RANK": "9", "WORLD_SIZE": "16"}, 8, 1),  # nor the number of ranks of a machine
        ({"RANK": "3", "WORLD_SIZE": "4"}, 4, 3),  # one machine
    ],
)
def test_device_of_a_rank(environment: dict[str, str], devices: int, index: int) -> None:
    assert device_index(find_local_rank(environment), devices) == index


def test_a_local_rank_that_is_no_number() -> None:
    with pytest.raises(UserError, match="LOCAL_RANK='x' in the environment: expected a whole number of at least 0"):
        find_local_rank({"LOCAL_RANK": "x"})
