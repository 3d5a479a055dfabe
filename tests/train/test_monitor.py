"""A run's files have exactly the recorded numbers: read back as JSON, TensorBoard events and pixels."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import pytest
import torch

from swift_mega.config import schema
from swift_mega.device.device import Device
from swift_mega.errors import UserError
from swift_mega.train import sinks
from swift_mega.train.monitor import Monitor, RunDirectory, format_time, new_version

NOON = datetime(2026, 11, 24, 12, 0, 5)
CPU = Device(kind="cpu", device=torch.device("cpu"), backend="gloo", name="cpu")
QUIET = schema.Monitor(report_to=(), progress=False)


class Clock:
    """A clock that moves only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lines(directory: RunDirectory) -> list[dict]:
    """logging.jsonl, read by a parser that refuses NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in directory.logging.read_text().splitlines()]


def give(monitor: Monitor, iteration: int, loss: float = 1.0, **changes):
    told = {"grad_norm": 0.5, "learning_rate": 1e-3, "tokens": 1000, "trained_tokens": 400} | changes
    return monitor.step(iteration, loss=loss, **told)


# --- the directory


def test_versions_count_on_from_the_largest(tmp_path):
    assert new_version(tmp_path / "absent", NOON) == "v0-20261124-120005"
    for name in (
        "v0-20261123-090000",
        "v9-20261123-100000",
        "v10-20261123-110000",
        "v77-notes",
        "xv99-20261123-110000",
    ):
        (tmp_path / name).mkdir()
    assert new_version(tmp_path, NOON) == "v11-20261124-120005"


def test_two_runs_of_one_second_get_their_own_directories(tmp_path):
    names = [RunDirectory(tmp_path / "out", now=NOON).path.name for _ in range(3)]
    assert names == ["v0-20261124-120005", "v1-20261124-120005", "v2-20261124-120005"]


def test_without_version_the_directory_is_used_itself_and_again(tmp_path):
    first, second = RunDirectory(tmp_path / "a" / "b", False), RunDirectory(tmp_path / "a" / "b", False)
    assert first.path == second.path == tmp_path / "a" / "b"
    assert first.checkpoint(7) == first.path / "checkpoint-7"


def test_args_hold_the_settings(tmp_path):
    directory = RunDirectory(tmp_path, False)
    path = directory.write_args(asdict(schema.Run()) | {"output": tmp_path})
    args = json.loads(path.read_text())
    assert path.name == "args.json" and args["tuner"]["rank"] == 8 and args["output"] == str(tmp_path)
    assert [entry.name for entry in directory.path.iterdir()] == ["args.json"]


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_output_dir_that_is_a_file_is_refused_and_left_alone(tmp_path, below):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(
        UserError, match=r"output_dir .*taken.* is a file, or a part of its path is a file.*name another"
    ):
        RunDirectory(tmp_path / "taken" / below)
    assert (tmp_path / "taken").read_text() == "mine"


def test_output_dir_that_cannot_be_written_is_refused(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    # Root may write anywhere that is a real file system; sysfs refuses even root.
    place = Path("/sys/swift_mega") if os.geteuid() == 0 else locked
    with pytest.raises(UserError, match=r"output_dir .* cannot be written \(.*\); name a directory"):
        RunDirectory(place, False)


# --- numbers


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (3.99, "3s"), (60, "1m 0s"), (63, "1m 3s"), (7205, "2h 0m 5s"), (86400, "1d 0h 0m 0s")],
)
def test_times_read_as_in_swift(seconds, text):
    assert format_time(seconds) == text


def test_smoothing_is_the_weighted_mean_written_out():
    a, b, c = 3.0, 1.0, 2.0
    want = [a, (0.9 * a + b) / 1.9, (0.81 * a + 0.9 * b + c) / 2.71]
    assert sinks.smooth([a, b, c]) == pytest.approx(want, rel=1e-12)


def test_a_line_has_every_number_exactly(tmp_path):
    """Two steps of 4 s on 2 ranks, with 1000 tokens each, at 3e9 operations per token on a device with 1e12 per second."""

    class Known(Device):
        def peak_flops(self) -> float:
            return 1e12

        def peak_memory_bytes(self) -> int:
            return 3 * 2**29

        def peak_allocated_bytes(self) -> int:
            return 2**30

    device = Known(kind="cpu", device=torch.device("cpu"), backend="gloo", name="known")
    clock, directory = Clock(), RunDirectory(tmp_path, now=NOON)
    with Monitor(
        directory, steps=20, settings=QUIET, flops_per_token=3e9, device=device, world=2, clock=clock
    ) as monitor:
        clock.now += 4
        give(monitor, 1, 2.5, extra={"accuracy": 0.25})
        clock.now += 4
        give(monitor, 2, 1.5, grad_norm=None)
    first, second = lines(directory)
    assert first == {
        "loss": 2.5,
        "grad_norm": 0.5,
        "learning_rate": 1e-3,
        "accuracy": 0.25,
        "iteration": "1/20",
        "elapsed_time": "4s",
        "remaining_time": "1m 16s",
        "memory(GiB)": 1.5,
        "memory_allocated(GiB)": 1.0,
        "train_speed(s/it)": 4.0,
        "tokens_per_s": 250.0,
        "tflops": 0.375,
        "mfu": 0.375,
        "tokens": 1000,
        "trained_tokens": 400,
    }
    assert second["grad_norm"] is None and second["tokens"] == 2000 and second["trained_tokens"] == 800
    assert (second["elapsed_time"], second["remaining_time"]) == ("8s", "1m 12s")


def test_mfu_is_null_where_the_peak_is_unknown(tmp_path):
    clock, directory = Clock(), RunDirectory(tmp_path)
    with Monitor(directory, steps=1, settings=QUIET, flops_per_token=1e9, device=CPU, clock=clock) as monitor:
        clock.now += 1
        give(monitor, 1)
    (line,) = lines(directory)
    assert line["mfu"] is None and line["tflops"] == 1.0 and line["memory(GiB)"] > 0.05
    assert "memory_allocated(GiB)" not in line  # torch counts it on CUDA only


def test_lines_between_are_averaged_and_first_and_last_are_written(tmp_path):
    clock, directory = Clock(), RunDirectory(tmp_path)
    monitor = Monitor(directory, steps=7, settings=QUIET, flops_per_token=0.0, device=CPU, logging_steps=3, clock=clock)
    written = []
    for i in range(1, 8):
        clock.now += 2
        written.append(give(monitor, i, float(i)) is not None)
    monitor.close()
    assert written == [True, False, True, False, False, True, True]
    assert [(x["iteration"], x["loss"], x["tokens_per_s"]) for x in lines(directory)] == [
        ("1/7", 1.0, 500.0),
        ("3/7", 2.5, 500.0),
        ("6/7", 5.0, 500.0),
        ("7/7", 7.0, 500.0),
    ]
    assert lines(directory)[0]["tflops"] is None


def test_a_pause_and_the_steps_before_a_resume_do_not_count_as_speed(tmp_path):
    clock, directory = Clock(), RunDirectory(tmp_path)
    monitor = Monitor(directory, steps=14, settings=QUIET, flops_per_token=0.0, device=CPU, first_step=10, clock=clock)
    clock.now += 1
    give(monitor, 11)
    with monitor.paused():
        clock.now += 50
        monitor.evaluation(11, 0.75, {"accuracy": 0.5})
    clock.now += 1
    give(monitor, 12)
    monitor.close()
    first, evaluation, second = lines(directory)
    assert (first["train_speed(s/it)"], first["remaining_time"]) == (1.0, "3s")
    assert evaluation == {"eval_loss": 0.75, "eval_accuracy": 0.5, "iteration": "11/14", "elapsed_time": "51s"}
    assert (second["tokens_per_s"], second["train_speed(s/it)"], second["elapsed_time"]) == (1000.0, 1.0, "52s")


def test_nan_and_infinity_become_null_and_are_not_drawn(tmp_path):
    directory = RunDirectory(tmp_path)
    with Monitor(directory, steps=3, settings=QUIET, flops_per_token=0.0, device=CPU) as monitor:
        assert math.isnan(give(monitor, 1, math.nan, grad_norm=math.inf)["loss"])
        give(monitor, 2, 1.0)
    first, second = lines(directory)
    assert (first["loss"], first["grad_norm"], second["loss"]) == (None, None, 1.0)
    assert (directory.images / "train_loss.png").exists()


def test_every_line_is_on_disk_before_the_run_ends(tmp_path):
    directory = RunDirectory(tmp_path)
    monitor = Monitor(directory, steps=2, settings=QUIET, flops_per_token=0.0, device=CPU)
    give(monitor, 1)
    assert len(lines(directory)) == 1
    monitor.close()
    monitor.close()


# --- sinks


def test_tensorboard_reads_back_what_was_given(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = RunDirectory(tmp_path)
    settings = schema.Monitor(progress=False)
    with Monitor(directory, steps=3, settings=settings, flops_per_token=0.0, device=CPU) as monitor:
        for i, loss in enumerate([2.0, 1.0, 0.5], 1):
            give(monitor, i, loss)
        monitor.evaluation(3, 0.625)
    events = EventAccumulator(str(directory.tensorboard))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 2.0), (2, 1.0), (3, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("eval/loss")] == [(3, 0.625)]
    assert events.Scalars("train/learning_rate")[0].value == pytest.approx(1e-3)
    assert "train/mfu" not in events.Tags()["scalars"] and "train/iteration" not in events.Tags()["scalars"]


def test_plots_are_drawn_and_show_the_curve(tmp_path):
    """The pixels of the falling line are high on the left and low on the right."""
    from matplotlib.image import imread

    directory = RunDirectory(tmp_path)
    with Monitor(directory, steps=100, settings=QUIET, flops_per_token=0.0, device=CPU) as monitor:
        for i in range(1, 101):
            give(monitor, i, 100.0 - i)
        monitor.evaluation(100, 0.5)
    drawn = sorted(path.name for path in directory.images.iterdir())
    assert drawn == ["eval_loss.png"] + [
        f"train_{x}.png" for x in ("grad_norm", "learning_rate", "loss", "tokens_per_s")
    ]
    image = imread(directory.images / "train_loss.png")
    assert image.shape[:2] == (500, 800)
    blue = image[..., 2] - image[..., 0] > 0.3
    rows = [blue[:, a:b].nonzero()[0].mean() for a, b in ((120, 200), (680, 760))]
    assert rows[0] < 250 < rows[1]


def test_plots_during_a_run_wait_a_minute(tmp_path):
    clock = Clock()
    plots = sinks.Plots(tmp_path / "images", clock)
    plots.write("train", 1, {"loss": 1.0})
    assert not (tmp_path / "images").exists()
    clock.now += sinks.SECONDS_BETWEEN_DRAWINGS
    plots.write("train", 2, {"loss": 0.5})
    assert (tmp_path / "images" / "train_loss.png").exists()
    (tmp_path / "images" / "train_loss.png").unlink()
    clock.now += sinks.SECONDS_BETWEEN_DRAWINGS - 1
    plots.write("train", 3, {"loss": 0.25})
    assert not (tmp_path / "images" / "train_loss.png").exists()


def test_the_bar_shows_loss_speed_and_messages(tmp_path, capsys):
    settings = schema.Monitor(report_to=())
    clock, directory = Clock(), RunDirectory(tmp_path)
    with Monitor(directory, steps=4, settings=settings, flops_per_token=0.0, device=CPU, clock=clock) as monitor:
        clock.now += 0.5
        give(monitor, 1, 1.25)
        monitor.say("saved checkpoint-1")
        give(monitor, 2, 1.125)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "saved checkpoint-1" in shown.err and "2/4" in shown.err
    assert "loss 1.1250" in shown.err and "2,000 tok/s" in shown.err


def test_messages_without_a_bar_go_to_standard_error(tmp_path, capsys):
    with Monitor(RunDirectory(tmp_path), steps=1, settings=QUIET, flops_per_token=0.0, device=CPU) as monitor:
        monitor.say("hello")
    assert capsys.readouterr() == ("", "hello\n")


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_that_is_not_installed_is_named_before_anything_is_written(tmp_path):
    settings = schema.Monitor(report_to=("wandb",))
    directory = RunDirectory(tmp_path)
    with pytest.raises(UserError, match=r"wandb, which is not installed; run `pip install wandb`.*report_to"):
        Monitor(directory, steps=1, settings=settings, flops_per_token=0.0, device=CPU)
    assert list(directory.path.iterdir()) == []


def test_wandb_offline_writes_real_files(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = schema.Monitor(report_to=("wandb",), wandb_run_name="tried", progress=False)
    directory = RunDirectory(tmp_path)
    with Monitor(directory, steps=1, settings=settings, flops_per_token=0.0, device=CPU) as monitor:
        give(monitor, 1)
    assert list(directory.path.glob("wandb/offline-run-*/run-*.wandb"))


def test_a_log_that_cannot_be_opened_is_refused(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.logging.mkdir()
    with pytest.raises(UserError, match=r"logging\.jsonl cannot be opened \(.*\); name another train\.output_dir"):
        Monitor(directory, steps=1, settings=QUIET, flops_per_token=0.0, device=CPU)


def test_importing_the_monitor_loads_no_plotting_package():
    code = (
        "import sys, swift_mega.train.monitor; "
        "print([m for m in ('matplotlib', 'tensorboard', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
