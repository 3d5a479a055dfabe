"""Hidden states of a running model at the same points in Megatron-core, in any layout, and in transformers.

The points are: the input of the first decoder layer, the output of each decoder layer, the output of the final norm, and the logits.
Hooks on the decoder layers read them, so the points do not depend on how a backend defines its hidden states (the last entry of
transformers' `output_hidden_states` is after the norm). Each state is passed on at once, so only one state is in memory.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from swift_mega.config import schema
from swift_mega.convert.files import stream
from swift_mega.convert.files.quantised import open_checkpoint
from swift_mega.convert.megatron.mcore import companions_of, load_mcore
from swift_mega.convert.source import Source
from swift_mega.data.pack import Example, Microbatch, collate
from swift_mega.device.device import Device
from swift_mega.export.adapters import load_adapter, tuner_of
from swift_mega.models.build import ModelPart, build
from swift_mega.models.megatron_config import transformer_config
from swift_mega.objectives.objective import Head
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.agree import agree, on_first_rank
from swift_mega.parallel.context import gather_row
from swift_mega.parallel.groups import Groups
from swift_mega.parallel.layout import Layout
from swift_mega.train.build import build_part, dequantised_dtype
from swift_mega.train.step import local_part
from swift_mega.tuners.tuner import find_tuner
from swift_mega.verify.transformers_side import decoder_layers, head_of, is_peft, network_of

Rows = Sequence[Sequence[int]]
Take = Callable[[int, int, Tensor], None]
"""Called with (prompt, point, state [tokens, width]) on one rank for each point."""


def point_names(layers: int) -> tuple[str, ...]:
    """Names of a model's points, in the order of computation."""
    return ("embedding", *(f"layer {number}" for number in range(layers)), "final norm", "logits")


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two models that are compared, and how it is run."""

    checkpoint: Path
    """A Hugging Face directory, or a Megatron checkpoint."""
    config: Path
    """The directory of its config.json."""
    model: str | None
    """Directory that was given for config and tokenizer of a Megatron checkpoint written by another program."""
    backend: Literal["mcore", "hf"]
    mcore_files: bool
    layout: Layout | None
    """Layout of Megatron-core; None: transformers, which runs on one rank."""
    layers: int
    hidden: int
    vocab: int
    adapter: Path | None
    dequantize: bool

    @property
    def name(self) -> str:
        """The checkpoint with its adapter, backend and layout, for messages."""
        adapter = f" + {self.adapter}" if self.adapter else ""
        return f"{self.checkpoint}{adapter} ({'transformers' if self.layout is None else f'mcore, {self.layout.name}'})"


def run_side(side: Side, device: Device, rows: Rows, dtype: torch.dtype, take: Take, scratch: Path) -> None:
    """Runs every prompt and calls `take` with the state at every point. Collective; transformers runs on rank 0 only.

    scratch: an existing folder for a copy of the checkpoint that transformers can read, where one is needed.
    """
    if side.backend == "mcore":
        _run_mcore(side, device, rows, dtype, take)
    else:
        agree(on_first_rank(lambda: _run_transformers(side, device, rows, dtype, take, scratch)))
    # Hooks and modules refer to each other. Under torchrun the next model is built in the same process, so memory is freed here.
    gc.collect()


# ------------------------------------------------------------------------------------------------ Megatron-core


def _run_mcore(side: Side, device: Device, rows: Rows, dtype: torch.dtype, take: Take) -> None:
    assert side.layout is not None
    groups = parallel_groups.init(side.layout)
    try:
        part = _load_part(side, device, groups, dtype)
        hooks = _StateHooks(part, groups, Head(part, groups), [len(row) for row in rows], take)
        hooks.attach()
        batches = [(number, _microbatch(row, side.layout)) for number, row in enumerate(rows)]
        # The interleaved schedule needs a multiple of `pipeline` microbatches; the results of the added ones are ignored.
        batches += [(len(rows), batches[-1][1])] * (-len(rows) % side.layout.pipeline)
        _forward_all(part, batches, partial(_step, hooks, device.device))
    finally:
        parallel_groups.close()


def _microbatch(row: Sequence[int], layout: Layout) -> Microbatch:
    import numpy as np

    example = Example(tokens=np.asarray(row, dtype=np.int32), trained=np.ones(len(row), dtype=bool))
    return collate([example], layout.row_multiple, pad_each=layout.mesh.example_multiple)


def _load_part(side: Side, device: Device, groups: Groups, dtype: torch.dtype) -> ModelPart:
    """This rank's part of a side's model, loaded as for training, without an optimizer."""
    run = schema.Run(model=schema.Model(dequantize=side.dequantize))
    if side.mcore_files:
        _, kinds = companions_of(side.checkpoint, side.model)
        source = Source(side.config, dequantize=side.dequantize, names=kinds or ())
        settings = source.settings
        config = transformer_config(settings, groups.layout, device=device, dtype=dtype, train=run.train, given={})
        part = build(
            source.family,
            settings,
            groups.layout,
            groups.coordinate,
            device=device,
            config=config,
            reads_inputs=side.adapter is not None,
        )
        load_mcore(part, groups, side.checkpoint)
    else:
        source = Source(side.checkpoint, dequantize=dequantised_dtype(run.model, dtype) or False)
        part = build_part(run, device, groups, dtype=dtype, reads_inputs=side.adapter is not None, source=source)
    if side.adapter is not None:
        tuner = find_tuner(tuner_of(side.adapter, part.family, part.settings))
        tuner.attach(part, seed=run.train.seed)
        load_adapter(side.adapter, list(tuner.exported(part)), part, tuner.adapter_config(part, str(side.config)))
    for chunk in part.chunks:
        chunk.eval()
    return part


def _forward_all(part: ModelPart, batches: Sequence[tuple[int, Microbatch]], step: Callable[..., Any]) -> None:
    """One forward pass of every microbatch by Megatron's schedule. Every data rank runs all of them; the states of data rank 0 are used."""
    chunks, iterators = part.chunks, [iter(batches) for _ in part.chunks]
    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(batches),
            seq_length=max(len(batch.tokens) for _, batch in batches),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )


def _step(
    hooks: "_StateHooks", device: torch.device, batches: Iterator[tuple[int, Microbatch]], model: torch.nn.Module
) -> tuple[Tensor, Any]:
    hooks.prompt, row = next(batches)
    hooks.bounds = row.cu_seqlens.tolist()
    row = local_part(row, hooks.groups.row)
    hidden = model(row.tokens.to(device), row.positions.to(device), row.cu_seqlens, hooks.groups.row)
    return hidden, partial(hooks.last, model)


@dataclass
class _StateHooks:
    """The hooks of one rank: they gather a state over tensor and context ranks and pass it to `take`."""

    part: ModelPart
    groups: Groups
    head: Head
    lengths: Sequence[int]
    take: Take
    prompt: int = 0
    bounds: Sequence[int] = ()
    """Begin of each example in the packed row, then the end of the row (cu_seqlens)."""

    def attach(self) -> None:
        for virtual, chunk in enumerate(self.part.chunks):
            layers = self.part.layout.layers_of(self.groups.coordinate.pipeline, virtual)
            if chunk.pre_process:
                chunk.decoder.layers[0].register_forward_pre_hook(self._entering, with_kwargs=True)
            for number, layer in zip(layers, chunk.decoder.layers, strict=True):
                layer.register_forward_hook(partial(self._leaving, 1 + number))

    def _entering(self, module: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._states(0, given[0] if given else named["hidden_states"])

    def _leaving(self, point: int, module: torch.nn.Module, given: tuple[Any, ...], result: Any) -> None:
        self._states(point, _first(result))

    def last(self, chunk: Any, hidden: Tensor, non_loss_data: bool) -> None:
        """The schedule calls this on the last stage instead of a loss."""
        norm = self.part.settings.shape.layers + 1
        self._states(norm, hidden)
        logits = self.head.local_logits(chunk, hidden)
        if self.groups.coordinate.data == 0:
            whole = _gather(logits, self.groups, dim=-1)
            self._hand(norm + 1, whole[:, : self.part.settings.shape.vocab])

    def _states(self, point: int, local: Tensor) -> None:
        """local: [tokens / s, 1, hidden]; s is the tensor size with sequence parallelism, else 1. tokens: of this context rank."""
        if self.groups.coordinate.data == 0:
            whole = _gather(local, self.groups, dim=0) if self.groups.layout.sequence else local
            self._hand(point, whole[:, 0])

    def _hand(self, point: int, whole: Tensor) -> None:
        whole = gather_row(whole, self.groups.row, self.bounds)
        where = self.groups.coordinate
        if where.tensor == 0 and where.context == 0 and self.prompt < len(self.lengths):
            self.take(self.prompt, point, whole[: self.lengths[self.prompt]])


def _gather(local: Tensor, groups: Groups, *, dim: int) -> Tensor:
    """The shards of all tensor ranks, concatenated along `dim`."""
    if groups.layout.tensor == 1:
        return local
    pieces = [torch.empty_like(local) for _ in range(groups.layout.tensor)]
    dist.all_gather(pieces, local.contiguous(), group=groups.tensor)
    return torch.cat(pieces, dim=dim)


def _first(result: Any) -> Tensor:
    """The hidden states in a layer's output: a tensor, or the first item of a tuple."""
    return result[0] if isinstance(result, tuple) else result


# ------------------------------------------------------------------------------------------------ transformers


def _run_transformers(side: Side, device: Device, rows: Rows, dtype: torch.dtype, take: Take, scratch: Path) -> None:
    network = network_of(_readable(side, scratch), side.adapter, dtype).to(device.device)
    inner = network.get_base_model() if is_peft(network) else network
    prompt = 0

    def hand(point: int, value: Tensor) -> None:
        take(prompt, point, value[0])

    def entering(module: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        hand(0, given[0] if given else named["hidden_states"])

    def leaving(point: int, module: torch.nn.Module, given: tuple[Any, ...], result: Any) -> None:
        hand(point, _first(result))

    def normed(module: torch.nn.Module, given: tuple[Any, ...]) -> None:
        hand(side.layers + 1, given[0])

    layers = decoder_layers(inner, side.layers, where=side.config)
    layers[0].register_forward_pre_hook(entering, with_kwargs=True)
    for number, layer in enumerate(layers):
        layer.register_forward_hook(partial(leaving, 1 + number))
    head_of(inner, where=side.config).register_forward_pre_hook(normed)
    with torch.no_grad():
        for prompt, row in enumerate(rows):  # noqa: B007  # read by `hand`
            tokens = torch.tensor(row, device=device.device)[None]
            hand(side.layers + 2, network(input_ids=tokens, use_cache=False).logits[..., : side.vocab])


def _readable(side: Side, scratch: Path) -> Path:
    """A directory of the side's checkpoint that transformers can read, with plain weights."""
    if not side.dequantize:
        return side.checkpoint
    stream.restream(open_checkpoint(side.checkpoint, torch.float32), scratch / "plain", max_shard_bytes=1 << 62)
    return scratch / "plain"
