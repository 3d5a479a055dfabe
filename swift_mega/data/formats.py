"""One row of a file, in any of SWIFT's formats, as a `Row`: the turns of a conversation, or plain text.

The columns decide the format; they are tried in the order messages, conversations, instruction, query, text. Columns that the format
does not use are counted as ignored. A column that would change training but is not supported (images, tools, rejected_response, …)
stops the run, unless its objective reads that column (`fields`).
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from swift_mega.errors import UserError

QUERY = ("query", "prompt", "question")
RESPONSE = ("response", "output", "answer", "completion")
CONVERSATIONS = ("conversations", "conversation")
COLUMNS = ("messages", *CONVERSATIONS, "instruction", "input", *QUERY, *RESPONSE, "history", "system", "text")
"""Every column that is read; `data.columns` maps onto these."""

_UNSUPPORTED = {
    **dict.fromkeys(("images", "image", "videos", "video", "audios", "audio", "objects"), "multimodal data"),
    "tools": "tool use",
    "functions": "tool use",
    **dict.fromkeys(
        ("rejected_response", "rejected_messages", "chosen", "rejected", "label", "margin"), "preference data"
    ),
    **dict.fromkeys(("positive", "negative", "positive_messages", "negative_messages"), "embedding data"),
    "channel": "a loss per channel",
    "loss_scale": "a weight per token",
    "chat_template_kwargs": "template settings per row",
}
_UNSUPPORTED_IN_TURN = {
    "tool_calls": "tool use",
    "tool_call_id": "tool use",
    "function_call": "tool use",
    "loss_scale": "a weight per turn",
    "weight": "a weight per turn (write loss: true or false)",
    "reasoning_content": "a separate reasoning text (write <think>…</think> into content)",
    "reasoning": "a separate reasoning text (write <think>…</think> into content)",
    "thinking": "a separate reasoning text (write <think>…</think> into content)",
    "images": "multimodal data",
    "name": "names of speakers",
}
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_ROLES |= dict.fromkeys(("bot", "chatgpt", "model"), "assistant")
_KINDS = {int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object", bool: "a boolean"}
_KINDS |= {type(None): "null"}
_TOOL_ROLES = ("tool", "tool_call", "tool_response", "function", "function_call", "observation")


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One message. loss: True or False has priority over data.loss_on; None: data.loss_on decides."""

    role: str
    content: str
    loss: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A conversation (system?, user, assistant, user, assistant, …) or, with `text`, a plain document.

    where: "file:line", for messages.
    """

    turns: tuple[Turn, ...] = ()
    text: str | None = None
    where: str
    rejected: str | None = None
    """The reply that is worse than the last turn, of a row for preference training."""
    numbers: tuple[tuple[str, float], ...] = ()
    """(column, number) of the other columns that the objective reads."""


@dataclass(frozen=True, kw_only=True)
class Tags:
    """What a sharegpt file calls the keys and the roles of a turn (LLaMA-Factory's `tags`)."""

    role: str = "from"
    content: str = "value"
    roles: Mapping[str, str] = field(default_factory=dict)


Reply = Literal["required", "optional", "dropped"]
"""The last reply of a row: "required" for training, "optional" for prompts of a comparison, "dropped" for questions to answer."""


REJECTED = "rejected_response"


def to_row(
    record: Mapping[str, Any],
    *,
    where: str,
    ignored: Counter[str],
    tags: Tags | None = None,
    reply: Reply = "required",
    fields: Sequence[str] = (),
) -> Row:
    """The row that `record` describes; names of unused columns are counted in `ignored`.

    fields: columns that the run's objective reads beside the conversation: rejected_response is text, every other one a number.
    Raises a UserError that begins with `where` for a record that is not valid.
    """
    for name, what in _UNSUPPORTED.items():
        if name not in fields and not _is_empty(record.get(name)):
            raise UserError(
                f"{where}: column {name!r} is {what}, which is not supported yet and is not dropped silently; "
                "remove the column, or map another with data.columns"
            )
    present = {name for name in record if not _is_empty(record[name])}
    try:
        row, used = _shape(record, present, where, ignored, tags or Tags(), reply)
        if fields:
            row = _with_fields(row, record, fields)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    ignored.update(present - used - set(fields))
    return row


def _with_fields(row: Row, record: Mapping[str, Any], fields: Sequence[str]) -> Row:
    """The row with the columns that the objective reads. Every row must have them."""
    numbers = []
    for name in fields:
        value = record.get(name)
        if _is_empty(value):
            raise UserError(
                f"column {name!r} is missing or empty, and the objective needs it; add it, or map one with data.columns"
            )
        if name == REJECTED:
            if not row.turns:
                raise UserError(f"column {name!r} is a second reply, and plain text has no first; write a conversation")
            row = replace(row, rejected=_text(value, name))
        elif isinstance(value, int | float) and math.isfinite(value):
            numbers.append((name, float(value)))
        else:
            raise UserError(f"column {name!r} is {kind(value)}; write a number, or true or false")
    return replace(row, numbers=tuple(numbers))


def _shape(
    record: Mapping[str, Any], present: set[str], where: str, ignored: Counter[str], tags: Tags, reply: Reply
) -> tuple[Row, set[str]]:
    system = None if record.get("system") is None else _text(record["system"], "system")
    if "messages" in present:
        turns = [
            _turn(message, index, Tags(role="role", content="content"), ignored)
            for index, message in _each(record, "messages")
        ]
        return _row(turns, system, where, reply), {"messages", "system"}
    if name := _first(CONVERSATIONS, present):
        turns = []
        for index, item in _each(record, name):
            turns += _share_turns(item, index, tags, ignored)
        return _row(turns, system, where, reply), {name, "system"}
    if "instruction" in present or (name := _first(QUERY, present)) or _first(RESPONSE, present):
        return _query_row(record, present, system, where, reply)
    if "text" in present:
        return Row(text=_text(record["text"], "text"), where=where), {"text"}
    _refuse_empty(record, COLUMNS)
    raise UserError(
        f"no known column among {sorted(record) or 'none'}; a row needs messages, conversations, query + response, "
        "instruction + output, or text: rename the columns with data.columns"
    )


def _query_row(
    record: Mapping[str, Any], present: set[str], system: str | None, where: str, reply: Reply
) -> tuple[Row, set[str]]:
    response = _first(RESPONSE, present)
    if response is None and reply == "required":
        _refuse_empty(record, RESPONSE)
        asked = "instruction" if "instruction" in present else _first(QUERY, present)
        raise UserError(
            f"column {asked!r} has no reply beside it; add one of {', '.join(RESPONSE)}, or map one with data.columns"
        )
    used = {"history", "system", *([response] if response else ())}
    if "instruction" in present:
        parts = [_text(record.get(name), name) for name in ("instruction", "input")]
        query = "\n".join(part for part in parts if part)
        used |= {"instruction", "input"}
    else:
        name = _first(QUERY, present)
        if name is None:
            _refuse_empty(record, QUERY)
            raise UserError(
                f"column {response!r} has no question beside it; add one of {', '.join(QUERY)}, or write "
                '{"text": …} for plain text to pretrain on'
            )
        query = _text(record[name], name)
        used.add(name)
    turns = []
    for asked, replied in _history(record.get("history")):
        turns += [Turn(role="user", content=asked), Turn(role="assistant", content=replied)]
    turns.append(Turn(role="user", content=query))
    if response is not None:
        turns.append(Turn(role="assistant", content=_text(record[response], response)))
    return _row(turns, system, where, reply), used


def _history(history: Any) -> Iterator[tuple[str, str]]:
    if _is_empty(history):
        return
    if not isinstance(history, list):
        raise UserError(f"history is {kind(history)}; write a list of [question, reply] pairs")
    for index, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise UserError(f"history[{index}] is {kind(pair)}; write a pair [question, reply]")
        yield _text(pair[0], f"history[{index}][0]"), _text(pair[1], f"history[{index}][1]")


def _share_turns(item: Any, index: int, tags: Tags, ignored: Counter[str]) -> list[Turn]:
    """One item of a sharegpt list: {from, value}, {role, content}, or SWIFT's pair {human, assistant}."""
    if isinstance(item, Mapping) and tags.role not in item:
        if "human" in item and "assistant" in item:
            return [
                Turn(role="user", content=_text(item["human"], f"turn {index + 1}: human")),
                Turn(role="assistant", content=_text(item["assistant"], f"turn {index + 1}: assistant")),
            ]
        if "role" in item:
            return [_turn(item, index, Tags(role="role", content="content", roles=tags.roles), ignored)]
    return [_turn(item, index, tags, ignored)]


def _turn(message: Any, index: int, tags: Tags, ignored: Counter[str]) -> Turn:
    at = f"turn {index + 1}"
    if not isinstance(message, Mapping):
        raise UserError(f"{at} is {kind(message)}; write an object with {tags.role!r} and {tags.content!r}")
    for name in (tags.role, tags.content):
        if name not in message:
            raise UserError(
                f"{at} has no {name!r}, only {sorted(message)}; write {tags.role!r} and {tags.content!r} in every turn"
            )
    for name, what in _UNSUPPORTED_IN_TURN.items():
        if not _is_empty(message.get(name)):
            raise UserError(f"{at}: {name!r} is {what}, which is not supported yet; remove it from the row")
    ignored.update(
        f"messages[].{name}" for name in message if name not in (tags.role, tags.content, "loss", *_UNSUPPORTED_IN_TURN)
    )
    role = _role(message[tags.role], at, tags)
    loss = message.get("loss")
    if loss not in (None, True, False):
        raise UserError(f"{at}: loss is {loss!r}; write true or false")
    if loss is not None and role != "assistant":
        raise UserError(
            f"{at}: loss is set on a {role} turn, which is never trained by itself; set it on assistant turns only"
        )
    return Turn(role=role, content=_text(message[tags.content], at), loss=None if loss is None else bool(loss))


def _role(name: Any, at: str, tags: Tags) -> str:
    role = tags.roles.get(name, _ROLES.get(name)) if isinstance(name, str) else None
    if role is None:
        if name in _TOOL_ROLES:
            raise UserError(f"{at}: role {name!r} is tool use, which is not supported yet; remove such rows")
        raise UserError(f"{at}: unknown role {name!r}; known are {', '.join(_ROLES)}")
    return role


def _row(turns: list[Turn], system: str | None, where: str, reply: Reply) -> Row:
    while reply == "dropped" and turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    if len(turns) == 1 and turns[0].role == "assistant" and not system:
        # SWIFT writes a document for pretraining as a single assistant turn.
        return Row(text=turns[0].content, where=where)
    if system is not None:
        has_turn = bool(turns) and turns[0].role == "system"
        if has_turn and system:
            raise UserError("both a system column and a system turn; keep one of them")
        if not has_turn:
            turns = [Turn(role="system", content=system), *turns]
    first = 1 if turns and turns[0].role == "system" else 0
    for index, turn in enumerate(turns[first:], first):
        expected = "assistant" if (index - first) % 2 else "user"
        if turn.role != expected:
            raise UserError(
                f"turn {index + 1} is {turn.role} where {expected} is expected (order: {', '.join(t.role for t in turns)}); "
                "turns go system (optional), then user and assistant in alternation"
            )
        if not turn.content.strip():
            raise UserError(f"turn {index + 1} ({turn.role}) is empty; fill it in or remove the row")
    if len(turns) == first and reply != "required":
        raise UserError("there is no question in it; write a user turn")
    if reply == "required" and (len(turns) == first or turns[-1].role != "assistant"):
        last = turns[-1].role if turns else "nothing"
        raise UserError(
            f"the conversation ends with {last}, so there is no reply to train; end it with an assistant turn"
        )
    return Row(turns=tuple(turns), where=where)


def _each(record: Mapping[str, Any], name: str) -> Iterator[tuple[int, Any]]:
    if not isinstance(record[name], list):
        raise UserError(f"{name} is {kind(record[name])}; write a list of turns")
    return iter(enumerate(record[name]))


def _text(value: Any, name: str) -> str:
    if value is None:
        return ""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping) and value[0].get("type") == "text":
        value = value[0].get("text")
    if not isinstance(value, str):
        raise UserError(f"{name} is {kind(value)}; write a string (contents of several parts are not supported yet)")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{name} has half a surrogate pair ({value[error.start]!r} at character {error.start + 1}), which is not text; "
                "write the whole character"
            ) from error
    return value


def _first(names: tuple[str, ...], present: set[str]) -> str | None:
    return next((name for name in names if name in present), None)


def _refuse_empty(record: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """UserError where a required column exists but is empty. The error names the value, since the column's name is right."""
    if there := [name for name in names if name in record]:
        raise UserError(f"column {there[0]!r} is empty ({kind(record[there[0]])}); fill it in, or remove the row")


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def kind(value: Any) -> str:
    """The JSON type of `value` and the beginning of its text."""
    text = repr(value)
    return f"{_KINDS.get(type(value), 'unknown')} ({text if len(text) <= 40 else text[:37] + '...'})"
