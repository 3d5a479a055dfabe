"""The one reader of prompts, which models are asked or compared on: data sets read as for training, or text files with one prompt a line.

Errors in a file are reported without the import of torch, which takes seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift_mega.config.schema import Data
from swift_mega.data.formats import Reply, Row
from swift_mega.data.sources import load_questions
from swift_mega.errors import UserError
from swift_mega.text_files import lines, read_text

DATA_SETS = (".jsonl", ".json")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A data row that a model is asked. record: the object in the file."""

    record: dict[str, Any]
    row: Row

    @property
    def where(self) -> str:
        """file:line, for messages."""
        return self.row.where

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as chat templates take it."""
        return [{"role": turn.role, "content": turn.content} for turn in self.row.turns]

    @property
    def asks(self) -> bool:
        """Whether it is a conversation that does not end with a reply."""
        return self.row.text is None and self.row.turns[-1].role == "user"


def read_prompts(path: str, data: Data, *, reply: Reply) -> list[Prompt]:
    """The rows of a data set, read as for training. reply: whether the last reply of a row is required, optional or dropped.

    data: the default system message, columns, and values of placeholders. Raises UserError with file:line.
    """
    return [Prompt(record=record, row=row) for record, row in load_questions(path, data, reply=reply)]


def read_questions(path: str, data: Data) -> list[Prompt]:
    """Prompts to answer: `messages` without the replies at the end, or `query` and `history`. UserError for a document."""
    found = read_prompts(path, data, reply="dropped")
    if document := next((prompt for prompt in found if prompt.row.text is not None), None):
        raise UserError(f"{document.where}: a row of plain text has no question; write messages, or query")
    return found


def prompt_rows(path: str, tokenizer: Any) -> list[tuple[str, list[int]]]:
    """(name for messages, tokens) of each prompt in a file.

    A conversation is rendered by the tokenizer's chat template. Where it does not end with a reply, the generation prompt is added.
    Raises UserError where the file cannot be read in this way.
    """
    from swift_mega.data.chat import Encoder

    if Path(path).suffix not in DATA_SETS:
        found = [line for line in lines(read_text(path, what=f"--prompts={path}")) if line.strip()]
        return line_rows(found, tokenizer)
    prompts = read_prompts(path, Data(), reply="optional")
    encoder = Encoder(tokenizer, loss_on="all")
    if not tokenizer.chat_template and (talk := next((prompt for prompt in prompts if prompt.row.text is None), None)):
        raise UserError(
            f"{talk.where}: a conversation, and the tokenizer has no chat template; give a text file with one prompt a line, or "
            '{"text": …} rows'
        )
    return [(prompt.where, _tokens(prompt, encoder, tokenizer)) for prompt in prompts]


def line_rows(texts: Sequence[str], tokenizer: Any) -> list[tuple[str, list[int]]]:
    """(name for messages, tokens) of each text; texts are tokenised as plain text."""
    return [(f"the prompt {text[:40]!r}", list(tokenizer(text)["input_ids"])) for text in texts]


def _tokens(prompt: Prompt, encoder: Any, tokenizer: Any) -> list[int]:
    """encoder: data.chat.Encoder."""
    if prompt.asks:
        try:
            text = encoder.template.prompt(prompt.messages)
        except UserError as error:
            raise UserError(f"{prompt.where}: {error}") from error
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    (example,) = encoder.encode([prompt.row])
    return example.tokens.tolist()  # type: ignore[no-any-return]
