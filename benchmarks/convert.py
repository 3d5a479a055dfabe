"""Time and memory of conversion, compared with a plain copy of the same files: `python benchmarks/convert.py [--help]`.

On random Llama checkpoints in bfloat16. Each job runs in a new process. The jobs of one size run one after another, `--rounds` times:
  copy            copies the files in the kernel (sendfile); also with fsync, which every save here does
  write           writes as many bytes as the checkpoint has from the memory of a new process to the disk: a lower bound for a save
  load            Hugging Face -> the parameters of 1 or 2 ranks (TP): builds the model, reads and checks its slices
  save            the parameters of 1 or 2 ranks -> Hugging Face, with a sha256 of every tensor; ends when all is on the disk
  resave          Hugging Face -> Hugging Face in float32, by `swift-mega convert --to hf`
  to mcore        Hugging Face -> torch_dist, by tools/convert/hf_to_mcore.py
  from mcore      torch_dist -> Hugging Face, by tools/convert/mcore_to_hf.py
The last three are whole commands with their imports. The memory that a job needs is touched before it, because the first use of memory in a
virtual machine is slow and would be timed. Peak memory is VmHWM minus the memory of the interpreter with its imports, summed over ranks.
The aim for load and save is the size of the parameters + 300 MB. Every result is compared with the source bit for bit.
"""

import argparse
import filecmp
import json
import math
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
HIDDEN, FFN, HEADS, KV_HEADS, VOCABULARY = 2048, 5632, 32, 8, 32000
BLOCK = 8 << 20
RUN_RANKS, WRITE = "load and save", "write"
SMOKE_SIZE = 0.0


@dataclass
class Measured:
    """Time and memory of one job on one checkpoint, for each round."""

    job: str
    gigabytes: float
    """Size of the checkpoint, 10^9 bytes."""
    seconds: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    """Peak memory in bytes minus that of the imports, summed over ranks; empty where it is not measured."""
    startup: list[float] = field(default_factory=list)
    """Seconds of the imports, where `seconds` does not include them."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


# ------------------------------------------------------------------------------------------------ the checkpoint


def llama(layers: int) -> dict[str, Any]:
    """The config of a Llama with about 0.083 GB per layer and 0.26 GB for the vocabulary."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "dtype": "bfloat16",
    }


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor of that model."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    keys = HIDDEN // HEADS * KV_HEADS
    for number in range(layers):
        layer = f"model.layers.{number}."
        for name, rows, columns in (
            ("self_attn.q_proj", HIDDEN, HIDDEN), ("self_attn.k_proj", keys, HIDDEN), ("self_attn.v_proj", keys, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HIDDEN), ("mlp.gate_proj", FFN, HIDDEN), ("mlp.up_proj", FFN, HIDDEN),
            ("mlp.down_proj", HIDDEN, FFN),
        ):  # fmt: skip
            yield f"{layer}{name}.weight", (rows, columns)
        yield f"{layer}input_layernorm.weight", (HIDDEN,)
        yield f"{layer}post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def make_checkpoint(directory: Path, gigabytes: float) -> None:
    """Writes a checkpoint of random numbers without NaN, in files of 500 MB."""
    import torch

    from swift_mega.convert.files.hf_write import Writer, plan_files, write_headers

    vocabulary, layer = (
        2 * VOCABULARY * HIDDEN * 2,
        sum(_bytes(shape) for _, shape in shapes(1)) - sum(_bytes(shape) for _, shape in shapes(0)),
    )
    layers = max(1, round((gigabytes * 1e9 - vocabulary) / layer))
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(llama(layers), indent=1))
    planned = plan_files({name: (torch.bfloat16, shape) for name, shape in shapes(layers)}, 500_000_000)
    write_headers(directory, planned)
    generator = torch.Generator().manual_seed(0)
    with Writer(directory, planned) as writer:
        for name, place in planned.items():
            writer.write(name, torch.randn(place.shape, generator=generator, dtype=torch.float32).mul_(0.02))


def _bytes(shape: Sequence[int]) -> int:
    size = 2
    for length in shape:
        size *= length
    return size


def weights(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def size_of(directory: Path) -> int:
    return sum(file.stat().st_size for file in weights(directory))


# ------------------------------------------------------------------------------------------------ the jobs


def copy(source: Path, target: Path, *, sync: bool) -> float:
    """Copies the weights; returns the seconds."""
    begin = time.perf_counter()
    target.mkdir()
    for file in weights(source):
        shutil.copyfile(file, target / file.name)
    if sync:
        for file in weights(target):
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
    return time.perf_counter() - begin


def write(source: Path, target: Path) -> float:
    """Seconds to write the weights from memory to the disk; runs in a separate process, as `ranks` does."""
    return float(_run([sys.executable, __file__, WRITE, str(source), str(target)], dict(os.environ)))


def write_from_memory(source: str, target: str) -> None:
    """The body of `write`; uses only the standard library."""
    contents = {file.name: file.read_bytes() for file in weights(Path(source))}
    begin = time.perf_counter()
    Path(target).mkdir()
    handles = []
    for name, content in contents.items():
        handle = os.open(Path(target) / name, os.O_CREAT | os.O_WRONLY)
        for start in range(0, len(content), BLOCK):
            os.pwrite(handle, memoryview(content)[start : start + BLOCK], start)
        handles.append(handle)
    for handle in handles:
        os.fsync(handle)
    print(time.perf_counter() - begin)


def ranks(source: Path, target: Path, count: int, folder: Path) -> dict[str, Any]:
    """Runs `load_and_save` in a separate process. Returns the time of the slowest rank and the memory summed over ranks."""
    said = folder / "said"
    said.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SWIFT_MEGA_BENCHMARK_BEGIN": str(time.time())}
    _run([sys.executable, __file__, RUN_RANKS, str(source), str(target), str(count), str(said)], environment)
    found = [json.loads(file.read_text()) for file in sorted(said.iterdir())]
    shutil.rmtree(said)
    assert len(found) == count
    slowest = {name: max(one[name] for one in found) for name in ("startup", "load", "save")}
    return slowest | {name: sum(one[name] for one in found) for name in ("load_peak", "save_peak")}


def load_and_save(source: str, target: str, count: int, said: str) -> None:
    """The body of `ranks`: starts the ranks as `swift-mega` does."""
    # Imported because its imports take most of the start.
    from swift_mega.api import conversion  # noqa: F401
    from swift_mega.config import schema
    from swift_mega.launch.torchrun import run_ranks
    from swift_mega.models.translate import load_settings
    from swift_mega.parallel.layout import plan_layout

    layout = plan_layout(schema.Parallel(tensor=count), load_settings(source).shape, count)
    run_ranks(count, _rank, source, target, layout, said)


def _rank(source: str, target: str, layout: Any, said: str) -> None:
    import torch
    import torch.distributed as dist

    from swift_mega.config import schema
    from swift_mega.convert.save import save
    from swift_mega.convert.source import Source
    from swift_mega.device import device as devices
    from swift_mega.parallel import groups as parallel_groups
    from swift_mega.train.build import build_part

    groups, device = parallel_groups.init(layout), devices.setup()
    dist.barrier()
    startup = time.time() - float(os.environ["SWIFT_MEGA_BENCHMARK_BEGIN"])
    floor = _forget_peak()
    begin = time.perf_counter()
    part = build_part(schema.Run(), device, groups, dtype=torch.bfloat16, reads_inputs=False, source=Source(source))
    dist.barrier()
    loaded, load_peak = time.perf_counter(), _peak() - floor
    _forget_peak()
    save(part, groups, target, source=source, dtypes=torch.bfloat16, max_shard_bytes=500_000_000)
    saved, save_peak = time.perf_counter(), _peak() - floor
    measured = {
        "startup": startup,
        "load": loaded - begin,
        "save": saved - loaded,
        "load_peak": load_peak,
        "save_peak": save_peak,
    }
    (Path(said) / f"{dist.get_rank()}.json").write_text(json.dumps(measured))


def _forget_peak() -> int:
    """Resets the peak of resident memory (VmHWM); returns the resident memory in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(field_: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field_))
    return int(line.split()[1]) * 1024


def command(arguments: Sequence[str | Path]) -> tuple[float, int]:
    """(seconds of a whole command, peak resident memory of its largest process in bytes).

    A small process starts the command, because Linux counts the memory of the starting process in the peak of the started one.
    """
    script = "import resource, subprocess, sys; status = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode; "
    script += "print(status, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    begin = time.perf_counter()
    said = _run([sys.executable, "-c", script, *map(str, arguments)], os.environ | {"OMP_NUM_THREADS": "1"})
    status, peak = said.split()
    if status != "0":
        raise SystemExit(f"{' '.join(map(str, arguments))} ended with status {status}")
    return time.perf_counter() - begin, int(peak)


def imports_peak() -> int:
    """Peak resident memory in bytes of the interpreter with all imports, which every command needs."""
    return command([sys.executable, "-c", "from swift_mega.api import conversion"])[1]


def touch(size: int) -> None:
    """Writes to `size` bytes of memory, so that the host of a virtual machine provides them now. During a job this would take longer than
    a copy.
    """
    with mmap.mmap(-1, size) as memory:
        for page in range(0, size, mmap.PAGESIZE):
            memory[page] = 1


def _run(arguments: Sequence[str], environment: dict[str, str]) -> str:
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout


# ------------------------------------------------------------------------------------------------ the run


def measure(
    source: Path, folder: Path, rounds: int, jobs: Sequence[str], say: Callable[[str], None], *, warm: bool = True
) -> list[Measured]:
    """Runs every job on one checkpoint, `rounds` times. warm: memory is touched before each job."""
    size = size_of(source) / 1e9
    found: dict[str, Measured] = {}
    base, needed = imports_peak(), int(3e9 * size) + (1 << 30) if warm else mmap.PAGESIZE

    def note(job: str, seconds: float, peak: int | None = None, startup: float | None = None) -> None:
        one = found.setdefault(job, Measured(job, size))
        one.seconds.append(seconds)
        one.peak += [] if peak is None else [peak]
        one.startup += [] if startup is None else [startup]
        say(f"{size:.2f} GB  {job:16} {seconds:6.2f} s")

    swift_mega, tools = [sys.executable, "-m", "swift_mega"], ROOT / "tools" / "convert"
    target, mcore = folder / "target", folder / "mcore"
    for _ in range(rounds):
        for sync in (False, True):
            touch(needed)
            note("copy, fsync" if sync else "copy", copy(source, target, sync=sync))
            _cleared(target)
        touch(needed)
        note("write", write(source, target))
        _cleared(target)
        for count in (1, 2):
            if "ranks" in jobs:
                touch(needed)
                said = ranks(source, target, count, folder)
                _compare(source, target)
                _cleared(target)
                note(f"load, {count} rank{'s' * (count > 1)}", said["load"], said["load_peak"], said["startup"])
                note(f"save, {count} rank{'s' * (count > 1)}", said["save"], said["save_peak"])
        if "resave" in jobs:
            touch(needed)
            seconds, peak = command(
                [
                    *swift_mega,
                    "convert",
                    "--model",
                    source,
                    "--to",
                    "hf",
                    "--output",
                    target,
                    "--torch_dtype",
                    "float32",
                ]
            )
            _cleared(target)
            note("resave", seconds, peak - base)
        if "mcore" in jobs:
            touch(needed)
            seconds, peak = command([sys.executable, tools / "hf_to_mcore.py", "--model", source, "--output", mcore])
            note("to mcore", seconds, peak - base)
            seconds, peak = command(
                [
                    sys.executable,
                    tools / "mcore_to_hf.py",
                    "--mcore",
                    mcore,
                    "--output",
                    target,
                    "--max_shard_size",
                    "500MB",
                ]
            )
            _compare(source, target)
            _cleared(target, mcore)
            note("from mcore", seconds, peak - base)
    return list(found.values())


def _compare(source: Path, target: Path) -> None:
    """Asserts that both have the same tensors, bit for bit; their order in the files may differ."""
    from swift_mega.convert.files.hf_files import Checkpoint

    if [file.name for file in weights(source)] == [file.name for file in weights(target)] and all(
        filecmp.cmp(file, target / file.name, shallow=False) for file in weights(source)
    ):
        return
    ours, theirs = Checkpoint(source), Checkpoint(target)
    assert ours.entries.keys() == theirs.entries.keys(), "the output has other tensors than the input"
    for name in ours.entries:
        assert ours.read(name).equal(theirs.read(name)), f"{name} differs from the input"


def _cleared(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder)
    os.sync()


def table(found: Sequence[Measured]) -> str:
    """The table that is printed at the end."""
    lines = [
        f"{'GB':>5} {'job':16} {'seconds':>8} {'min':>6} {'max':>6} {'GB/s':>6} {'x copy':>7} {'x write':>8} "
        f"{'peak - imports':>15}  start-up"
    ]
    for one in found:
        same = {other.job: other for other in found if other.gigabytes == one.gigabytes}
        plain, least = same["copy"].median, same["write"].median
        peak = f"{max(one.peak) / 1e9:12.2f} GB" if one.peak else ""
        startup = f"{statistics.median(one.startup):.1f} s" if one.startup else ""
        lines.append(
            f"{one.gigabytes:5.2f} {one.job:16} {one.median:8.2f} {min(one.seconds):6.2f} {max(one.seconds):6.2f} "
            f"{one.gigabytes / one.median:6.2f} {one.median / plain:7.2f} {one.median / least:8.2f} {peak:>15}  {startup}"
        )
    return "\n".join(lines)


def plot(found: Sequence[Measured], file: Path) -> None:
    """Plots seconds and memory against the size of the checkpoint."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for job in dict.fromkeys(one.job for one in found):
        points = sorted((one for one in found if one.job == job), key=lambda one: one.gigabytes)
        sizes = [one.gigabytes for one in points]
        left.plot(sizes, [one.median for one in points], marker="o", label=job)
        if points[0].peak:
            right.plot(sizes, [max(one.peak) / 1e9 for one in points], marker="o", label=job)
    largest = max(one.gigabytes for one in found)
    right.plot([0, largest], [0.3, largest + 0.3], "k:", label="parameters + 300 MB")
    left.set(xlabel="checkpoint, GB", ylabel="seconds", title="time (median)")
    right.set(xlabel="checkpoint, GB", ylabel="GB", title="peak memory beyond the imports")
    for axes in (left, right):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def main(given: Sequence[str] | None = None) -> None:
    """Runs the command."""
    if (given or sys.argv[1:])[:1] == [WRITE]:
        write_from_memory(*(given or sys.argv[1:])[1:])
        return
    if (given or sys.argv[1:])[:1] == [RUN_RANKS]:
        _, model, output, count, said = given or sys.argv[1:]
        load_and_save(model, output, int(count), said)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1.0, 4.0], help="GB of weights (default 1 4)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of every job (default 3)")
    parser.add_argument("--jobs", nargs="+", choices=("ranks", "resave", "mcore"), default=["ranks", "resave", "mcore"])
    parser.add_argument(
        "--folder", type=Path, help="folder for the files, three times the largest size; default: a temporary one"
    )
    parser.add_argument("--json", type=Path, help="writes every round to this file")
    parser.add_argument("--plot", type=Path, help="draws seconds and memory over size to this file")
    parser.add_argument(
        "--smoke", action="store_true", help="the jobs once on one layer (0.35 GB), to see that all of it runs"
    )
    arguments = parser.parse_args(given)
    # SMOKE_SIZE is less than the vocabulary needs, so the checkpoint has one layer.
    if arguments.smoke:
        arguments.sizes, arguments.rounds, arguments.jobs = [SMOKE_SIZE], 1, ["ranks"]
    results: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="swift-mega-convert-", dir=arguments.folder) as scratch:
        for gigabytes in sorted(arguments.sizes):
            source = Path(scratch) / "source"
            make_checkpoint(source, gigabytes)
            os.sync()
            results += measure(source, Path(scratch), arguments.rounds, arguments.jobs, _say, warm=not arguments.smoke)
            shutil.rmtree(source)
    print(table(results))
    jobs = {one.job for one in results}
    assert {
        "copy",
        "copy, fsync",
        "write",
        "load, 2 ranks",
        "save, 2 ranks",
    } <= jobs or "ranks" not in arguments.jobs, jobs
    assert all(0 < one.median < math.inf for one in results)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(one) for one in results], indent=1))
    if arguments.plot:
        plot(results, arguments.plot)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
