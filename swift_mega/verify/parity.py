"""Compares logits, loss and all gradients of a layout with Hugging Face's, on a real checkpoint.

The reference is transformers (and PEFT) alone, one example at a time. A layout runs the code of training: the same loader, Megatron's
schedule, the same loss and gradient reduction. The checkpoint writer writes its gradients as Hugging Face tensors.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from swift_mega.config import schema
from swift_mega.convert.files.hf_files import Checkpoint
from swift_mega.convert.save import write_directory
from swift_mega.convert.source import Source
from swift_mega.data.pack import Example, Microbatch, collate
from swift_mega.device.device import Device
from swift_mega.export.checkpoint import save_checkpoint
from swift_mega.models.build import NamedParameter
from swift_mega.objectives.objective import Output
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.agree import agree, on_first_rank
from swift_mega.parallel.context import gather_row
from swift_mega.parallel.layout import Layout
from swift_mega.train.step import run_forward, run_schedule
from swift_mega.train.wire import Training, build_training
from swift_mega.tuners.lora_files import PREFIX, PeftAdapter, read_adapter
from swift_mega.verify import transformers_side

Rows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Difference:
    """The difference of a layout from Hugging Face."""

    layout: str
    logits: float
    """Largest absolute difference."""
    loss: float
    """Absolute difference of the mean loss per token."""
    gradient: float
    """The largest value over all tensors of max |difference| / max |reference|."""
    worst: str
    """Name of the tensor with this value."""
    tensors: int
    """Number of gradients that were compared."""


def example_rows(
    vocab: int, *, examples: int = 8, shortest: int = 5, longest: int = 24, seed: int = 0
) -> list[list[int]]:
    """Lists of random token ids with random lengths; deterministic."""
    draw = random.Random(seed)
    return [[draw.randrange(vocab) for _ in range(draw.randint(shortest, longest))] for _ in range(examples)]


def microbatches(rows: Rows, layout: Layout, data_rank: int) -> list[Microbatch]:
    """This data rank's examples, two in each microbatch, so that packing is tested too; every token is trained."""
    import numpy as np

    examples = [Example(tokens=np.asarray(row, dtype=np.int32), trained=np.ones(len(row), dtype=bool)) for row in rows]
    pairs = [examples[start : start + 2] for start in range(0, len(examples), 2)]
    assert len(pairs) % (layout.data * layout.pipeline) == 0, f"{len(pairs)} microbatches for {layout.name}"
    each = layout.mesh.example_multiple
    return [collate(pair, layout.row_multiple, pad_each=each) for pair in pairs[data_rank :: layout.data]]


# ------------------------------------------------------------------------------------------------ Hugging Face's side


def reference(model: Path, adapter: Path | None, rows: Rows, output: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes gradients and logits of transformers (and PEFT) for `rows` to `output`.

    Where the adapter is merged (transformers_side.network_of), its gradients follow by the chain rule:
    W = W0 + s B A gives dA = s B^T dW, dB = s dW A^T.
    """
    output.mkdir(parents=True, exist_ok=True)
    family = Source(model).family
    network = transformers_side.network_of(model, adapter, dtype)
    folded = adapter is not None and not transformers_side.is_peft(network)
    save_file(_backward(network, rows), output / "logits.safetensors")
    if adapter is None:
        gradients = {family.on_disk(name): value for name, value in _model_gradients(network).items()}
    elif folded:
        gradients = _chain_rule(read_adapter(adapter), _model_gradients(network))
    else:
        gradients = _adapter_gradients(network)
    folder = output / "gradients"
    folder.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in gradients.items()}, folder / "model.safetensors")


def _backward(network: Any, rows: Rows) -> dict[str, Tensor]:
    """Runs forward and backward for all rows; returns the logits of each row and the mean loss per token."""
    count = sum(len(row) - 1 for row in rows)
    found, total = {}, 0.0
    for number, row in enumerate(rows):
        tokens = torch.tensor(row)[None]
        logits = network(input_ids=tokens, use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:], reduction="sum") / count
        loss.backward()
        found[f"logits.{number}"] = logits.detach().contiguous()
        total += float(loss.detach())
    found["loss"] = torch.tensor(total, dtype=torch.float64)
    return found


def _chain_rule(adapter: PeftAdapter, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    factors = {}
    for module in sorted(adapter.modules):
        name, grad = f"{PREFIX}{module}.lora_", gradients[f"{module}.weight"]
        down, up = (adapter.checkpoint.read(f"{name}{letter}.weight").to(grad.dtype) for letter in "AB")
        factors[f"{name}A.weight"] = adapter.scale * up.t() @ grad
        factors[f"{name}B.weight"] = adapter.scale * grad @ down.t()
    return factors


def _model_gradients(network: Any) -> dict[str, Tensor]:
    """Gradients by their names in checkpoints; for experts these differ from the names of the module's parameters."""
    from transformers.core_model_loading import revert_weight_conversion

    gradients = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}
    return revert_weight_conversion(network, gradients)


def _adapter_gradients(network: Any) -> dict[str, Tensor]:
    return {
        name.replace(".default.", "."): parameter.grad
        for name, parameter in network.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }


# ------------------------------------------------------------------------------------------------ the layout's side


def random_adapter(run: schema.Run, device: Device, layout: Layout, output: Path) -> None:
    """Writes an adapter with the run's settings and nonzero `up` factors, so that no gradient is zero. Collective."""
    groups = parallel_groups.init(layout, seed=run.train.seed)
    try:
        training = build_training(run, device, groups, steps=1)
        draw = torch.Generator().manual_seed(run.train.seed)
        with torch.no_grad():
            for named in training.tuner.exported(training.part):
                if ".adapter.up." in named.name:
                    named.parameter.copy_(torch.randn(named.parameter.shape, generator=draw) * 0.05)
        assert run.model.path is not None
        save_checkpoint(
            training.tuner,
            training.part,
            groups,
            output,
            source=run.model.path,
            max_shard_size="5GB",
            dtype=torch.float32,
        )
    finally:
        parallel_groups.close()


def measure(run: schema.Run, device: Device, layout: Layout, rows: Rows, output: Path) -> None:
    """Writes gradients and logits of a layout for `rows` to `output`, as `reference` does. Runs on each rank of the layout."""
    groups = parallel_groups.init(layout, seed=run.train.seed)
    try:
        write_measured(build_training(run, device, groups, steps=1), rows, output)
    finally:
        parallel_groups.close()


def write_measured(training: Training, rows: Rows, output: Path) -> None:
    """Writes what `measure` writes, for an existing training; its weights do not change. Collective."""
    groups = training.groups
    mine = microbatches(rows, groups.layout, groups.coordinate.data)
    logits = collect_logits(training, mine)
    for chunk in training.chunks:
        chunk.zero_grad_buffer()
    loss = run_schedule(training, mine, forward_only=False).loss
    agree(on_first_rank(lambda: output.mkdir(parents=True, exist_ok=True)))
    _write_logits(training, logits, loss, output)
    trained = [named for named in training.tuner.exported(training.part) if named.parameter.requires_grad]
    write_directory(
        training.part,
        groups,
        output / "gradients",
        trained,
        dtypes=training.part.config.params_dtype,
        max_shard_bytes=1 << 40,
        companions=lambda staging: None,
        overwrite=True,
        value=_gradient,
        allow_nonfinite=True,
    )


def _gradient(named: NamedParameter) -> Tensor:
    return named.parameter.main_grad  # type: ignore[attr-defined]  # Megatron's, filled by its DDP


def collect_logits(training: Training, rows: Sequence[Microbatch]) -> list[list[Tensor]]:
    """Logits [tokens, vocabulary] of each example of each microbatch, on the host of last-stage ranks; [] on other stages. Collective."""
    return run_forward(training, rows, _logits_of_examples)


def _logits_of_examples(output: Output) -> list[Tensor]:
    """Logits over the whole vocabulary, split by example and without padding. Collective."""
    local, groups, batch = output.local_logits(), output.head.groups, output.batch
    shards = [torch.empty_like(local) for _ in range(groups.layout.tensor)]
    dist.all_gather(shards, local.contiguous(), group=groups.tensor)
    bounds, lengths = batch.cu_seqlens.tolist(), batch.lengths.tolist()
    vocab = output.head.part.settings.shape.vocab
    whole = gather_row(torch.cat(shards, dim=-1)[:, :vocab], groups.row, bounds).cpu()
    return [whole[start : start + length] for start, length in zip(bounds, lengths, strict=False)]


def _write_logits(training: Training, collected: list[list[Tensor]], loss: float, output: Path) -> None:
    """Each data rank's last stage writes its own file. Names have the example's number in `rows` (see `microbatches`)."""
    where, layout = training.groups.coordinate, training.groups.layout
    if not (training.groups.is_last_stage and where.tensor == 0 and where.context == 0):
        return
    named = {
        f"logits.{2 * (where.data + layout.data * number) + place}": value.contiguous()
        for number, examples in enumerate(collected)
        for place, value in enumerate(examples[:2])
    }
    named["loss"] = torch.tensor(loss, dtype=torch.float64)
    save_file(named, output / f"logits-{where.data}.safetensors")


# ------------------------------------------------------------------------------------------------ the comparison


def compare(name: str, expected: Path, found: Path) -> Difference:
    """The differences between two directories written by `reference` or `measure`. expected: the reference."""
    want = (
        load_file(expected / "logits.safetensors") if (expected / "logits.safetensors").is_file() else _joined(expected)
    )
    have = _joined(found)
    if want.keys() != have.keys():
        raise AssertionError(f"{name}: examples differ: {sorted(want.keys() ^ have.keys())}")
    logits = max(_largest(want[key] - have[key]) for key in want if key != "loss")
    loss = _largest(want["loss"] - have["loss"])
    worst, gradient, tensors = "", 0.0, 0
    for key, expected_gradient, gradient_found in gradients(expected, found):
        tensors += 1
        difference = _largest(expected_gradient - gradient_found) / max(_largest(expected_gradient), 1e-8)
        if not difference <= gradient:
            worst, gradient = key, difference
    return Difference(name, logits, loss, gradient, worst, tensors)


def gradients(expected: Path, found: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Pairs of gradients by Hugging Face name; AssertionError where the names differ."""
    want, have = Checkpoint(expected / "gradients"), Checkpoint(found / "gradients")
    odd = sorted(want.entries.keys() ^ have.entries.keys())
    if odd:
        raise AssertionError(f"gradients on one side only: {odd[:6]} and {max(len(odd) - 6, 0)} more")
    for key in want.entries:
        yield key, want.read(key), have.read(key)


def _joined(directory: Path) -> dict[str, Tensor]:
    return {
        key: value for file in sorted(directory.glob("logits-*.safetensors")) for key, value in load_file(file).items()
    }


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max()) if difference.numel() else 0.0
