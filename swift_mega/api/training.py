"""Training from settings or a recipe."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from swift_mega.api.conversion import say_of_source
from swift_mega.api.ready import DEVICE, on_device
from swift_mega.api.resizing import resized
from swift_mega.config import schema
from swift_mega.config.check import check_inputs
from swift_mega.convert.files.hf_write import companions
from swift_mega.data.chat import load_tokenizer
from swift_mega.data.loader import Prepared, prepare
from swift_mega.data.vocabulary import pad_row_note
from swift_mega.export.adapters import tuner_of
from swift_mega.export.companions import UNCHANGED, of_adapter, stop_tokens
from swift_mega.launch.torchrun import is_first_rank, joined, run_ranks, world_size
from swift_mega.models.kernels import check_kernels
from swift_mega.models.modules.te_attention import check_te_runs
from swift_mega.models.modules.tiles import check_tiles
from swift_mega.models.settings import Settings
from swift_mega.objectives.objective import find_objective
from swift_mega.ops.kernels import kernels_of
from swift_mega.parallel.agree import on_every_rank
from swift_mega.parallel.layout import Layout, plan_layout
from swift_mega.train.build import parameter_dtype, source_of, source_of_run
from swift_mega.train.loop import TrainResult, make_batches, total_steps, train_rank
from swift_mega.train.preflight import check_run
from swift_mega.train.wire import warmup_steps
from swift_mega.tuners.tuner import find_tuner


def _continued(run: schema.Run, sources: Mapping[str, str] | None) -> schema.Run:
    """The run with tuner settings of the adapter that it continues, where the user did not set them."""
    if sources is None or len(run.model.adapters) != 1 or run.tuner.type != "lora" or run.model.path is None:
        return run
    source = source_of(run.model)
    theirs = tuner_of(run.model.adapters[0], source.family, source.settings)
    unset = [
        name
        for name in ("rank", "alpha", "rslora", "target_modules")
        if sources.get(f"tuner.{name}", "default") == "default"
    ]
    return dataclasses.replace(
        run, tuner=dataclasses.replace(run.tuner, **{name: getattr(theirs, name) for name in unset})
    )


def train(run: schema.Run, *, nproc: int | None, sources: Mapping[str, str] | None) -> TrainResult:
    """Does what `api.train` says."""
    world = world_size(nproc)
    if joined() and world > 1:
        return run_ranks(
            world, _train_joined, run, nproc, sources, timeout_minutes=run.parallel.distributed_timeout_minutes
        )
    run = _continued(run, sources)
    with ExitStack() as stack:
        run, layout, prepared, pad = _checked(run, nproc, stack)
        return run_ranks(
            layout.world,
            on_device,
            train_rank,
            run,
            layout,
            prepared,
            pad,
            timeout_minutes=run.parallel.distributed_timeout_minutes,
        )


def _train_joined(run: schema.Run, nproc: int | None, sources: Mapping[str, str] | None) -> TrainResult:
    run = on_every_rank(lambda: _continued(run, sources))
    with ExitStack() as stack:
        run, layout, prepared, pad = on_every_rank(lambda: _checked(run, nproc, stack))
        return on_device(train_rank, run, layout, prepared, pad)


def _checked(run: schema.Run, nproc: int | None, stack: ExitStack) -> tuple[schema.Run, Layout, Prepared, int]:
    """What ranks need: the run, the layout, the examples, and the padding token id. A resized model is deleted when `stack` closes."""
    check_inputs(run, command="train")
    run = stack.enter_context(resized(run, training=True))
    assert run.model.path is not None
    source = source_of_run(run)
    settings = source.settings
    layout = plan_layout(run.parallel, settings.shape, world_size(nproc))
    dtype = parameter_dtype(run.model, DEVICE)
    check_te_runs(layout.mesh, DEVICE, dtype)
    check_run(run, source.family, settings, dtype, DEVICE)
    touch = DEVICE.kind == "cpu"  # GPUs are for the ranks, which check again
    check_kernels(kernels_of(run.train), settings, layout.mesh, DEVICE, dtype, touch=touch)
    if layout.context > 1 and is_first_rank():
        mesh = layout.mesh
        means = "all keys gathered" if mesh.gather else f"Ulysses {mesh.ulysses} x ring {mesh.ring}"
        padded = f"rows are padded to {layout.row_multiple} tokens"
        if mesh.te:
            means = f"Transformer Engine's {mesh.communication}"
            padded = f"every example is padded to a multiple of {mesh.example_multiple} tokens, and {padded}"
        print(f"context             {layout.context} ranks: {means} ({layout.mesh_reason}); {padded}")
    if (note := check_tiles(settings, run.train, run.model.megatron)) and is_first_rank():
        print(note)
    # Finds errors in the files before ranks start.
    source.open()
    companions(Path(run.model.path))
    whole = not run.tuner.makes_adapter
    say_of_source(source, kept=whole, trained=whole)
    objective = find_objective(run.objective)
    tokenizer = load_tokenizer(run.model.path)
    prepared = _prepare(run, tokenizer, layout.mesh.example_multiple, settings, objective.fields)
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    batches, _ = make_batches(run, layout, 0, prepared, pad)
    steps = total_steps(run.train, batches)
    warmup_steps(run.optim, steps)
    if run.train.steps is not None and (passes := batches.passes(steps)) > 1 and is_first_rank():
        what = "packed rows" if run.data.packing else "examples"
        print(f"repetition          train.steps={steps} goes over the {batches.units} {what} {passes:.3g} times")
    if is_first_rank():
        for line in about_ends(prepared, tokenizer, stop_tokens(run.model.path)):
            print(line, flush=True)
    return run, layout, prepared, pad


def _prepare(run: schema.Run, tokenizer: Any, pad_each: int, settings: Settings, fields: Sequence[str]) -> Prepared:
    """Tokenised examples; rank 0 shows progress and prints the report."""
    with tqdm(desc="tokenising", unit="rows", disable=not (is_first_rank() and run.monitor.progress)) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        before = of_adapter(run.model.adapters[0]) if run.model.adapters else UNCHANGED
        prepared = prepare(
            run.data,
            tokenizer,
            progress=progress,
            pad_each=pad_each,
            vocab=settings.shape.vocab,
            before=before,
            fields=fields,
        )
    if is_first_rank():
        print(prepared.report, flush=True)
        # An adapter does not train the embedding.
        pad = settings.pad_row if find_tuner(run.tuner).trains_model else None
        if note := pad_row_note(prepared.train, pad, tokenizer, tied=settings.tied):
            print(note, flush=True)
    return prepared


def about_ends(prepared: Prepared, tokenizer: Any, before: tuple[int, ...]) -> list[str]:
    """Lines about the tokens that end replies; none where generation already stops at them."""

    def named(tokens: Iterable[int]) -> str:
        return ", ".join(f"{tokenizer.convert_ids_to_tokens(token)} ({token})" for token in tokens) or "no token"

    ends, lines = prepared.ends, []
    for mode, count in prepared.modes.items():
        lines.append(
            f"generation prompt   {count} replies follow the prompt that {mode} gives, not the default one: ask the model with it "
            "(chat_template_kwargs)"
        )
    if added := [token for token in prepared.trained.end_tokens if token not in before]:
        lines.append(
            f"end of turn         {named(added)} ends the replies, and the model's generation stops at {named(before)}; what this run "
            f"writes stops at {named(dict.fromkeys([*before, *added]))} (eos_token_id in generation_config.json)"
        )
    if ends is not None and ends.untrained:
        lines.append(
            f"end of turn         {ends.untrained.total()} replies end with {named(ends.untrained)}, which has no loss (the template's "
            "{% generation %} excludes it): the model does not learn to stop"
        )
    if ends is not None and ends.without:
        lines.append(
            f"end of turn         {ends.without} replies end with ordinary text, of which no token can stop generation; a chat "
            "template that ends each turn with a special token would let the model stop"
        )
    return lines
