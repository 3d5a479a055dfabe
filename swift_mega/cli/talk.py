"""The verb `infer`: answers one question, a file of questions, or a conversation on the terminal."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_mega.cli.arguments import Arguments
from swift_mega.cli.files import check_answers, model_of
from swift_mega.config.check import check_model_directory
from swift_mega.config.schema import Data
from swift_mega.errors import UserError
from swift_mega.launch.torchrun import refuse_joined

if TYPE_CHECKING:
    from swift_mega.data.prompts import Prompt

MAX_NEW_TOKENS = 256
OF_ROWS = ("columns", "dataset_info", "model_name", "model_author")
END_OF_CHAT = ("exit", "quit")


def infer(arguments: Arguments) -> int:
    refuse_joined("infer")
    run = arguments.resolved().run
    prompt, source, output = (arguments.text(name) for name in ("prompt", "input", "output"))
    if prompt is not None and source is not None:
        raise UserError("infer: --prompt and --input both give the questions; remove one")
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
    if prompt is not None and not prompt.strip():
        raise UserError("infer: --prompt is empty; write a question")
    _refuse_of_rows(run.data, asked=source is not None)
    questions = _read(source, run.data) if source is not None else []
    if output is not None:
        check_answers(output, overwrite=arguments.switch("overwrite"), source=source or "")
    from swift_mega import api

    options: dict[str, Any] = {"dequantize": True} if run.model.dequantize else {}
    answerer = api.infer(model=model, adapters=adapters, chat_template=run.data.chat_template, **options)

    def answer(messages: list[dict[str, str]]) -> str:
        return answerer.answer(messages, max_new_tokens=tokens)

    for question in questions:
        try:
            # Checks every question before the weights are read.
            answerer.tokens(question.messages)
        except UserError as error:
            raise UserError(f"{question.where}: {error}") from error
    opening = [{"role": "system", "content": run.data.system}] if run.data.system is not None else []
    if prompt is not None:
        print(answer([*opening, {"role": "user", "content": prompt}]))
    elif questions:
        _answer_rows(questions, output, answer)
    else:
        _chat(opening, answer)
    return 0


def _refuse_of_rows(data: Data, *, asked: bool) -> None:
    """UserError where settings for reading data rows are set but no file of questions is given: they would have no effect."""
    for name in OF_ROWS:
        if not asked and getattr(data, name) != getattr(Data(), name):
            raise UserError(
                f"infer: --{name} says how rows are read, and there is no file of rows; give --input FILE.jsonl, or remove it"
            )


def _read(source: str, data: Data) -> "list[Prompt]":
    # This imports numpy, so it is imported only here: errors in a command are reported without it.
    from swift_mega.data.prompts import read_questions

    return read_questions(source, data)


def _answer_rows(questions: "list[Prompt]", output: str | None, answer: Callable[[list[dict[str, str]]], str]) -> None:
    """Answers the rows one at a time, so the unfinished output file shows the progress."""
    if output is None:
        for question in questions:
            print(json.dumps(question.record | {"response": answer(question.messages)}, ensure_ascii=False), flush=True)
        return
    scratch = Path(output + ".part")
    with scratch.open("w", encoding="utf-8") as file:
        for question in questions:
            line = json.dumps(question.record | {"response": answer(question.messages)}, ensure_ascii=False)
            print(line, file=file, flush=True)
    scratch.rename(output)


def _chat(opening: list[dict[str, str]], answer: Callable[[list[dict[str, str]]], str]) -> None:
    """A conversation on the terminal; `clear` starts a new one, `exit` or end of file ends it."""
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
