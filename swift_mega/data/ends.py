"""Which token ends a reply, counted over the data rows: generation has to stop at this token.

After the words of a reply, a template writes the end of the turn: special tokens and white space, up to the next header. The model
learns to write the first special token of this end when its reply is complete. Phi 3's last reply ends with <|end|> and the end-of-text
token; stopping at the first is enough. A template that ends its turns with ordinary text has no such token. Each token of such an
end may also occur inside a reply, so no token is chosen.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from swift_mega.data.template import Span


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """One rendered conversation, tokenised. begins, ends: first and past-the-last character of each token, [tokens]."""

    text: str
    ids: NDArray[np.int32]
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]


@dataclass(kw_only=True)
class Ends:
    """Counts of the tokens that end replies.

    special: id of each added token of the tokenizer -> whether it is a special token.
    trained: token id -> number of replies that end with it, where this token has a loss. untrained: the same, where it has none.
    without: number of replies that end with ordinary text.
    """

    special: Mapping[int, bool]
    trained: Counter[int] = field(default_factory=Counter)
    untrained: Counter[int] = field(default_factory=Counter)
    without: int = 0

    @property
    def tokens(self) -> tuple[int, ...]:
        """Ids of the tokens that end replies, the most frequent first."""
        return tuple(token for token, _ in (self.trained + self.untrained).most_common())

    def note(self, row: Tokens, spans: Sequence[Span]) -> None:
        """Counts the replies in `spans`, the trained spans of one conversation."""
        last = {span.turn: span for span in spans}
        for turn, span in last.items():
            # The template split the reply, so its end is not known.
            if span.content_end is None:
                continue
            if (found := self._first(row, span.content_end, span.end)) is not None:
                self.trained[found] += 1
            elif turn == max(last) and (found := self._first(row, span.end, len(row.text))) is not None:
                self.untrained[found] += 1
            else:
                self.without += 1

    def _first(self, row: Tokens, start: int, end: int) -> int | None:
        """The first special token at the end of characters [start, end), where only special tokens and white space follow it."""
        run: list[int] = []
        first = int(np.searchsorted(row.ends, start, side="right"))
        for at in range(int(np.searchsorted(row.ends, end, side="right")) - 1, first - 1, -1):
            token = int(row.ids[at])
            if token in self.special:
                run.append(token)
            elif row.text[row.begins[at] : row.ends[at]].strip():
                break
        return next((token for token in reversed(run) if self.special[token]), run[-1] if run else None)
