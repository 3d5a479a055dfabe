"""Which characters of a rendered conversation the model writes: the trained spans of a chat template.

The idea: render what inference would render, and use it only where the renders agree. The reply of turn i is the text between
`render(turns before i, add_generation_prompt)`, which is the prompt at inference, and `render(turns up to i)`, which is the text after
inference. Both must be prefixes of the rendered whole conversation. A template that changes earlier turns fails this check and is
refused. Marks (private-use characters, see `marks`) around each reply show where its content is in the rendered text and that all of it
was rendered. A template with `{% generation %}` tags says itself what is trained; these tags are rendered as marks too.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jinja2

from swift_mega.data.marks import (
    CLOSE,
    MARKS,
    MAX_TURNS,
    OPEN,
    Marked,
    Message,
    as_parts,
    difference,
    has_generation_marks,
    mark_contents,
    mark_of,
    shared,
    short,
    squeeze,
    take_marks,
    turn_of,
    with_generation_marks,
)
from swift_mega.data.parts import check_parts
from swift_mega.errors import UserError

_TEMPLATE_ACCIDENTS = (
    *(TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError, SyntaxError),
    # A macro that calls itself raises RecursionError.
    *(RuntimeError, MemoryError),
)
"""A template is code of the model's author. It raises TemplateError on purpose, and these errors because of mistakes."""
_PROMPT_MODES: tuple[dict[str, bool], ...] = (
    {}, {"enable_thinking": False}, {"enable_thinking": True}, {"thinking": False}, {"thinking": True},
)  # fmt: skip
"""Modes: settings of the generation prompt in published templates, the default first. A reply without reasoning follows
the prompt of one mode, a reply with reasoning follows that of another."""
_ROLES = ("system", "user", "assistant")
_OWN_TEMPLATE = "give a template with {% generation %} marks as data.chat_template"


@dataclass(frozen=True, kw_only=True)
class Span:
    """Characters [start, end) of the rendered text that are trained for the reply of turn `turn` (0-based).

    content_end: where the words of the reply end and the end-of-turn text begins; None where the template splits the reply.
    """

    turn: int
    start: int
    end: int
    content_end: int | None = None


class Template:
    """One chat template with the special tokens of one tokenizer.

    tokenizer: a transformers tokenizer; only its `apply_chat_template` and `eos_token` are used.
    source: the Jinja text, without a byte order mark. name: its name in error messages.
    """

    def __init__(self, tokenizer: Any, source: str, *, name: str) -> None:
        self._tokenizer = tokenizer
        self.source = source
        self._name = name
        self._marked_source = with_generation_marks(source)
        self.has_generation_marks = has_generation_marks(source)
        self.modes: Counter[str] = Counter()
        """Number of replies that follow a generation prompt other than the default, by the setting that gives this prompt."""

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False, **mode: bool) -> str:
        """The text of a conversation; UserError with the template's own message where it raises an error."""
        return self._render(self.source, messages, add_generation_prompt=generation_prompt, **mode)

    def prompt(self, messages: Sequence[Message]) -> str:
        """The conversation with a generation prompt; UserError where the template raises an error or loses a part of the conversation."""
        if messages[0]["role"] == "system" and not messages[0]["content"].strip() and self.refuses_system:
            messages = messages[1:]
        text = self.render(messages, generation_prompt=True)
        check_parts(self._name, messages, text, self._all_marked(messages, text, add_generation_prompt=True), ())
        return text

    def spans(self, messages: Sequence[Message], turns: Iterable[int]) -> tuple[str, list[Span]]:
        """The rendered conversation and the trained spans of `turns` (indices of assistant messages), in order.

        Raises UserError where the template loses a part of the conversation, or where a span cannot be located with certainty.
        """
        text = self.render(messages)
        wanted = sorted(turns)
        marked = self._all_marked(messages, text)
        check_parts(self._name, messages, text, marked, wanted)
        if not wanted:
            return text, []
        marked = marked or self._marked_replies(messages, text)
        if self.has_generation_marks:
            return text, self._spans_by_generation(messages, wanted, marked)
        return text, [self._span_by_prefix(messages, turn, marked) for turn in wanted]

    @cached_property
    def refuses_system(self) -> bool:
        """Whether the template raises an error for every system turn, also an empty one."""
        user = {"role": "user", "content": "probe"}
        try:
            self.render([user])
        except UserError:
            return False
        try:
            self.render([{"role": "system", "content": ""}, user])
        except UserError:
            return True
        return False

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether contents have to be lists of parts: templates of multimodal models loop over parts and lose a plain string."""
        probe = {"role": "user", "content": "probe"}
        for message in (probe, {**probe, "content": as_parts("probe")}):
            try:
                if "probe" in self._tokenizer.apply_chat_template([message], chat_template=self.source, tokenize=False):
                    return message is not probe
            except (jinja2.TemplateError, *_TEMPLATE_ACCIDENTS):
                continue
        return False

    def _render(self, source: str, messages: Sequence[Message], **options: bool) -> str:
        conversation: list[dict[str, Any]] = [dict(message) for message in messages]
        if self._wants_parts:
            conversation = [{**message, "content": as_parts(message["content"])} for message in conversation]
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
                f"{self._name} cannot render a conversation with the roles {roles}: {error}; change the rows to the "
                "form that it expects, or give another template as data.chat_template"
            ) from error

    def _all_marked(self, messages: Sequence[Message], text: str, **options: bool) -> Marked | None:
        """The conversation rendered with marks around every content; None where marks change the text: some templates parse contents."""
        if len(messages) > MAX_TURNS or any(MARKS.search(message["content"]) for message in messages):
            return None
        try:
            marked = take_marks(self._render(self._marked_source, mark_contents(messages, _ROLES), **options))
        except UserError:
            # The conversation renders without marks, so the marks caused the error.
            return None
        return marked if marked.text == text else None

    def _marked_replies(self, messages: Sequence[Message], text: str) -> Marked:
        if len(messages) > MAX_TURNS:
            raise UserError(f"a conversation of {len(messages)} turns; at most {MAX_TURNS} are supported: split it")
        for turn, message in enumerate(messages):
            if found := MARKS.search(message["content"]):
                raise UserError(
                    f"turn {turn + 1} holds the private-use character U+{ord(found[0]):06X}, which is used here to find "
                    "replies in the rendered text; remove it from the row"
                )
        marked = take_marks(self._render(self._marked_source, mark_contents(messages, ("assistant",))))
        if marked.text != text:
            raise UserError(
                f"{self._name} renders a conversation differently when invisible marks stand around its replies "
                f"({difference(text, marked.text)}), so the trained tokens cannot be located; {_OWN_TEMPLATE}"
            )
        return marked

    def _spans_by_generation(self, messages: Sequence[Message], wanted: list[int], marked: Marked) -> list[Span]:
        spans: list[Span] = []
        start: int | None = None
        inside: set[int] = set()
        turn: int | None = None
        for mark, at in marked.marks:
            if mark == OPEN:
                if start is not None:
                    raise UserError(f"{self._name} nests {{% generation %}} in another one; mark each reply once")
                start, inside = at, set()
            elif mark == CLOSE:
                if start is None or len(inside) > 1 or (not inside and turn is None):
                    raise UserError(
                        f"{self._name} has a {{% generation %}} block that contains {len(inside)} replies; put it around "
                        "exactly one reply"
                    )
                # A block without content, such as an end-of-text token alone, belongs to the reply before it.
                turn = inside.pop() if inside else turn
                if turn is not None and at > start:
                    spans.append(Span(turn=turn, start=start, end=at))
                start = None
            elif start is not None and messages[turn_of(mark)]["role"] == "assistant":
                inside.add(turn_of(mark))
        if wanted[-1] == len(messages) - 1 and self._prompt_of(messages, wanted[-1], marked.text) is None:
            prompt = self.render(messages[:-1], generation_prompt=True)
            raise UserError(self._other_prompt(wanted[-1], prompt, marked.text))
        for index in wanted:
            own = [span for span in spans if span.turn == index]
            if not own:
                raise UserError(
                    f"{self._name} puts no {{% generation %}} block around the reply of turn {index + 1}, so nothing "
                    "of it would be trained; correct the template"
                )
            self._check_content(messages[index]["content"], index, marked, own[0].start, own[-1].end)
        return [
            replace(span, content_end=marked.position(mark_of(span.turn, last=True)))
            for span in spans
            if span.turn in wanted
        ]

    def _span_by_prefix(self, messages: Sequence[Message], turn: int, marked: Marked) -> Span:
        end = self._end(messages, turn, marked)
        start = self._start(messages, turn, marked, end)
        self._check_content(messages[turn]["content"], turn, marked, start, end)
        content_end = marked.position(mark_of(turn, last=True))
        if content_end is not None and not marked.text[content_end:end].strip():
            raise UserError(
                f"{self._name} writes nothing after the reply of turn {turn + 1} that ends it, so the model would not "
                f"learn to stop; {_OWN_TEMPLATE}, the end-of-turn token inside them"
            )
        return Span(turn=turn, start=start, end=end, content_end=content_end)

    def _start(self, messages: Sequence[Message], turn: int, marked: Marked, end: int) -> int:
        """Where the prompt at inference ends and the reply begins."""
        text, content = marked.text, marked.position(mark_of(turn))
        if (prompt := self._prompt_of(messages, turn, text)) is not None:
            self._check_prompt(messages[:turn], prompt, text[len(prompt) : content])
            return len(prompt)
        prompt, before = self.render(messages[:turn], generation_prompt=True), self.render(messages[:turn])
        same = shared(prompt, text)
        if same < shared(before, prompt):
            raise UserError(self._rewritten(turn, "the text before it", before, text))
        if content is None:
            self._check_content(messages[turn]["content"], turn, marked, same, end)
        raise UserError(self._other_prompt(turn, prompt, text))

    def _prompt_of(self, messages: Sequence[Message], turn: int, text: str) -> str | None:
        """The generation prompt (in one of its modes) that is a prefix of `text`; None where no mode gives one."""
        for mode in _PROMPT_MODES:
            if all(name in self.source for name in mode):
                prompt = self.render(messages[:turn], generation_prompt=True, **mode)
                if text.startswith(prompt):
                    self.modes.update(f"{name}={str(value).lower()}" for name, value in mode.items())
                    return prompt
        return None

    def _other_prompt(self, turn: int, prompt: str, text: str) -> str:
        return (
            f"{self._name} begins the reply of turn {turn + 1} in another way than its own generation prompt does "
            f"({difference(prompt, text)}), so the reply would be trained after text that generation never starts from; begin the reply as "
            f"the prompt, which ends with {prompt[-20:]!r}, begins it (an empty reasoning block is enough), or give a template "
            "without that in its generation prompt as data.chat_template, which exports then carry"
        )

    def _check_prompt(self, before: Sequence[Message], prompt: str, between: str) -> None:
        """UserError where text stands before the reply and add_generation_prompt has no effect: this text may be a header or the reply."""
        if between.strip() and prompt == self.render(before):
            raise UserError(
                f"{self._name} has no generation prompt: it ignores add_generation_prompt, but writes {short(between)} "
                f"before the reply of turn {len(before) + 1}, so where the reply begins is not known; {_OWN_TEMPLATE}"
            )

    def _end(self, messages: Sequence[Message], turn: int, marked: Marked) -> int:
        """Where the end-of-turn text of the reply ends."""
        text = marked.text
        if (end := self._before_header(messages, turn, marked)) is not None:
            return end
        if turn == len(messages) - 1:
            return len(text)
        so_far = self.render(messages[: turn + 1])
        if text.startswith(so_far):
            return len(so_far)
        # Phi 3 writes the end-of-text token only after the last turn, after the end-of-turn token of that turn.
        eos = self._tokenizer.eos_token
        content_end = marked.position(mark_of(turn, last=True))
        if eos and so_far.endswith(eos) and text.startswith(so_far[: -len(eos)]) and content_end is not None:
            end = len(so_far) - len(eos)
            if text[content_end:end].strip():
                return end
        raise UserError(self._rewritten(turn, "the conversation up to this reply", so_far, text))

    @cached_property
    def _ignores_the_flag(self) -> bool:
        """Whether add_generation_prompt changes nothing."""
        messages = [{"role": "user", "content": "probe"}]
        try:
            return self.render(messages) == self.render(messages, generation_prompt=True)
        except UserError:
            return False

    def _before_header(self, messages: Sequence[Message], turn: int, marked: Marked) -> int | None:
        """The end of a turn, for a template that always writes the header of the next reply after it; None for other templates.

        With one more user turn, the rendered text stays the same up to the words of this header. The header begins at the special token
        before these words, or else at the begin of their line.
        """
        content_end = marked.position(mark_of(turn, last=True))
        if not self._ignores_the_flag or content_end is None:
            return None
        so_far = self.render(messages[: turn + 1])
        try:
            longer = self.render([*messages[: turn + 1], {"role": "user", "content": "probe"}])
        except UserError:
            return None
        same = shared(so_far, longer)
        header = so_far[same:]
        if not header.strip() or not self.render(messages[:turn]).endswith(header):
            return None
        end = content_end + _end_of_turn(so_far[content_end:same], self._tokenizer.all_special_tokens)
        return end if marked.text.startswith(so_far[:end]) else None

    def _check_content(self, content: str, turn: int, marked: Marked, start: int, end: int) -> None:
        """UserError unless [start, end) contains the whole reply and no text of another turn."""
        for mark, at in marked.marks:
            if mark > CLOSE and turn_of(mark) != turn and start < at < end:
                raise UserError(f"{self._name} renders the reply of turn {turn + 1} in pieces; {_OWN_TEMPLATE}")
        first, last = marked.position(mark_of(turn)), marked.position(mark_of(turn, last=True))
        if first is not None and last is not None and last <= end and marked.text[first:last] == content.strip():
            return
        # A template may split a reply (reasoning and answer) and change white space in it, but may not drop words.
        around = marked.text[max(0, start - len(content)) : end]
        if squeeze(content) not in squeeze(around):
            raise UserError(
                f"{self._name} drops or changes part of the reply of turn {turn + 1}: {short(content)} was rendered as "
                f"{short(marked.text[start:end])}; change the row, or {_OWN_TEMPLATE}"
            )

    def _rewritten(self, turn: int, what: str, before: str, after: str) -> str:
        return (
            f"{self._name} rewrites earlier text: at the reply of turn {turn + 1}, {what} is not the beginning of the "
            f"whole conversation ({difference(before, after)}), so the reply would be trained in a form that the model "
            f"never produces; train the last reply only (data.loss_on=last), or {_OWN_TEMPLATE}"
        )


def _end_of_turn(tail: str, special: Sequence[str]) -> int:
    """How many characters of `tail` end the turn. tail: from the end of a reply's content into the next header."""
    marker = next((token for token in special if tail.endswith(token) and tail.removesuffix(token).strip()), None)
    if marker is not None:
        return len(tail) - len(marker)
    line = tail.rfind("\n") + 1
    return line if tail[:line].strip() else len(tail)
