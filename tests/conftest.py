"""Shared fixtures. `ranks` runs the body of a test in real ranks over gloo. Ranks are forks, made after torch and Megatron are imported
once.

Every job forks new ranks; there is no pool of waiting ranks. A start costs 0.02 s of CPU for one rank and 0.1 s for four, and first writes
to inherited pages cost 0.04 s per rank. A job takes 0.5 to 4 s. With forks, no state of one job can reach the next.
"""

import importlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from swift_mega.device import device

# A rank that waits should not preempt a rank that computes. One all_reduce of four ranks on two cores takes 1.7 ms of system time per rank
# with the default scheduling policy, and 0.4 ms with this one. Children inherit it.
if hasattr(os, "SCHED_BATCH"):
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))

pytest_plugins = ["budget"]
IMPORTED_ONCE = (
    "megatron.core.distributed", "megatron.core.models.gpt", "megatron.core.optimizer", "megatron.core.pipeline_parallel",
    "peft", "transformers.models.llama.modeling_llama",  # most oracles need these
)  # fmt: skip
"""Imported here and not in every rank: ranks are forks and inherit the imports."""
Ranks = Callable[..., Any]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full",
        action="store_true",
        help="also cases marked `full`, which products make and a cover of pairs does without",
    )


LONGEST = (
    "train/test_every_family.py", "train/test_layouts.py", "convert/test_layouts_of_weights.py", "train/test_tiles.py",
    "verify/test_distance.py", "train/test_few_key_heads.py", "memory/test_memory.py", "test_tools.py", "train/test_context_layouts.py",
    "train/test_offload.py", "convert/test_whole.py", "train/test_loop.py", "convert/test_blueprint.py", "export/test_adapters.py",
    "train/test_classic_layouts.py", "train/test_optimizer_offload.py", "train/test_te_layouts.py",
    "train/test_delta_layouts.py", "convert/megatron/test_megatron_lm.py",
)  # fmt: skip
"""Files of more than 15 CPU seconds, started in this order, so that no worker runs a long file alone at the end."""


def pytest_configure(config: pytest.Config) -> None:
    """Sets up the device before any test module is imported: those import Megatron, which binds CUDA functions at import.

    Only `pytest -m gpu` sees a GPU. The other tests compute on the CPU, and their ranks communicate over gloo.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    device.setup()
    for name in IMPORTED_ONCE:
        importlib.import_module(name)
    if hasattr(config.option, "loadscopereorder"):
        # xdist's own order is by the number of tests, which says little about their time.
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts long files first. Without --full, deselects cases marked `full`; the remaining cases still cover the claim of each."""
    place = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
    if config.getoption("--full"):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


@pytest.fixture(scope="session")
def cpu() -> device.Device:
    """The device of this process, with the facade (the patches for Megatron without CUDA) installed."""
    return device.setup()


@pytest.fixture
def ranks() -> Ranks:
    """ranks(n, body, *args, timeout=120): run module-level `body` in n gloo ranks, one thread each.

    Returns rank 0's result. A rank's traceback, or the timeout in seconds, fails the test and ends every rank.
    """

    def run(n: int, body: Callable[..., Any], *args: Any, timeout: float = 120) -> Any:
        from swift_mega.launch.torchrun import run_ranks

        with _deadline(timeout), pytest.MonkeyPatch.context() as environment:
            environment.setenv("OMP_NUM_THREADS", "1")
            return run_ranks(n, body, *args, device_kind="cpu")

    return run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    item.stash[_BEGIN] = _cpu_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Records the CPU time of the test, because wall-clock time on a shared machine says little."""
    try:
        return (yield)
    finally:
        item.user_properties.append(("cpu_seconds", round(_cpu_seconds() - item.stash[_BEGIN], 3)))


_BEGIN = pytest.StashKey[float]()


def _cpu_seconds() -> float:
    """User and system time of this process and of its children that were waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class _deadline:
    """Raises TimeoutError in this process after `seconds`, wherever it is."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        def expire(*_: Any) -> None:
            raise TimeoutError(f"the ranks took more than {self.seconds:g} s and were ended")

        self.before = signal.signal(signal.SIGALRM, expire)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def __exit__(self, *error: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.before)


@pytest.fixture(autouse=True)
def one_seed() -> Iterator[None]:
    """Every test starts from the same random seed, whichever test ran before it."""
    import torch

    torch.manual_seed(1234)
    yield
