"""Prompts for comparing models, as lists of tokens: from a text file (one prompt a line), or from a data set read as for training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swift_mega.config.schema import Data
from swift_mega.data.chat import Encoder
from swift_mega.data.formats import Row
from swift_mega.data.sources import load_questions
from swift_mega.errors import UserError
from swift_mega.text_files import lines, read_text

DATA_SETS = (".jsonl", ".json")


def prompt_rows(path: str, tokenizer: Any) -> list[tuple[str, list[int]]]:
    """(name for messages, tokens) of each prompt in a file.

    A conversation is rendered by the tokenizer's chat template. Where it does not end with a reply, the generation prompt is added.
    Raises UserError where the file cannot be read in this way.
    """
    if Path(path).suffix not in DATA_SETS:
        found = [line for line in lines(read_text(path, what=f"--prompts={path}")) if line.strip()]
        return line_rows(found, tokenizer)
    rows = [row for _, row in load_questions(path, Data(), reply="optional")]
    encoder = Encoder(tokenizer, loss_on="all")
    if not tokenizer.chat_template and (talk := next((row for row in rows if row.text is None), None)):
        raise UserError(
            f"{talk.where}: a conversation, and the tokenizer has no chat template; give a text file with one prompt a line, or "
            '{"text": …} rows'
        )
    return [(row.where, _tokens(row, encoder, tokenizer)) for row in rows]


def line_rows(texts: Sequence[str], tokenizer: Any) -> list[tuple[str, list[int]]]:
    """(name for messages, tokens) of each text; texts are tokenised as plain text."""
    return [(f"the prompt {text[:40]!r}", list(tokenizer(text)["input_ids"])) for text in texts]


def _tokens(row: Row, encoder: Encoder, tokenizer: Any) -> list[int]:
    if row.text is None and row.turns[-1].role == "user":
        try:
            text = encoder.template.prompt([{"role": turn.role, "content": turn.content} for turn in row.turns])
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from error
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    (example,) = encoder.encode([row])
    return example.tokens.tolist()
