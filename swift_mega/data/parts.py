"""Checks that a chat template loses no text: every system, user and assistant text must be found in the rendered conversation.

Marks around each text show where the template put it. A template may change white space inside and around a text and write it as a
JSON string. It may leave out the reasoning of earlier replies, as it does at inference; the answer after the reasoning must stay.
User and assistant texts must stay in order; a system text may be anywhere. Any other missing or changed text is an error for the row.
"""

import json
import re
from collections.abc import Collection, Iterator, Sequence

from swift_mega.data.marks import Marked, Message, mark_of, short, squeeze
from swift_mega.errors import UserError

_END_OF_REASONING = re.compile(r"</[\w:-]+>|\[/[A-Z_]+\]|<\|[^|<>]*\|>")
_REMEDY = "change the row, or give another template as data.chat_template"
_SYSTEM_REMEDY = (
    "the model would never see it: put it into the first user turn, remove the system text (--system), or give a template that "
    "renders it as data.chat_template"
)
_TAKEN = "\0"


def check_parts(
    name: str, messages: Sequence[Message], text: str, marked: Marked | None, trained: Collection[int]
) -> None:
    """UserError where a text of `messages` is missing in the rendered `text`.

    marked: the conversation rendered with marks around all texts; None where marks change the rendered text, so the texts are searched.
    trained: turns that need no check here, because their spans are located and checked later.
    """
    missing = _not_marked(name, messages, marked, trained) if marked else _not_found(messages, text, trained)
    for turn in missing:
        role, core = messages[turn]["role"], messages[turn]["content"].strip()
        raise UserError(
            f"{name} does not render the {role} text of turn {turn + 1} whole ({short(core)} is not in {short(text)}): "
            f"{_SYSTEM_REMEDY if role == 'system' else _REMEDY}"
        )


def _not_marked(name: str, messages: Sequence[Message], marked: Marked, trained: Collection[int]) -> Iterator[int]:
    """Turns whose text is not between its marks."""
    cursor = 0
    for turn, message in enumerate(messages):
        core = message["content"].strip()
        if not core or turn in trained:
            continue
        places = sorted(_places(core, turn, message["role"], marked))
        if not places and message["role"] == "assistant" and _is_reasoning(core):
            continue
        if not places:
            yield turn
        elif message["role"] != "system":
            if places[-1] < cursor:
                raise UserError(f"{name} renders turn {turn + 1} ({short(core)}) before an earlier one: {_REMEDY}")
            cursor = next(place for place in places if place >= cursor)


def _places(core: str, turn: int, role: str, marked: Marked) -> Iterator[int]:
    """Where the content of a turn begins in the rendered text."""
    forms = _forms(core)
    firsts, lasts = marked.positions(mark_of(turn)), marked.positions(mark_of(turn, last=True))
    for first in firsts:
        for last in lasts:
            found = marked.text[first:last]
            if found in forms or (found and squeeze(found) == squeeze(core)):
                yield first
    for last in lasts:
        yield from (last - len(answer) for answer in _answers(core, role) if marked.text[:last].endswith(answer))


def _not_found(messages: Sequence[Message], text: str, trained: Collection[int]) -> Iterator[int]:
    """Turns whose text is not found. The longest texts are searched first, and no two texts may be found at the same place."""
    rest = text
    for turn in sorted(range(len(messages)), key=lambda turn: (-len(messages[turn]["content"]), turn)):
        core = messages[turn]["content"].strip()
        forms = [*_forms(core), *_answers(core, messages[turn]["role"])]
        found = next((form for form in forms if form in rest), None) if core else None
        if found is not None:
            rest = rest.replace(found, _TAKEN * len(found), 1)
        elif core and turn not in trained and squeeze(core) not in squeeze(rest):
            reasoning = messages[turn]["role"] == "assistant" and _is_reasoning(core)
            yield from () if reasoning else (turn,)


def _forms(core: str) -> list[str]:
    return [core, json.dumps(core, ensure_ascii=False)[1:-1], json.dumps(core)[1:-1]]


def _is_reasoning(core: str) -> bool:
    """Whether the reply ends with its reasoning: there is no answer after it."""
    return any(end.end() == len(core) for end in _END_OF_REASONING.finditer(core))


def _answers(core: str, role: str) -> list[str]:
    """Possible answers of an earlier reply: the text after each end of reasoning. A template may render this text only."""
    behind = [core[end.end() :].strip() for end in _END_OF_REASONING.finditer(core)] if role == "assistant" else []
    return [answer for answer in behind if answer]
