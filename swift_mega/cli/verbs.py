"""The verbs. Each checks what can be checked cheaply, then imports `swift_mega.api` and calls one function of it."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swift_mega.cli.arguments import Arguments, Option, Verb
from swift_mega.cli.files import check_output, model_of, read_questions
from swift_mega.config.check import check_inputs, check_model_directory
from swift_mega.config.show import to_yaml
from swift_mega.errors import UserError
from swift_mega.launch.torchrun import is_first_rank, refuse_joined, world_size

LAYOUT = re.compile(r"single|(tp|pp|vpp|cp|dp|ep|etp)\d+(-((tp|pp|vpp|cp|dp|ep|etp)\d+|sp))*")
TRAINING_ONLY = (
    *("parallel.distributed_optimizer", "parallel.overlap_grad_reduce", "parallel.overlap_param_gather"),
    "parallel.ddp_bucket_size",
)
MAX_NEW_TOKENS = 256
END_OF_CHAT = ("exit", "quit")


def train(arguments: Arguments) -> int:
    nproc = arguments.whole("nproc")
    run = arguments.resolved().run
    check_inputs(run, command=arguments.verb.name)
    world_size(nproc)  # a wrong environment is found before the imports
    from swift_mega import api

    result = api.train(run, nproc=nproc)
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
            raise UserError(f"convert --to mcore reads --model; --mcore {mcore} has no effect, leave it out")
        _refuse_given(arguments, "max_shard_size", "convert --to mcore: its files are cut by ranks, not by size")
    source = mcore if to == "hf" and mcore is not None else model
    if source is None:
        raise UserError(
            f"convert --to {to}: {'--model DIR' if to == 'mcore' else '--mcore DIR (or --model DIR)'} is missing"
        )
    if source == mcore and not Path(source).is_dir():
        raise UserError(f"--mcore={source}: no such directory")
    if model is not None:
        check_model_directory(model, what="--model")
    if source == mcore:
        _refuse_given(
            arguments, "dequantize", "convert --mcore: Megatron's files hold plain weights; leave --dequantize out"
        )
    overwrite = arguments.switch("overwrite")
    if output is not None:
        check_output(output, overwrite=overwrite, inputs=[path for path in (mcore, model) if path is not None])
    dtype = None if run.model.dtype == "auto" else run.model.dtype
    from swift_mega import api

    if dry:
        if source == mcore:
            raise UserError(
                "--dry_run plans what is read from a Hugging Face directory; give --model DIR, without --mcore"
            )
        found = api.plan(source=source, parallel=run.parallel, dtype=dtype, dequantize=run.model.dequantize)
        print(found.table())
        return 0
    assert output is not None
    api.convert(
        source=source, to=to, output=output, model=model if source == mcore else None, parallel=run.parallel, dtype=dtype,
        max_shard_size=run.export.max_shard_size, overwrite=overwrite, dequantize=run.model.dequantize,
    )  # fmt: skip
    return 0


def export(arguments: Arguments) -> int:
    refuse_joined("export")
    run = arguments.resolved().run
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
        model=model, adapters=adapters, output=output, merge=True, max_shard_size=run.export.max_shard_size, overwrite=overwrite,
        dequantize=run.model.dequantize,
    )  # fmt: skip
    return 0


def infer(arguments: Arguments) -> int:
    refuse_joined("infer")
    run = arguments.resolved().run
    prompt, source, output = (arguments.text(name) for name in ("prompt", "input", "output"))
    if prompt is not None and source is not None:
        raise UserError("infer: --prompt and --input both say what to answer; leave one out")
    if output is not None and source is None:
        raise UserError("infer: --output needs --input FILE.jsonl")
    tokens = arguments.whole("max_new_tokens") or MAX_NEW_TOKENS
    if len(run.model.adapters) > 1:
        raise UserError(f"infer: give one --adapters DIR, not {len(run.model.adapters)}")
    adapters = run.model.adapters[0] if run.model.adapters else None
    model = model_of(adapters, run.model.path) if adapters else run.model.path
    if model is None:
        raise UserError("infer: no model; give --model DIR, or --adapters DIR")
    check_model_directory(model, what="--model")
    if output is not None and Path(output).exists() and not arguments.switch("overwrite"):
        raise UserError(f"--output={output} exists; give another file, or --overwrite true")
    questions = read_questions(source, system=run.data.system) if source is not None else []
    from swift_mega import api

    answerer = api.infer(model=model, adapters=adapters)

    def answer(messages: list[dict[str, str]]) -> str:
        return answerer.answer(messages, max_new_tokens=tokens)

    opening = [{"role": "system", "content": run.data.system}] if run.data.system else []
    if prompt is not None:
        print(answer([*opening, {"role": "user", "content": prompt}]))
    elif questions:
        _answer_rows(questions, output, answer)
    else:
        _chat(opening, answer)
    return 0


def _answer_rows(questions: list[Any], output: str | None, answer: Callable[[list[dict[str, str]]], str]) -> None:
    """One row at a time, so that a look at the unfinished file shows how far it is."""
    if output is None:
        for row, messages in questions:
            print(json.dumps(row | {"response": answer(messages)}, ensure_ascii=False), flush=True)
        return
    scratch = Path(output + ".part")
    with scratch.open("w", encoding="utf-8") as file:
        for row, messages in questions:
            print(json.dumps(row | {"response": answer(messages)}, ensure_ascii=False), file=file, flush=True)
    scratch.rename(output)


def _chat(opening: list[dict[str, str]], answer: Callable[[list[dict[str, str]]], str]) -> None:
    """A conversation on the terminal; `clear` starts anew, `exit` or end of file ends it."""
    prompt = "> " if sys.stdin.isatty() else ""
    messages = list(opening)
    while True:
        try:
            said = input(prompt).strip()
        except EOFError:
            return
        if said in END_OF_CHAT:
            return
        if said == "clear":
            messages = list(opening)
        elif said:
            messages.append({"role": "user", "content": said})
            reply = answer(messages)
            print(reply, flush=True)
            messages.append({"role": "assistant", "content": reply})


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
                "verify: --adapters compares an adapter's gradients, --tuner full those of the model; leave one out"
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


def _verify_files(directory: str) -> int:
    if not Path(directory).is_dir():
        raise UserError(f"--model={directory}: no such directory")
    from swift_mega.convert.report import problems

    tensors, found = problems(directory)
    for line in found:
        print(f"FAIL {line}")
    print(f"{len(found)} differences from report.json" if found else f"all {tensors} tensors are as report.json says")
    return 1 if found else 0


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


def _only(*keys: str) -> Callable[[str], bool]:
    return lambda key: key in keys


def _parallel_and(*keys: str) -> Callable[[str], bool]:
    return lambda key: key in keys or (key.startswith("parallel.") and key not in TRAINING_ONLY)


NPROC = Option(
    name="nproc",
    value="N",
    help="ranks to start on this machine; default NPROC_PER_NODE or 1. Under torchrun: none, it joins",
)
OUTPUT = Option(name="output", value="DIR", help="where to write; must be absent or empty")
OVERWRITE = Option(
    name="overwrite", value="true|false", help="replace what is there, once the new files are complete", kind="switch"
)

_ALL = (
    Verb(
        name="sft",
        summary="fine-tune on conversations",
        description="Fine-tune a Hugging Face model on conversations, in any layout, and leave Hugging Face files. "
        "Starts the ranks itself, or joins those of torchrun.",
        usage=("sft [recipe.yaml] [key=value …] [--flag value …] [--nproc N]",),
        options=(NPROC,),
        takes=lambda key: True,
        recipe=True,
        run=train,
    ),
    Verb(
        name="pt",
        summary="pretrain: every token is trained, all parameters are",
        description="As sft, with the loss on every token and all parameters trained, unless the settings say otherwise.",
        usage=("pt [recipe.yaml] [key=value …] [--flag value …] [--nproc N]",),
        options=(NPROC,),
        takes=lambda key: True,
        recipe=True,
        defaults=(("data.loss_on", "all"), ("tuner.type", "full")),
        run=train,
    ),
    Verb(
        name="convert",
        summary="Hugging Face to Megatron-core files, and back",
        description="Write a Hugging Face model as a Megatron-core checkpoint in a layout, such a checkpoint as a "
        "Hugging Face model, or a Hugging Face model in another dtype or file size. Every tensor is accounted for, or nothing "
        "is written.",
        usage=(
            "convert --model DIR --to mcore --output DIR [--tp 2 …] [--dry_run true]",
            "convert --mcore DIR --to hf --output DIR [--model DIR]",
            "convert --model DIR --to hf --output DIR [--torch_dtype bfloat16] [--max_shard_size 5GB]",
        ),
        options=(
            Option(name="to", value="mcore|hf", help="what to write", choices=("mcore", "hf")),
            Option(
                name="mcore",
                value="DIR",
                help="the Megatron-core checkpoint to read (with --to hf); --model then names its config and tokenizer, where "
                "swift-mega did not write it",
            ),
            Option(
                name="dry_run",
                value="true|false",
                help="only check, and show what each rank would hold and read",
                kind="switch",
            ),
            OUTPUT,
            OVERWRITE,
        ),
        takes=_parallel_and("model.path", "model.dtype", "model.dequantize", "export.max_shard_size"),
        run=convert,
    ),
    Verb(
        name="export",
        summary="merge an adapter into its model",
        description="Write the model with the adapter merged into its weights, as Hugging Face files. The model is the one "
        "that the adapter names, unless --model is given.",
        usage=("export --adapters DIR --merge_lora true [--model DIR] [--output DIR]",),
        options=(
            Option(name="output", value="DIR", help="where to write; default: the adapter's directory with -merged"),
            OVERWRITE,
        ),
        takes=_only("model.path", "model.adapters", "model.dequantize", "export.merge_lora", "export.max_shard_size"),
        run=export,
    ),
    Verb(
        name="infer",
        summary="ask the model, with or without an adapter",
        description="Greedy answers by the Hugging Face model: to one prompt, to every row of a JSONL file, or in a "
        "conversation on the terminal (clear starts anew, exit ends it).",
        usage=("infer --model DIR [--adapters DIR] [--prompt TEXT | --input FILE.jsonl --output FILE.jsonl]",),
        options=(
            Option(name="prompt", value="TEXT", help="one question"),
            Option(name="input", value="FILE", help="JSONL rows with messages or query"),
            Option(name="output", value="FILE", help="the rows with their response; default: printed"),
            Option(name="max_new_tokens", value="N", help=f"tokens of an answer at most; default {MAX_NEW_TOKENS}"),
            OVERWRITE,
        ),
        takes=_only("model.path", "model.adapters", "data.system"),
        run=infer,
    ),
    Verb(
        name="verify",
        summary="prove that layouts compute what Hugging Face does",
        description="For each layout, the largest difference of logits, loss and gradients from Hugging Face, as a table. "
        "Exits with 1 beyond the tolerance.",
        usage=(
            "verify --model DIR [--layouts tp2,pp2,tp2-pp2-sp] [--tolerance X] [--prompts FILE] "
            "[--tuner lora|full] [--adapters DIR]",
            "verify --model DIR --files true",
        ),
        options=(
            Option(name="layouts", value="NAME,…", help="layouts by name, such as tp2 or tp2-pp2-sp", kind="many"),
            Option(name="tolerance", value="X", help="largest difference that passes"),
            Option(name="prompts", value="FILE", help="texts to compare on"),
            Option(
                name="files",
                value="true|false",
                help="only check the bytes of every tensor against the directory's report.json",
                kind="switch",
            ),
            Option(
                name="tuner",
                value="lora|full",
                help="which parameters' gradients are compared",
                choices=("lora", "full"),
            ),
        ),
        takes=_only("model.path", "model.adapters", "model.dtype", "model.dequantize"),
        run=verify,
    ),
    Verb(
        name="config",
        summary="show the resolved settings and where each came from",
        description="Print every setting as YAML (again a recipe), with where its value came from.",
        usage=("config [recipe.yaml] [key=value …] [--flag value …] [--only changed]",),
        options=(
            Option(name="only", value="changed", help="leave out settings at their default", choices=("changed",)),
        ),
        takes=lambda key: True,
        recipe=True,
        run=config,
    ),
)
VERBS = {verb.name: verb for verb in _ALL}
