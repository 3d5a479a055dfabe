"""Token ids and the embedding: every id needs a row of the embedding, and the row of the padding token is trained differently."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swift_mega.data.pack import Example
from swift_mega.errors import UserError

RESIZE = "give the tokenizer of this model, or the model rows for its tokens: "
TRAIN_RESIZED = RESIZE + "--resize_vocab true with --tuner_type full"
CONVERT_RESIZED = RESIZE + "swift-mega convert --to hf --model DIR --resize_vocab true --output NEW"


def check_tokens(
    tokens: Sequence[int] | NDArray[np.int32], vocab: int, tokenizer: Any, *, where: str, remedy: str = CONVERT_RESIZED
) -> None:
    """UserError where a token id is `vocab` or more: the embedding has no row for it. where: begin of the message, names the text."""
    if not len(tokens) or (largest := int(max(tokens) if isinstance(tokens, list) else np.max(tokens))) < vocab:
        return
    text = tokenizer.convert_ids_to_tokens(largest)
    raise UserError(
        f"{where}: token {largest} ({text!r}) has no row in the model's embedding, which ends at {vocab - 1} (vocab_size={vocab}); "
        f"{remedy}"
    )


def pad_row_note(examples: Sequence[Example], row: int | None, tokenizer: Any, *, tied: bool) -> str | None:
    """A line about examples that contain the padding token; None where no example does.

    row: id of the padding token, whose embedding gets another gradient than the others; None where there is no such token.
    """
    if row is None:
        return None
    count = sum(bool((example.tokens == row).any()) for example in examples)
    if not count:
        return None
    part = "from the output layer alone" if tied else "no gradient"
    return (
        f"padding token       {count:,} of {len(examples):,} examples hold {tokenizer.convert_ids_to_tokens(row)!r}, pad_token_id={row} of "
        f"config.json: its row of the embedding gets {part}, as in transformers"
    )
