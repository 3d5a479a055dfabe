"""--resize_vocab and --new_special_tokens: adds tokens to the tokenizer, and embedding rows to the model for all tokens."""

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swift_mega.api.ready import DEVICE  # noqa: F401 - before Megatron
from swift_mega.config import schema
from swift_mega.convert.check import carried_of
from swift_mega.convert.files.hf_files import some
from swift_mega.convert.files.hf_write import copy_companions
from swift_mega.convert.files.resized import write_resized
from swift_mega.convert.source import Source
from swift_mega.data.chat import load_tokenizer
from swift_mega.errors import UserError
from swift_mega.models.quantization import quantization_of

CONVERT = (
    "create the model first with swift-mega convert --to hf --resize_vocab true --output NEW, and give --model NEW"
)


def asks(model: schema.Model) -> bool:
    """Whether the settings ask for new tokens or for a resized embedding."""
    return model.resize_vocab or bool(model.new_special_tokens)


@contextmanager
def resized(run: schema.Run, *, training: bool = False) -> Iterator[schema.Run]:
    """`run` with the resized model, which is deleted at the end of the context; UserError where the settings would change nothing.

    training: the run trains the model. Then an adapter is an error, because it would neither train nor store the new rows.
    """
    if not asks(run.model):
        yield run
        return
    assert run.model.path is not None
    if training and run.tuner.makes_adapter:
        raise UserError(
            f"model.resize_vocab and model.new_special_tokens add rows that an adapter does not have "
            f"(tuner.type={run.tuner.type}), so its base would not have them; {CONVERT}, or set tuner.type=full"
        )
    if quantization_of(run.model.path) is not None:
        raise UserError(
            f"{run.model.path} is quantised, and rows are added to plain weights only; dequantise it first with swift-mega convert --to hf "
            "--dequantize true"
        )
    with tempfile.TemporaryDirectory(prefix="swift-mega-resized-") as folder:
        _make(run.model, Path(folder), training=training)
        plain = dataclasses.replace(run.model, path=folder, resize_vocab=False, new_special_tokens=())
        yield dataclasses.replace(run, model=plain)


def _make(model: schema.Model, view: Path, *, training: bool) -> None:
    assert model.path is not None
    source = Source(model.path)
    stored, settings = source.tensors, source.settings
    if training and (kept := carried_of(settings, stored.entries)):
        raise UserError(
            f"{model.path} holds {some(sorted(kept), 2)}, which are kept and not trained, and need the new rows too; {CONVERT}"
        )
    copy_companions(Path(model.path), view)
    tokenizer = load_tokenizer(model.path)
    if model.new_special_tokens:
        _add(tokenizer, tokens_of(model.new_special_tokens), view)
    needed = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
    if needed <= settings.shape.vocab and not model.new_special_tokens:
        raise UserError(
            f"model.resize_vocab=true, but the tokenizer's {needed} tokens have rows in {model.path} (vocab_size={settings.shape.vocab}); "
            "set it to false"
        )
    write_resized(view, stored, source.family, settings, needed, kind=model.new_rows)


def tokens_of(words: Sequence[str]) -> list[str]:
    """The given tokens, and those in .txt files that are named, separated by white space."""
    found: list[str] = []
    for word in words:
        if not word.endswith(".txt"):
            found.append(word)
            continue
        try:
            found += Path(word).read_text(encoding="utf-8-sig").split()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"model.new_special_tokens={word} cannot be read: {error}; give a text file of tokens"
            ) from None
    if not found:
        raise UserError(f"model.new_special_tokens={','.join(words)} names no token; write tokens into the file")
    return list(dict.fromkeys(found))


def _add(tokenizer: Any, tokens: list[str], view: Path) -> None:
    """Adds special tokens and writes the tokenizer to `view`; UserError where no token is new, or a reload gives another tokenizer."""
    known = tokenizer.get_vocab()
    if all(token in known for token in tokens):
        raise UserError(f"model.new_special_tokens: the tokenizer has {some(tokens)} already; remove them")
    tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.save_pretrained(view)
    again = load_tokenizer(view)
    broken = [
        token
        for token in tokens
        if again(token, add_special_tokens=False)["input_ids"] != [again.get_vocab().get(token)]
    ]
    if broken or again.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"the tokenizer with {some(tokens)} changes when it is saved and read again ({some(broken) or 'other ids'}); save it with "
            "these tokens by transformers, and give that model"
        )
