"""Marks: private-use characters around each message's content, which show where a template put it and that all of it was rendered.

The marks stand inside the outer white space of a content, so that `| trim` acts as before. `{% generation %}` tags are rendered as
marks too. This is also correct inside macros and `{% set %}` blocks, where counting rendered characters is not.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]

OPEN, CLOSE = "\U00100000", "\U00100001"
_CONTENT = 0x100010
"""The marks before and after turn i are the characters _CONTENT + 2i and _CONTENT + 2i + 1."""
MARKS = re.compile("[\U00100000-\U0010fffd]")
GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
MAX_TURNS = 20_000


@dataclass(frozen=True, kw_only=True)
class Marked:
    """The rendered text without marks, and the position of each mark in it."""

    text: str
    marks: list[tuple[str, int]]

    def positions(self, mark: str) -> list[int]:
        """All positions of `mark`."""
        return [at for char, at in self.marks if char == mark]

    def position(self, mark: str) -> int | None:
        """The position of `mark`; None where it is absent or occurs more than once."""
        found = self.positions(mark)
        return found[0] if len(found) == 1 else None


def has_generation_marks(source: str) -> bool:
    """Whether a template has {% generation %} tags, which say what is trained."""
    return GENERATION.search(_COMMENT.sub("", source)) is not None


def with_generation_marks(source: str) -> str:
    """The template with a mark in place of each tag."""
    return GENERATION.sub(_emit_mark, source)


def _emit_mark(tag: re.Match[str]) -> str:
    # With a statement on both sides, trim_blocks, lstrip_blocks and the dashes of the tag act as they do on the tag itself.
    mark = CLOSE if tag[2] else OPEN
    return f"{{%{tag[1]} if true %}}{{{{ '{mark}' }}}}{{% endif {tag[3]}%}}"


def mark_of(turn: int, *, last: bool = False) -> str:
    """The mark before the content of a turn; with `last`, the mark after it."""
    return chr(_CONTENT + 2 * turn + last)


def turn_of(mark: str) -> int:
    """The turn (0-based) that a mark belongs to."""
    return (ord(mark) - _CONTENT) // 2


def mark_contents(messages: Sequence[Message], roles: Collection[str]) -> list[Message]:
    """The conversation with marks around the contents of these roles."""
    marked = []
    for turn, message in enumerate(messages):
        content = message["content"]
        core = content.strip()
        if message["role"] in roles and core:
            head = content[: content.index(core)]
            tail = content[len(head) + len(core) :]
            content = f"{head}{mark_of(turn)}{core}{mark_of(turn, last=True)}{tail}"
        marked.append({**message, "content": content})
    return marked


def take_marks(text: str) -> Marked:
    """The rendered text without its marks, and their positions."""
    marks = [(found[0], found.start() - before) for before, found in enumerate(MARKS.finditer(text))]
    return Marked(text=MARKS.sub("", text), marks=marks)


def squeeze(text: str) -> str:
    """The text without white space, because templates may change white space between words."""
    return "".join(text.split())


def short(text: str) -> str:
    """The text shortened and quoted, for messages."""
    return repr(text if len(text) <= 60 else f"{text[:40]} … {text[-15:]}")


def shared(before: str, after: str) -> int:
    """Length of the common prefix."""
    length = min(len(before), len(after))
    return next((at for at in range(length) if before[at] != after[at]), length)


def difference(before: str, after: str) -> str:
    """The first difference of two texts, for messages."""
    at = shared(before, after)
    return f"{before[max(0, at - 15) : at + 25]!r} became {after[max(0, at - 15) : at + 25]!r}"


def as_parts(content: str) -> list[dict[str, Any]]:
    """A content in the form that templates of multimodal models expect."""
    return [{"type": "text", "text": content}]
