"""Data rows to tokens and a loss mask.

A conversation is rendered as a whole by the tokenizer's chat template and tokenised once, because pieces that are tokenised separately
can give other tokens. A token is trained when one of its characters lies in a span that `template` found; the fast tokenizer gives
the offsets. The pad token is not used to find what is trained, because it often is the end-of-turn token.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from swift_mega.data.ends import Ends, Tokens
from swift_mega.data.formats import Row, Turn
from swift_mega.data.marks import Message
from swift_mega.data.pack import Example
from swift_mega.data.template import Span, Template
from swift_mega.data.vocabulary import TRAIN_RESIZED, check_tokens
from swift_mega.errors import UserError
from swift_mega.text_files import BOM, read_text

LossOn = Literal["assistant", "last", "all"]


def load_tokenizer(model_dir: str | Path) -> Any:
    """The fast tokenizer of a Hugging Face directory; code in a model's directory is never run.

    Raises UserError where there is no tokenizer, it does not load, or it is a slow one.
    """
    from transformers import AutoTokenizer

    path = Path(model_dir)
    if not path.is_dir():
        raise UserError(f"model directory {path} does not exist; give the path of a Hugging Face directory")
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise UserError(
            f"{path} holds no tokenizer (no tokenizer.json, tokenizer_config.json or tokenizer.model); copy it there"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
    # tokenizers raises a bare Exception for a file that it cannot parse.
    except Exception as error:
        raise UserError(
            f"the tokenizer in {path} does not load: {error}; copy the model's tokenizer files again"
        ) from error
    check_fast(tokenizer, name=str(path))
    try:
        tokenizer("a", add_special_tokens=False, return_offsets_mapping=True)
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise UserError(
            f"the tokenizer in {path} does not tokenise ({error}); a field of tokenizer_config.json may be of another type than "
            "transformers expects: copy the model's tokenizer files again"
        ) from None
    return tokenizer


def check_fast(tokenizer: Any, *, name: str) -> None:
    """UserError unless `tokenizer` can say which characters a token covers."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"the tokenizer of {name} ({type(tokenizer).__name__}) is a slow one, which cannot say which characters a token "
            "covers; save a fast one beside it (tokenizer.json)"
        )


class Encoder:
    """Data rows to examples, with one tokenizer, one template and one choice of what is trained.

    chat_template: path of a .jinja file that replaces the tokenizer's template. template: Jinja text that replaces it where chat_template
    is not given, such as an adapter's template. `loss` of a turn has priority over loss_on.
    vocab: number of embeddings in the model; a token id of `vocab` or more is an error. None: not checked.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str | None = None,
        template: str | None = None,
        loss_on: LossOn = "assistant",
        vocab: int | None = None,
    ) -> None:
        self._vocab = vocab
        check_fast(tokenizer, name=getattr(tokenizer, "name_or_path", "") or "this model")
        self._tokenizer = tokenizer
        self._loss_on = loss_on
        self._template: Template | None = None
        if chat_template is not None:
            self._template = _read_template(tokenizer, chat_template)
        elif template is not None:
            self._template = Template(tokenizer, template, name="the adapter's chat template")
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special = {index: str(token) for index, token in added.items()}
        self.ends = Ends(special={index: bool(token.special) for index, token in added.items()})

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """One example per data row, in order, not truncated. Raises a UserError that begins with the row's file:line."""
        rendered = [self._render(row) for row in rows if row.text is None]
        encoded = iter(self._tokenize([text for text, _ in rendered]) if rendered else [])
        conversations = iter(rendered)
        examples: list[Example] = []
        for row in rows:
            if row.text is not None:
                examples.append(self._document(row, row.text))
                continue
            (text, spans), (tokens, offsets) = next(conversations), next(encoded)
            begins, ends = _extents(tokens, offsets, text, self._special, where=row.where)
            trained = np.full(len(tokens), self._loss_on == "all")
            for span, inside in spans:
                # A token that begins in the prompt and ends in the reply is the first token of the reply. A token that begins in the
                # reply and ends in the next turn's header is not written by the model: "</s>", then " [" of " [INST]".
                trained[(begins < span.end) & (ends > span.start) & (ends <= span.end)] = inside
            examples.append(Example(tokens=tokens, trained=trained))
            replies = [span for span, inside in spans if inside]
            self.ends.note(Tokens(text=text, ids=tokens, begins=begins, ends=ends), replies)
        if self._vocab is not None:
            for row, example in zip(rows, examples, strict=True):
                check_tokens(example.tokens, self._vocab, self._tokenizer, where=row.where, remedy=TRAIN_RESIZED)
        return examples

    def end_of_turn(self) -> tuple[int, ...]:
        """Ids of the tokens that end a short reply in this template, even if no row was encoded; () where no token ends it."""
        turns = (Turn(role="user", content="probe"), Turn(role="assistant", content="reply"))
        try:
            probe = Encoder(self._tokenizer, template=self.template.source)
            probe.encode([Row(turns=turns, where="")])
        except UserError:
            # If the template fails for the data rows too, encoding them raises the error.
            return ()
        return probe.ends.tokens

    def _render(self, row: Row) -> tuple[str, list[tuple[Span, bool]]]:
        """The text, and its spans that differ from the default of loss_on: True where the span is trained, False where it is not."""
        row = self._renderable(row)
        replies = [index for index, turn in enumerate(row.turns) if turn.role == "assistant"]
        base = {"assistant": set(replies), "last": set(replies[-1:]), "all": set(replies)}[self._loss_on]
        wanted = {i for i in replies if row.turns[i].loss is True or (row.turns[i].loss is None and i in base)}
        # With loss_on=all, only the replies that are not trained have to be located.
        located = base - wanted if self._loss_on == "all" else wanted
        messages: list[Message] = [{"role": turn.role, "content": turn.content} for turn in row.turns]
        try:
            text, spans = self.template.spans(messages, located)
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from error
        return text, [(span, self._loss_on != "all") for span in spans]

    def _renderable(self, row: Row) -> Row:
        """The row without its empty system turn where the template has no system role: such a turn adds no text."""
        first = row.turns[0]
        if first.role == "system" and not first.content.strip() and self.template.refuses_system:
            return replace(row, turns=row.turns[1:])
        return row

    @property
    def modes(self) -> Counter[str]:
        """Number of replies that follow a generation prompt other than the default, by the template's setting that gives this prompt."""
        return self._template.modes if self._template is not None else Counter()

    @property
    def new_template(self) -> str | None:
        """The Jinja text in use, where the tokenizer's files have another; None where no template was used."""
        held = self._tokenizer.chat_template
        held = held.get("default") if isinstance(held, dict) else held
        return None if self._template is None or self._template.source == held else self._template.source

    @property
    def template(self) -> Template:
        """The chat template in use; UserError where the tokenizer has none and none was given."""
        if self._template is None:
            self._template = _own_template(self._tokenizer)
        return self._template

    def _tokenize(self, texts: list[str]) -> list[tuple[NDArray[np.int32], NDArray[np.int64]]]:
        # The template has written all special tokens, also the first one. Adding special tokens here would write it twice.
        out = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            truncation=False,
            padding=False,
            verbose=False,
        )
        return [
            (np.array(tokens, dtype=np.int32), np.array(offsets, dtype=np.int64).reshape(-1, 2))
            for tokens, offsets in zip(out["input_ids"], out["offset_mapping"], strict=True)
        ]

    def _document(self, row: Row, text: str) -> Example:
        """Plain text with the special tokens that the tokenizer adds, then the end-of-text token; every token is trained."""
        eos = self._tokenizer.eos_token_id
        if eos is None:
            raise UserError(
                f"{row.where}: the tokenizer has no end-of-text token (eos_token) to end a document with; set eos_token in "
                "its tokenizer_config.json"
            )
        tokens = self._tokenizer(text, truncation=False, padding=False, verbose=False)["input_ids"]
        if not tokens or tokens[-1] != eos:
            tokens = [*tokens, eos]
        return Example(tokens=np.array(tokens, dtype=np.int32), trained=np.ones(len(tokens), dtype=bool))


def _own_template(tokenizer: Any) -> Template:
    name = "the tokenizer's chat template"
    source = tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    if not source:
        raise UserError(
            "the tokenizer has no chat template, so a conversation cannot be rendered; give a .jinja file (--chat_template FILE, "
            'data.chat_template), or train on plain {"text": …} rows'
        )
    return Template(tokenizer, source.removeprefix(BOM), name=name)


def _read_template(tokenizer: Any, path: str) -> Template:
    source = read_text(path, what=f"data.chat_template={path!r}")
    if not source.strip():
        raise UserError(f"data.chat_template={path!r} is empty; write the Jinja text of a chat template into it")
    return Template(tokenizer, source, name=f"the chat template {path}")


def _extents(
    tokens: NDArray[np.int32], offsets: NDArray[np.int64], text: str, special: dict[int, str], *, where: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and past-the-last character of each token, [tokens] each; together the tokens cover all of `text`.

    Offsets of byte-level tokenizers leave out the space before a word. A character that is split into several tokens has the same
    offsets in each of them. So a token is made to begin no later than the end of the token before it. Some tokenizers give
    wrong offsets (huggingface/tokenizers#1553), so the result is checked.
    """
    ends = np.maximum.accumulate(offsets[:, 1]) if len(offsets) else offsets[:, 1]
    before = np.concatenate(([0], ends[:-1])) if len(ends) else ends
    begins = np.minimum(offsets[:, 0], before)
    covered = int(ends[-1]) if len(ends) else 0
    wrong = bool((offsets[:, 1] < before).any()) or bool(text[covered:].strip())
    for at in np.flatnonzero(np.isin(tokens, list(special))):
        wrong = wrong or text[offsets[at, 0] : offsets[at, 1]].strip() != special[int(tokens[at])].strip()
    if wrong:
        raise UserError(
            f"{where}: the tokenizer's offsets do not follow the text, so trained tokens cannot be told from others; update "
            "the tokenizers package, or save the tokenizer again with it"
        )
    return begins, ends
