"""Private-use characters around what a row says, which show where a template put it, and that all of it arrived.

Each content is marked inside its outer white space, so that `| trim` acts as before. `{% generation %}` tags are rendered as such
characters too, which stays right inside macros and `{% set %}` blocks, where counting characters does not.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]

OPEN, CLOSE = "\U00100000", "\U00100001"
_CONTENT = 0x100010
"""Turn i is marked by the characters _CONTENT + 2i and _CONTENT + 2i + 1."""
MARKS = re.compile("[\U00100000-\U0010fffd]")
GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
MAX_TURNS = 20_000


@dataclass(frozen=True, kw_only=True)
class Marked:
    """The render with marks taken out, and the position of each mark in what is left."""

    text: str
    marks: list[tuple[str, int]]

    def positions(self, mark: str) -> list[int]:
        """Wherever `mark` stood."""
        return [at for char, at in self.marks if char == mark]

    def position(self, mark: str) -> int | None:
        """Where `mark` stood, or None where it is absent or occurs twice."""
        found = self.positions(mark)
        return found[0] if len(found) == 1 else None


def has_generation_marks(source: str) -> bool:
    """Whether a template says itself what is trained."""
    return GENERATION.search(_COMMENT.sub("", source)) is not None


def with_generation_marks(source: str) -> str:
    """The template with a mark in place of each tag."""
    return GENERATION.sub(_emit_mark, source)


def _emit_mark(tag: re.Match[str]) -> str:
    # A statement on both sides keeps trim_blocks, lstrip_blocks and the tag's own dashes acting as on the tag itself.
    mark = CLOSE if tag[2] else OPEN
    return f"{{%{tag[1]} if true %}}{{{{ '{mark}' }}}}{{% endif {tag[3]}%}}"


def mark_of(turn: int, *, last: bool = False) -> str:
    """The character before, or behind, the content of a turn."""
    return chr(_CONTENT + 2 * turn + last)


def turn_of(mark: str) -> int:
    """Whose content a mark is of."""
    return (ord(mark) - _CONTENT) // 2


def mark_contents(messages: Sequence[Message], roles: Collection[str]) -> list[Message]:
    """The conversation with the contents of these roles marked."""
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
    """What was rendered, and where the marks stood in it."""
    marks = [(found[0], found.start() - before) for before, found in enumerate(MARKS.finditer(text))]
    return Marked(text=MARKS.sub("", text), marks=marks)


def squeeze(text: str) -> str:
    """Without white space: templates may set their own between words."""
    return "".join(text.split())


def short(text: str) -> str:
    """For messages."""
    return repr(text if len(text) <= 60 else f"{text[:40]} … {text[-15:]}")


def shared(before: str, after: str) -> int:
    """Length of the common beginning."""
    length = min(len(before), len(after))
    return next((at for at in range(length) if before[at] != after[at]), length)


def difference(before: str, after: str) -> str:
    """Where two texts part, for messages."""
    at = shared(before, after)
    return f"{before[max(0, at - 15) : at + 25]!r} became {after[max(0, at - 15) : at + 25]!r}"


def as_parts(content: str) -> list[dict[str, Any]]:
    """A content as templates of multimodal models want it."""
    return [{"type": "text", "text": content}]
