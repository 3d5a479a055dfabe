"""The verbs. Each makes cheap checks, then imports `swift_mega.api` and calls one of its functions."""

import re
from pathlib import Path
from typing import Any

from swift_mega.cli.arguments import Arguments
from swift_mega.cli.files import check_output, model_of
from swift_mega.config.check import check_inputs, check_model_directory
from swift_mega.config.parse import size_in_bytes
from swift_mega.config.schema import Run
from swift_mega.config.show import to_yaml
from swift_mega.errors import UserError
from swift_mega.launch.torchrun import is_first_rank, joined, refuse_joined, world_size

LAYOUT = re.compile(
    r"single|(tp|pp|vpp|cp|dp|ep|etp)\d+(-((tp|pp|vpp|cp|dp|ep|etp|ulysses)\d+|sp|ring|ulysses|allgather|hybrid"
    r"|te:(p2p|a2a|allgather|a2a\d*\+p2p)))*"
)


def train(arguments: Arguments) -> int:
    nproc = arguments.whole("nproc")
    resolved = arguments.resolved()
    run = resolved.run
    # Finds a wrong environment before the imports.
    world_size(nproc)
    # Ranks of torchrun check their inputs later, together, in api.train.
    if not joined():
        check_inputs(run, command=arguments.verb.name)
    from swift_mega import api

    result = api.train(run, nproc=nproc, sources=resolved.sources)
    if is_first_rank():
        print(f"checkpoint  {result.checkpoint}")
        if result.merged is not None:
            print(f"merged      {result.merged}")
        print(f"plots       {result.directory / 'images'}")
    return 0


def convert(arguments: Arguments) -> int:
    refuse_joined("convert")
    to, dry = arguments.required("to"), arguments.switch("dry_run")
    output = arguments.text("output") if dry else arguments.required("output")
    run = arguments.resolved().run
    mcore, model = arguments.text("mcore"), run.model.path
    if to == "mcore":
        if mcore is not None:
            raise UserError(f"convert --to mcore reads --model; --mcore {mcore} has no effect; remove it")
        _refuse_given(
            arguments,
            "max_shard_size",
            "convert --to mcore: its files are split by ranks, not by size; remove --max_shard_size",
        )
    source = mcore if to == "hf" and mcore is not None else model
    if source is None:
        raise UserError(
            f"convert --to {to}: {'--model DIR' if to == 'mcore' else '--mcore DIR (or --model DIR)'} is missing"
        )
    if source == mcore and not Path(source).is_dir():
        raise UserError(f"--mcore={source}: no such directory; give a Megatron-core checkpoint")
    if model is not None:
        check_model_directory(model, what="--model")
    if source == mcore:
        _refuse_given(
            arguments, "dequantize", "convert --mcore: Megatron's files have plain weights; remove --dequantize"
        )
    overwrite = arguments.switch("overwrite")
    if output is not None:
        check_output(output, overwrite=overwrite, inputs=[path for path in (mcore, model) if path is not None])
    dtype = None if run.model.dtype == "auto" else run.model.dtype
    from swift_mega import api

    if dry:
        if run.model.resize_vocab or run.model.new_special_tokens:
            raise UserError("--dry_run reads the model as it is; remove --resize_vocab and --new_special_tokens")
        if source == mcore:
            raise UserError("--dry_run reports on a Hugging Face directory; give --model DIR, without --mcore")
        found = api.plan(source=source, parallel=run.parallel, dtype=dtype, dequantize=run.model.dequantize)
        print(found.table())
        return 0
    assert output is not None
    rows: dict[str, Any] = {"rows": run.model} if run.model.resize_vocab or run.model.new_special_tokens else {}
    api.convert(
        source=source,
        to=to,
        output=output,
        model=model if source == mcore else None,
        parallel=run.parallel,
        dtype=dtype,
        max_shard_size=run.export.max_shard_size,
        overwrite=overwrite,
        dequantize=run.model.dequantize,
        **rows,
    )
    return 0


def export(arguments: Arguments) -> int:
    refuse_joined("export")
    run = arguments.resolved().run
    if arguments.text("quant_method") is not None:
        return _export_quantized(arguments, run)
    if len(run.model.adapters) != 1:
        raise UserError(f"export: give one --adapters DIR, not {len(run.model.adapters)}")
    if not run.export.merge_lora:
        raise UserError(
            "export: an adapter is in PEFT's format already; give --merge_lora true to merge it into the model"
        )
    adapters = run.model.adapters[0]
    model = model_of(adapters, run.model.path)
    output = arguments.text("output") or adapters.rstrip("/") + "-merged"
    overwrite = arguments.switch("overwrite")
    check_output(output, overwrite=overwrite, inputs=[model, adapters])
    from swift_mega import api

    api.export(
        model=model,
        adapters=adapters,
        output=output,
        merge=True,
        max_shard_size=run.export.max_shard_size,
        overwrite=overwrite,
        dequantize=run.model.dequantize,
    )
    return 0


def _export_quantized(arguments: Arguments, run: Run) -> int:
    if run.model.adapters or run.export.merge_lora:
        raise UserError("export: --quant_method takes a whole model; merge the adapter first, then give --model MERGED")
    model, output, overwrite = run.model.path, arguments.text("output"), arguments.switch("overwrite")
    if model is None:
        raise UserError("export --quant_method: no model; give --model DIR")
    check_model_directory(model, what="--model")
    output = output or f"{model.rstrip('/')}-{arguments.text('quant_method')}"
    check_output(output, overwrite=overwrite, inputs=[model])
    from swift_mega import api

    api.quantize(
        model=model,
        output=output,
        max_shard_size=run.export.max_shard_size,
        overwrite=overwrite,
        dequantize=run.model.dequantize,
    )
    return 0


def verify(arguments: Arguments) -> int:
    refuse_joined("verify")
    run = arguments.resolved().run
    if run.model.path is None:
        raise UserError("verify: no model; give --model DIR")
    if arguments.switch("files"):
        return _verify_files(run.model.path)
    check_model_directory(run.model.path, what="--model")
    options: dict[str, Any] = {}
    if (words := arguments.options.get("layouts")) is not None:
        options["layouts"] = _layouts(words)
    if (tolerance := arguments.positive("tolerance")) is not None:
        options["tolerance"] = tolerance
    if (prompts := arguments.text("prompts")) is not None:
        if not Path(prompts).is_file():
            raise UserError(f"--prompts={prompts}: no such file")
        options["prompts"] = prompts
    if (tuner := arguments.text("tuner")) is not None:
        options["tuner"] = tuner
    if len(run.model.adapters) > 1:
        raise UserError(f"verify: give one --adapters DIR, not {len(run.model.adapters)}")
    if run.model.adapters:
        if tuner == "full":
            raise UserError(
                "verify: --adapters compares an adapter's gradients, --tuner full those of the model; remove one"
            )
        check_model_directory(run.model.adapters[0], what="--adapters", file="adapter_config.json")
        options["adapters"] = run.model.adapters[0]
    if run.model.dtype != "auto":
        options["dtype"] = run.model.dtype
    if run.model.dequantize:
        options["dequantize"] = True
    from swift_mega import api

    report = api.verify(run.model.path, **options)
    print(report.table())
    return 0 if report.passed else 1


def compare(arguments: Arguments) -> int:
    refuse_joined("compare")
    sides = [_side(arguments, letter) for letter in "ab"]
    options: dict[str, Any] = {
        name: value
        for name in ("prompts", "tokenizer", "scratch", "json", "plot")
        if (value := arguments.text(name)) is not None
    }
    if (tolerance := arguments.positive("tolerance")) is not None:
        options["tolerance"] = tolerance
    if (top_k := arguments.whole("top_k")) is not None:
        options["top_k"] = top_k
    model = arguments.resolved().run.model
    if model.dtype != "auto":
        options["dtype"] = model.dtype
    if model.dequantize:
        options["dequantize"] = True
    from swift_mega import api

    found = api.compare(*(api.Candidate(**side) for side in sides), **options)
    print(found.table())
    return 0 if found.passed else 1


def _side(arguments: Arguments, letter: str) -> dict[str, Any]:
    checkpoint = arguments.required(letter)
    if not Path(checkpoint).is_dir():
        raise UserError(
            f"--{letter}={checkpoint}: no such directory; give a Hugging Face directory or a Megatron checkpoint"
        )
    if (name := arguments.text(f"{letter}_layout")) is not None and not LAYOUT.fullmatch(name):
        raise UserError(f"--{letter}_layout={name}: expected sizes joined by dashes, such as tp2, pp2 or tp2-pp2-sp")
    fields = ("model", "adapter", "backend", "layout")
    return {"checkpoint": checkpoint, **{field: arguments.text(f"{letter}_{field}") for field in fields}}


def _verify_files(directory: str) -> int:
    if not Path(directory).is_dir():
        raise UserError(f"--model={directory}: no such directory; give a Hugging Face directory")
    from swift_mega.convert.files.report import problems

    tensors, found = problems(directory)
    for line in found:
        print(f"FAIL {line}")
    print(f"{len(found)} differences from report.json" if found else f"all {tensors} tensors match report.json")
    return 1 if found else 0


def plan(arguments: Arguments) -> int:
    refuse_joined("plan")
    run = arguments.resolved().run
    if run.model.path is None:
        raise UserError("plan: no model; give --model DIR, of which only config.json is read")
    check_model_directory(run.model.path, what="--model")
    parallel = run.parallel
    ranks = arguments.whole("ranks") or parallel.tensor * parallel.pipeline * parallel.context
    gpu = _size(arguments, "gpu_memory") or 80 * 10**9
    from swift_mega import api

    found = api.plan_memory(run, ranks=ranks, gpu_bytes=gpu, host_bytes=_size(arguments, "host_memory"))
    print(found.table())
    return 0 if found.fits else 1


def _size(arguments: Arguments, name: str) -> int | None:
    word = arguments.text(name)
    if word is None:
        return None
    if (size := size_in_bytes(word)) is None:
        raise UserError(f"--{name}={word}: expected a size such as 80GB or 79.6GiB")
    return size


def config(arguments: Arguments) -> int:
    resolved = arguments.resolved()
    print(to_yaml(resolved, only_changed=arguments.text("only") == "changed"), end="")
    return 0


def _layouts(words: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(name for word in words for name in word.split(",") if name)
    for name in names:
        if not LAYOUT.fullmatch(name):
            raise UserError(f"--layouts={name}: expected sizes joined by dashes, such as tp2, pp2 or tp2-pp2-sp")
    return names


def _refuse_given(arguments: Arguments, name: str, message: str) -> None:
    if any(flag.name.replace("-", "_") == name for flag in arguments.flags):
        raise UserError(message)
