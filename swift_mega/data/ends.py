"""Which token ends a reply, counted over the rows: what generation has to stop at.

Behind a reply's own words, a template writes the end of the turn: special tokens and white space, up to the next header. The first
special token of that end is what the model learns to write when it is done (phi 3's last reply ends with <|end|> and the end of
text; a stop at the first of them is a stop at both). A template that ends its turns with ordinary text has no such token: any token
of such an end may occur inside a reply, so none is taken.
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
    """special: ids of the tokenizer's added tokens, and whether each is a special one.

    trained, untrained: token id -> replies that end with it, and it has loss, or not. without: replies that end with ordinary text.
    """

    special: Mapping[int, bool]
    trained: Counter[int] = field(default_factory=Counter)
    untrained: Counter[int] = field(default_factory=Counter)
    without: int = 0

    @property
    def tokens(self) -> tuple[int, ...]:
        """The most frequent first."""
        return tuple(token for token, _ in (self.trained + self.untrained).most_common())

    def note(self, row: Tokens, spans: Sequence[Span]) -> None:
        """Counts the replies of `spans`, the trained ones of a row."""
        last = {span.turn: span for span in spans}
        for turn, span in last.items():
            if span.content_end is None:  # the template took the reply apart, so that its end is not known
                continue
            if (found := self._first(row, span.content_end, span.end)) is not None:
                self.trained[found] += 1
            elif turn == max(last) and (found := self._first(row, span.end, len(row.text))) is not None:
                self.untrained[found] += 1
            else:
                self.without += 1

    def _first(self, row: Tokens, start: int, end: int) -> int | None:
        """The first special token of the run of special tokens and white space that ends characters [start, end)."""
        run: list[int] = []
        first = int(np.searchsorted(row.ends, start, side="right"))
        for at in range(int(np.searchsorted(row.ends, end, side="right")) - 1, first - 1, -1):
            token = int(row.ids[at])
            if token in self.special:
                run.append(token)
            elif row.text[row.begins[at] : row.ends[at]].strip():
                break
        return next((token for token in reversed(run) if self.special[token]), run[-1] if run else None)
