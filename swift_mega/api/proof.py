"""Checks on a real checkpoint that layouts compute the same as Hugging Face transformers."""

import dataclasses
import math
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from swift_mega.api.ready import DEVICE, on_device
from swift_mega.config import schema
from swift_mega.convert.files import stream
from swift_mega.convert.source import Source
from swift_mega.data.chat import load_tokenizer
from swift_mega.data.prompts import line_rows, prompt_rows
from swift_mega.data.vocabulary import check_tokens
from swift_mega.device import device as devices
from swift_mega.errors import UserError
from swift_mega.export.adapters import tuner_of
from swift_mega.launch.torchrun import is_first_rank, run_ranks
from swift_mega.models.modules.te_attention import check_te_runs
from swift_mega.parallel.layout import Layout, parse_layout, plan_layout
from swift_mega.train.header import layer_modules
from swift_mega.verify import parity

LAYOUTS = (
    *("single", "tp2", "tp3", "tp2-sp", "tp3-sp", "pp2", "pp3", "pp2-vpp2", "tp2-pp2-sp", "tp3-pp2-sp", "dp2", "ep2"),
    "tp2-ep2-etp1-sp",
)
"""Layouts that `verify` tests by default, if the model can be sharded so. tp3 is left out where tp2 is possible."""


SENTENCES = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)",
    "Who are you? I am a language model.",
    "Water boils at one hundred degrees Celsius at sea level.",
    "Once upon a time there was a small village by the sea where nobody had ever seen a ship.",
    "In 1969 two people walked on the Moon for the first time.",
    "SELECT name, age FROM users WHERE age > 30 ORDER BY name;",
    "Twice two is four, twice three is six, twice four is eight.",
)
"""Default prompts of `verify`: ordinary text, because random tokens give hidden states that do not occur in use."""


@dataclass(frozen=True)
class Report:
    """The results of `verify`."""

    differences: list[parity.Difference]
    tolerance: float
    dtype: str
    modules: str = "Megatron's local modules"
    """Backend of the layers; on CUDA it depends on the dtype."""

    @property
    def passed(self) -> bool:
        """Whether logits and loss (absolute) and gradients (relative) of every layout are within the tolerance."""
        return all(
            d.logits <= self.tolerance and d.gradient <= self.tolerance and d.loss <= self.tolerance
            for d in self.differences
        )

    def table(self) -> str:
        """One line per layout."""
        lines = [f"{'layout':18} {'logits':>9} {'loss':>9} {'gradients':>9}  {'':4} worst gradient"]
        for d in self.differences:
            ok = "ok" if max(d.logits, d.gradient, d.loss) <= self.tolerance else "FAIL"
            lines.append(
                f"{d.layout:18} {d.logits:9.1e} {d.loss:9.1e} {d.gradient:9.1e}  {ok:4} {d.worst} (of {d.tensors})"
            )
        verdict = "every layout equals Hugging Face" if self.passed else "NOT EQUAL"
        return "\n".join(
            [
                *lines,
                f"{verdict} within {self.tolerance:g} ({self.dtype}, {self.modules}; gradients relative to the tensor's largest)",
            ]
        )


def verify(
    model: str,
    layouts: Sequence[str] | None,
    *,
    tolerance: float,
    prompts: str | None,
    tuner: str,
    target_modules: Sequence[str],
    adapters: str | None,
    dtype: str,
    dequantize: bool,
) -> Report:
    """Does what `api.verify` says."""
    say_of_unused_gpus()
    source = Source(model, dequantize=dequantize)
    settings = source.settings
    chosen = [_parsed(name, settings.shape, dtype) for name in layouts] if layouts else _fitting(settings.shape, dtype)
    microbatches = math.lcm(*(layout.data * layout.pipeline for _, layout in chosen))
    rows = _rows(model, prompts, settings.shape.vocab, 2 * microbatches * max(1, 4 // microbatches))
    run = schema.Run(
        model=schema.Model(path=model, dtype=dtype, dequantize=dequantize),  # type: ignore[arg-type]
        tuner=_verified_tuner(tuner, target_modules, adapters, source),
    )
    with tempfile.TemporaryDirectory(prefix="swift-mega-verify-") as folder:
        found = Path(folder)
        adapter = Path(adapters) if adapters else None
        if run.tuner.type == "lora" and adapter is None:
            adapter = found / "adapter"
            alone = plan_layout(schema.Parallel(), settings.shape, 1)
            run_ranks(1, on_device, parity.random_adapter, _for(run, schema.Parallel()), alone, adapter)
        plain = Path(model)
        if dequantize:
            plain = found / "plain"
            stream.restream(source.tensors, plain, max_shard_bytes=1 << 62, derived=source.family.derived)
        run_ranks(1, parity.reference, plain, adapter, rows, found / "reference", getattr(torch, dtype))
        differences: list[parity.Difference] = []
        for parallel, layout in tqdm(chosen, desc="layouts", unit="layout"):
            mine = _for(run, parallel, (str(adapter),) if adapter else ())
            output = found / f"layout{len(differences)}"
            run_ranks(layout.world, on_device, parity.measure, mine, layout, rows, output)
            differences.append(parity.compare(layout.name, found / "reference", output))
            shutil.rmtree(output)
        return Report(differences, tolerance, dtype, layer_modules(DEVICE, getattr(torch, dtype)))


def say_of_unused_gpus() -> None:
    """Prints one line on rank 0 where ranks run on the CPU although the machine has GPUs."""
    if is_first_rank() and (unused := devices.unused_gpus()):
        print(unused, file=sys.stderr)


def _verified_tuner(tuner: str, target_modules: Sequence[str], adapters: str | None, source: Source) -> schema.Tuner:
    """The tuner to verify; for a given adapter it has the adapter's rank, scale and targets."""
    if adapters is None:
        return schema.Lora(target_modules=tuple(target_modules)) if tuner == "lora" else schema.Full()
    return tuner_of(adapters, source.family, source.settings)


def _for(run: schema.Run, parallel: schema.Parallel, adapters: tuple[str, ...] = ()) -> schema.Run:
    """`run` in a layout, without the distributed optimizer: it would shard gradients over data ranks, and they are compared whole."""
    return dataclasses.replace(
        run,
        parallel=dataclasses.replace(parallel, distributed_optimizer=False),
        model=dataclasses.replace(run.model, adapters=adapters),
    )


def _parsed(name: str, shape: Any, dtype: str) -> tuple[schema.Parallel, Layout]:
    parallel, world = parse_layout(name)
    layout = plan_layout(parallel, shape, world)
    check_te_runs(layout.mesh, DEVICE, getattr(torch, dtype))
    return parallel, layout


def _fitting(shape: Any, dtype: str) -> list[tuple[schema.Parallel, Layout]]:
    fitting, tensors = [], set()
    for name in LAYOUTS:
        try:
            parallel, layout = _parsed(name, shape, dtype)
        except UserError:
            continue
        if layout.tensor == 3 and 2 in tensors:
            continue
        tensors.add(layout.tensor)
        fitting.append((parallel, layout))
    return fitting


def _rows(model: str, prompts: str | None, vocab: int, count: int) -> list[list[int]]:
    """`count` lists of token ids, or a multiple of `count`: sentences where the model has a tokenizer, else random tokens."""
    held = any((Path(model) / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))
    if prompts is None and not held:
        return parity.example_rows(vocab, examples=count)
    tokenizer = load_tokenizer(model)
    found = prompt_rows(prompts, tokenizer) if prompts is not None else line_rows(SENTENCES, tokenizer)
    for where, row in found:
        check_tokens(row, vocab, tokenizer, where=where)
    rows = [row for _, row in found if len(row) > 1]
    if not rows:
        raise UserError(
            f"{prompts} has no prompt of two tokens or more; give a text file with one prompt a line, or a data set"
        )
    return [rows[number % len(rows)] for number in range(-(-len(rows) // count) * count)]
