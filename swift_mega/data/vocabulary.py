"""Tokens against the embedding: every id needs a row, and the padding token's row is not trained like others."""

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
    """UserError where a token has no row in an embedding of `vocab` rows. where: what has the tokens, as a message begins."""
    if not len(tokens) or (largest := int(max(tokens) if isinstance(tokens, list) else np.max(tokens))) < vocab:
        return
    text = tokenizer.convert_ids_to_tokens(largest)
    raise UserError(
        f"{where}: token {largest} ({text!r}) has no row in the model's embedding, which ends at {vocab - 1} (vocab_size={vocab}); "
        f"{remedy}"
    )


def pad_row_note(examples: Sequence[Example], row: int | None, tokenizer: Any, *, tied: bool) -> str | None:
    """What a run says of examples that hold the padding token, whose row (None: none) is trained otherwise; None where none does."""
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
