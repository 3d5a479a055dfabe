"""Which characters of a rendered conversation the model writes: the trained spans of a chat template.

The idea is to ask the template what it would do at inference, and to believe it only where the answers agree. The reply
of turn i is what stands between `render(turns before i, add_generation_prompt)`, the prompt that inference gives, and
`render(turns up to i)`, the text that inference leaves behind. Both must be found again, unchanged, in the render of the
whole conversation; a template that rewrites earlier turns fails there, and is refused. Private-use characters around
each reply (inside its outer white space, so that `| trim` acts as before) show where its content went and that all of
it arrived. A template with `{% generation %}` marks says itself what is trained; the marks are rendered as
private-use characters too, which stays right inside macros and `{% set %}` blocks, where counting characters does not.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jinja2

from swift_mega.errors import UserError

Message = dict[str, str]

_OPEN, _CLOSE = "\U00100000", "\U00100001"
_CONTENT = 0x100010
"""Turn i is marked by the characters _CONTENT + 2i and _CONTENT + 2i + 1."""
_MARKS = re.compile("[\U00100000-\U0010fffd]")
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_MAX_TURNS = 20_000
_TEMPLATE_ACCIDENTS = (TypeError, ValueError, KeyError, IndexError, AttributeError)
"""A template is code of the model's author: it raises TemplateError on purpose, and these by accident."""
_PROMPT_MODES: tuple[dict[str, bool], ...] = (
    {}, {"enable_thinking": False}, {"enable_thinking": True}, {"thinking": False}, {"thinking": True},
)  # fmt: skip
"""Settings of the generation prompt that published templates know, the default first. A reply without reasoning follows
the prompt of one mode, a reply with reasoning that of another."""
_OWN_TEMPLATE = "give a template with {% generation %} marks as data.chat_template"


@dataclass(frozen=True, kw_only=True)
class Span:
    """Characters [start, end) of the render that the reply of turn `turn` (0-based) trains.

    content_end: where the reply's own words end, and the end of the turn begins; None where the template took the reply apart.
    """

    turn: int
    start: int
    end: int
    content_end: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Marked:
    """The render with marks taken out, and the position of each mark in what is left."""

    text: str
    marks: list[tuple[str, int]]

    def position(self, mark: str) -> int | None:
        """Where `mark` stood, or None where it is absent or occurs twice."""
        found = [at for char, at in self.marks if char == mark]
        return found[0] if len(found) == 1 else None


class Template:
    """One chat template with the special tokens of one tokenizer.

    tokenizer: a transformers tokenizer; only its `apply_chat_template` and `eos_token` are used.
    source: the Jinja text, without a byte order mark. name: what errors call it.
    """

    def __init__(self, tokenizer: Any, source: str, *, name: str) -> None:
        self._tokenizer = tokenizer
        self.source = source
        self._name = name
        self._marked_source = _GENERATION.sub(_emit_mark, source)
        self.has_generation_marks = _GENERATION.search(_COMMENT.sub("", source)) is not None

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False, **mode: bool) -> str:
        """The text of a conversation; UserError with the template's own words where it refuses it."""
        return self._render(self.source, messages, add_generation_prompt=generation_prompt, **mode)

    def spans(self, messages: Sequence[Message], turns: Iterable[int]) -> tuple[str, list[Span]]:
        """The rendered conversation and the trained spans of `turns` (indices of assistant messages), in order.

        Raises UserError where the template leaves any doubt about a span.
        """
        text = self.render(messages)
        wanted = sorted(turns)
        if not wanted:
            return text, []
        marked = self._marked_render(messages, text)
        if self.has_generation_marks:
            return text, self._spans_by_generation(messages, wanted, marked)
        return text, [self._span_by_prefix(messages, turn, marked) for turn in wanted]

    @cached_property
    def _wants_parts(self) -> bool:
        """Templates of multimodal models loop over the parts of a content and lose a plain string."""
        probe = {"role": "user", "content": "probe"}
        for message in (probe, {**probe, "content": _parts("probe")}):
            try:
                if "probe" in self._tokenizer.apply_chat_template([message], chat_template=self.source, tokenize=False):
                    return message is not probe
            except (jinja2.TemplateError, *_TEMPLATE_ACCIDENTS):
                continue
        return False

    def _render(self, source: str, messages: Sequence[Message], **options: bool) -> str:
        conversation: list[dict[str, Any]] = [dict(message) for message in messages]
        if self._wants_parts:
            conversation = [{**message, "content": _parts(message["content"])} for message in conversation]
        try:
            return self._tokenizer.apply_chat_template(conversation, chat_template=source, tokenize=False, **options)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"{self._name} is not valid Jinja: line {error.lineno}: {error.message}; correct it, or give another "
                "file as data.chat_template"
            ) from error
        except (jinja2.TemplateError, *_TEMPLATE_ACCIDENTS) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"{self._name} cannot render a conversation with the roles {roles}: {error}; bring the rows into the "
                "form that it wants, or give another template as data.chat_template"
            ) from error

    def _marked_render(self, messages: Sequence[Message], text: str) -> _Marked:
        if len(messages) > _MAX_TURNS:
            raise UserError(f"a conversation of {len(messages)} turns; at most {_MAX_TURNS} are supported: split it")
        for turn, message in enumerate(messages):
            if found := _MARKS.search(message["content"]):
                raise UserError(
                    f"turn {turn + 1} holds the private-use character U+{ord(found[0]):06X}, which is used here to find "
                    "replies in the rendered text; remove it from the row"
                )
        marked = _take_marks(self._render(self._marked_source, _mark_replies(messages)))
        if marked.text != text:
            raise UserError(
                f"{self._name} renders a conversation differently when invisible marks stand around its replies "
                f"({_difference(text, marked.text)}), so the trained tokens cannot be located; {_OWN_TEMPLATE}"
            )
        return marked

    def _spans_by_generation(self, messages: Sequence[Message], wanted: list[int], marked: _Marked) -> list[Span]:
        spans: list[Span] = []
        start: int | None = None
        inside: set[int] = set()
        turn: int | None = None
        for mark, at in marked.marks:
            if mark == _OPEN:
                if start is not None:
                    raise UserError(f"{self._name} nests {{% generation %}} in another one; mark each reply once")
                start, inside = at, set()
            elif mark == _CLOSE:
                if start is None or len(inside) > 1 or (not inside and turn is None):
                    raise UserError(
                        f"{self._name} has a {{% generation %}} block that holds {len(inside)} replies; put it around "
                        "exactly one reply"
                    )
                # A block without content (an end-of-text token on its own) belongs to the reply before it.
                turn = inside.pop() if inside else turn
                if turn is not None and at > start:
                    spans.append(Span(turn=turn, start=start, end=at))
                start = None
            elif start is not None:
                inside.add((ord(mark) - _CONTENT) // 2)
        for index in wanted:
            own = [span for span in spans if span.turn == index]
            if not own:
                raise UserError(
                    f"{self._name} puts no {{% generation %}} block around the reply of turn {index + 1}, so nothing "
                    "of it would be trained; correct the template"
                )
            self._check_content(messages[index]["content"], index, marked, own[0].start, own[-1].end)
        return [
            replace(span, content_end=marked.position(_mark(span.turn, last=True)))
            for span in spans
            if span.turn in wanted
        ]

    def _span_by_prefix(self, messages: Sequence[Message], turn: int, marked: _Marked) -> Span:
        end = self._end(messages, turn, marked)
        start = self._start(messages, turn, marked, end)
        self._check_content(messages[turn]["content"], turn, marked, start, end)
        content_end = marked.position(_mark(turn, last=True))
        if content_end is not None and not marked.text[content_end:end].strip():
            raise UserError(
                f"{self._name} writes nothing after the reply of turn {turn + 1} that ends it, so the model would not "
                f"learn to stop; {_OWN_TEMPLATE}, the end-of-turn token inside them"
            )
        return Span(turn=turn, start=start, end=end, content_end=content_end)

    def _start(self, messages: Sequence[Message], turn: int, marked: _Marked, end: int) -> int:
        """Where the prompt that inference would give ends, and the reply begins."""
        text = marked.text
        modes = [mode for mode in _PROMPT_MODES if all(name in self.source for name in mode)]
        content = marked.position(_mark(turn))
        for mode in modes:
            prompt = self.render(messages[:turn], generation_prompt=True, **mode)
            if text.startswith(prompt):
                self._check_prompt(messages[:turn], prompt, text[len(prompt) : content])
                return len(prompt)
        # The prompt may go on (with a forced "<think>") where this reply has its own first words. That is plain only
        # where the two part exactly at the first character of the reply.
        prompt = self.render(messages[:turn], generation_prompt=True)
        shared = _shared(prompt, text)
        reply = messages[turn]["content"]
        space = len(reply) - len(reply.lstrip())  # before `content`, unless the template trimmed it
        if content is not None and shared >= content - space:
            return min(shared, content)
        before = self.render(messages[:turn])
        if shared < _shared(before, prompt):
            raise UserError(self._rewritten(turn, "the text before it", before, text))
        if content is None:
            self._check_content(reply, turn, marked, shared, end)
        raise UserError(
            f"{self._name} begins the reply of turn {turn + 1} otherwise than its own generation prompt does "
            f"({_difference(prompt, text)}), so where the reply begins is not known; write the reply with the "
            f"reasoning block that the prompt opens, or {_OWN_TEMPLATE}"
        )

    def _check_prompt(self, before: Sequence[Message], prompt: str, between: str) -> None:
        """A header that add_generation_prompt does not give is no part of the reply, and is not known to be a header."""
        if between.strip() and prompt == self.render(before):
            raise UserError(
                f"{self._name} has no generation prompt: it ignores add_generation_prompt, but writes {_short(between)} "
                f"before the reply of turn {len(before) + 1}, so where the reply begins is not known; {_OWN_TEMPLATE}"
            )

    def _end(self, messages: Sequence[Message], turn: int, marked: _Marked) -> int:
        """Where the reply and its end-of-turn text end."""
        text = marked.text
        if turn == len(messages) - 1:
            return len(text)
        so_far = self.render(messages[: turn + 1])
        if text.startswith(so_far):
            return len(so_far)
        # phi 3 writes the end-of-text token after the last turn only, beyond the end-of-turn token of that turn.
        eos = self._tokenizer.eos_token
        content_end = marked.position(_mark(turn, last=True))
        if eos and so_far.endswith(eos) and text.startswith(so_far[: -len(eos)]) and content_end is not None:
            end = len(so_far) - len(eos)
            if text[content_end:end].strip():
                return end
        raise UserError(self._rewritten(turn, "the conversation up to this reply", so_far, text))

    def _check_content(self, content: str, turn: int, marked: _Marked, start: int, end: int) -> None:
        """All of the reply, and nothing of another turn, lies in [start, end)."""
        for mark, at in marked.marks:
            if mark > _CLOSE and (ord(mark) - _CONTENT) // 2 != turn and start < at < end:
                raise UserError(f"{self._name} renders the reply of turn {turn + 1} in pieces; {_OWN_TEMPLATE}")
        first, last = marked.position(_mark(turn)), marked.position(_mark(turn, last=True))
        if first is not None and last is not None and last <= end and marked.text[first:last] == content.strip():
            return
        # A template may take a reply apart (reasoning and answer) and set new white space in it, but not drop words.
        around = marked.text[max(0, start - len(content)) : end]
        if _squeeze(content) not in _squeeze(around):
            raise UserError(
                f"{self._name} drops or changes part of the reply of turn {turn + 1}: {_short(content)} was rendered as "
                f"{_short(marked.text[start:end])}; change the row, or {_OWN_TEMPLATE}"
            )

    def _rewritten(self, turn: int, what: str, before: str, after: str) -> str:
        return (
            f"{self._name} rewrites earlier text: at the reply of turn {turn + 1}, {what} is not the beginning of the "
            f"whole conversation ({_difference(before, after)}), so the reply would be trained in a form that the model "
            f"never produces; train the last reply only (data.loss_on=last), or {_OWN_TEMPLATE}"
        )


def _emit_mark(tag: re.Match[str]) -> str:
    # A statement on both sides keeps trim_blocks, lstrip_blocks and the tag's own dashes acting as on the tag itself.
    mark = _CLOSE if tag[2] else _OPEN
    return f"{{%{tag[1]} if true %}}{{{{ '{mark}' }}}}{{% endif {tag[3]}%}}"


def _mark(turn: int, *, last: bool = False) -> str:
    return chr(_CONTENT + 2 * turn + last)


def _mark_replies(messages: Sequence[Message]) -> list[Message]:
    marked = []
    for turn, message in enumerate(messages):
        content = message["content"]
        core = content.strip()
        if message["role"] == "assistant" and core:
            head = content[: content.index(core)]
            tail = content[len(head) + len(core) :]
            content = f"{head}{_mark(turn)}{core}{_mark(turn, last=True)}{tail}"
        marked.append({**message, "content": content})
    return marked


def _parts(content: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}]


def _take_marks(text: str) -> _Marked:
    marks = [(found[0], found.start() - before) for before, found in enumerate(_MARKS.finditer(text))]
    return _Marked(text=_MARKS.sub("", text), marks=marks)


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:40]} … {text[-15:]}")


def _shared(before: str, after: str) -> int:
    """Length of the common beginning."""
    length = min(len(before), len(after))
    return next((at for at in range(length) if before[at] != after[at]), length)


def _difference(before: str, after: str) -> str:
    at = _shared(before, after)
    return f"{before[max(0, at - 15) : at + 25]!r} became {after[max(0, at - 15) : at + 25]!r}"
