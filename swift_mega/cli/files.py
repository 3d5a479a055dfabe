"""Files at the edge of a verb: outputs that must not be clobbered, base models that adapters name, rows to answer."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swift_mega.config.check import check_model_directory
from swift_mega.errors import UserError
from swift_mega.text_files import read_object

# One of these is in every directory that swift-mega writes; without one, --overwrite must not delete a directory.
OURS = ("config.json", "adapter_config.json", "metadata.json", "latest_checkpointed_iteration.txt", "COMMIT")


def check_output(path: str, *, overwrite: bool, inputs: Sequence[str]) -> None:
    """Raises UserError if `path` holds something and may not be replaced, or holds one of the inputs."""
    output = Path(path).resolve()
    for source in inputs:
        if Path(source).resolve().is_relative_to(output):
            raise UserError(f"--output={path} is where {source} is read from; give another directory")
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"--output={path}: a file is there; give a directory")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise UserError(f"--output={path} exists and is not empty; give another directory, or --overwrite true")
    if not any((output / name).exists() for name in OURS):
        raise UserError(
            f"--output={path} does not look like a model or checkpoint (none of {', '.join(OURS)} is in it), "
            "so it is not replaced; empty it yourself"
        )


def model_of(adapters: str, model: str | None) -> str:
    """The base model: the one given, else the one that adapter_config.json names. Raises UserError unless it is there."""
    check_model_directory(adapters, what="--adapters", file="adapter_config.json")
    if model is None:
        config = Path(adapters) / "adapter_config.json"
        model = read_object(config, remedy="is the file whole?").get("base_model_name_or_path")
        if not isinstance(model, str) or not model:
            raise UserError(f"{config} names no base model (base_model_name_or_path); give --model DIR")
        check_model_directory(model, what=f"base_model_name_or_path in {config}, since --model is not given,")
    check_model_directory(model, what="--model")
    return model


def read_questions(path: str, *, system: str | None) -> list[tuple[dict[str, Any], list[dict[str, str]]]]:
    """JSONL rows with the messages to answer: `messages` without the replies at their end, or `query` and `history`.

    Returns (row, messages) in file order. Raises UserError with file:line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--input={path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--input={path}: not UTF-8 text (byte {error.start})") from None
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from None
        found.append((row, _messages(row, system, where=f"{path}:{number}")))
    if not found:
        raise UserError(f"--input={path}: no rows to answer")
    return found


def _messages(row: Any, system: str | None, *, where: str) -> list[dict[str, str]]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row is a JSON object, not {type(row).__name__}")
    if isinstance(messages := row.get("messages"), list):
        messages = list(messages)
    elif isinstance(row.get("query"), str):
        turns = [text for pair in row.get("history") or [] for text in pair]
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate([*turns, row["query"]])]
        if row.get("system"):
            messages.insert(0, {"role": "system", "content": row["system"]})
    else:
        raise UserError(f"{where}: neither messages (a list) nor query (text) is in the row")
    if not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
        raise UserError(f"{where}: a message is an object with role and content")
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise UserError(f"{where}: no message to answer")
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages
