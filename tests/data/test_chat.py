"""Masks written by hand for five forms of template, changes that must not affect them, and what is refused."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors

from swift_mega.data.chat import Encoder, load_tokenizer
from swift_mega.data.formats import Row, Turn
from swift_mega.errors import UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}{{ raise_exception('no system here') }}{% endif %}"
    "{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ first if loop.first }}"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TRIMS = (
    "{%- for m in messages %}\n{%- if m.role == 'user' %}\n{{- '### Q: ' + m.content.strip() + '\n\n' }}\n"
    "{%- elif m.role == 'assistant' %}\n{{- '### A: ' + m.content.strip() + eos_token + '\n\n' }}\n{%- endif %}\n{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '### A: ' }}{%- endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
SPECIAL += ("<start_of_turn>", "<end_of_turn>")
TALK = ("user", "Hi "), ("assistant", " Yes\n"), ("user", "Yes"), ("assistant", "Yes")

# Untrained and trained pieces, alternating, written by hand.
BY_HAND = [
    (
        CHATML,
        (("system", "S"), *TALK),
        [
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n",
            " Yes\n<|im_end|>\n",
            "<|im_start|>user\nYes<|im_end|>\n<|im_start|>assistant\n",
            "Yes<|im_end|>\n",
        ],
    ),
    (
        LLAMA3,
        (("system", "S"), *TALK),
        [
            "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "Yes<|eot_id|>",
            "<|start_header_id|>user<|end_header_id|>\n\nYes<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "Yes<|eot_id|>",
        ],
    ),
    (MISTRAL, TALK, ["<s>[INST] Hi  [/INST]", "  Yes\n</s>", "[INST] Yes [/INST]", " Yes</s>"]),
    (
        GEMMA,
        (("system", "S"), *TALK),
        [
            "<s><start_of_turn>user\nS\n\nHi<end_of_turn>\n<start_of_turn>model\n",
            "Yes<end_of_turn>\n",
            "<start_of_turn>user\nYes<end_of_turn>\n<start_of_turn>model\n",
            "Yes<end_of_turn>\n",
        ],
    ),
    (TRIMS, TALK, ["### Q: Hi\n\n### A: ", "Yes</s>\n\n", "### Q: Yes\n\n### A: ", "Yes</s>\n\n"]),
]


def row(turns: Any, *losses: bool | None) -> Row:
    replies = iter(losses)
    return Row(
        turns=tuple(
            Turn(role=role, content=content, loss=next(replies, None) if role == "assistant" else None)
            for role, content in turns
        ),
        where="rows.jsonl:7",
    )


def pieces(tokenizer: Any, example: Any) -> list[str]:
    """The decoded runs of untrained and trained tokens, alternating."""
    runs = itertools.groupby(
        zip(example.tokens.tolist(), example.trained.tolist(), strict=True), key=lambda pair: pair[1]
    )
    return [tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False) for _, run in runs]


@pytest.mark.parametrize(
    ("template", "turns", "expected"), BY_HAND, ids=["chatml", "llama3", "mistral", "gemma", "trims"]
)
def test_mask_written_by_hand(make_tokenizer, template, turns, expected):
    """Runs of untrained and trained tokens are the hand-written pieces, and the tokens are those of transformers."""
    tokenizer = make_tokenizer(template, *SPECIAL)
    (example,) = Encoder(tokenizer).encode([row(turns)])
    assert pieces(tokenizer, example) == expected
    messages = [{"role": role, "content": content} for role, content in turns]
    assert example.tokens.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)


@pytest.mark.parametrize(
    ("template", "turns", "expected"), BY_HAND, ids=["chatml", "llama3", "mistral", "gemma", "trims"]
)
def test_loss_on_last_and_all_and_per_turn(make_tokenizer, template, turns, expected):
    """last trains the last reply, all trains every token, and a turn's own loss wins over both."""
    tokenizer = make_tokenizer(template, *SPECIAL)
    whole, tail = "".join(expected), expected[-1]
    (last,) = Encoder(tokenizer, loss_on="last").encode([row(turns)])
    assert pieces(tokenizer, last) == [whole[: -len(tail)], tail]
    (both,) = Encoder(tokenizer, loss_on="last").encode([row(turns, True)])
    assert pieces(tokenizer, both) == expected
    (first,) = Encoder(tokenizer).encode([row(turns, None, False)])
    assert pieces(tokenizer, first) == [*expected[:2], "".join(expected[2:])]
    (every,) = Encoder(tokenizer, loss_on="all").encode([row(turns)])
    assert every.trained.all()
    (most,) = Encoder(tokenizer, loss_on="all").encode([row(turns, False)])
    assert pieces(tokenizer, most) == [expected[0], expected[1], "".join(expected[2:])]


def test_the_beginning_token_is_not_doubled(make_tokenizer):
    """A tokenizer that adds a first token itself adds it to documents, but not to text where the template has written it."""
    tokenizer = make_tokenizer(LLAMA3, *SPECIAL)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    chat, document = Encoder(tokenizer).encode([row(TALK), Row(text="Hello there", where="rows.jsonl:8")])
    assert (chat.tokens == tokenizer.bos_token_id).sum() == 1
    assert tokenizer.decode(document.tokens) == "<s>Hello there</s>"
    assert document.trained.all()


def test_the_pad_token_is_trained_where_it_ends_a_turn(chatml):
    """The pad token is the end-of-turn token here, and is still trained."""
    assert chatml.pad_token == chatml.eos_token == "<|im_end|>"
    (example,) = Encoder(chatml).encode([row(TALK)])
    assert example.trained[example.tokens == chatml.pad_token_id].tolist() == [False, True, False, True]


def test_offsets_without_leading_space_give_the_same_mask(make_tokenizer):
    """A byte-level post-processor that leaves spaces out of the offsets changes nothing."""
    turns = ("user", "  two  spaces "), ("assistant", "  a  b  "), ("user", "   "), ("assistant", " 😀 é  ")
    exact = make_tokenizer(MISTRAL, *SPECIAL)
    trimmed = make_tokenizer(MISTRAL, *SPECIAL)
    trimmed.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    (a,), (b,) = (Encoder(tokenizer).encode([row(turns)]) for tokenizer in (exact, trimmed))
    assert np.array_equal(a.tokens, b.tokens)
    assert np.array_equal(a.trained, b.trained)


def test_marks_inside_a_macro_and_a_set_block(make_tokenizer):
    """Generation marks are read correctly where the template buffers the text; transformers' count of characters is wrong there."""
    template = (
        "{% macro turn(m) %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{% endmacro %}"
        "{% for m in messages %}{{ turn(m) }}\n{% endfor %}"
    )
    tokenizer = make_tokenizer(template, *SPECIAL)
    (example,) = Encoder(tokenizer).encode([row(TALK)])
    assert pieces(tokenizer, example) == [
        "<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n",
        " Yes\n<|im_end|>",
        "\n<|im_start|>user\nYes<|im_end|>\n<|im_start|>assistant\n",
        "Yes<|im_end|>",
        "\n",
    ]


def test_a_template_file_wins(make_tokenizer, tmp_path):
    """data.chat_template replaces the tokenizer's template."""
    path = tmp_path / "own.jinja"
    path.write_text(MISTRAL)
    tokenizer = make_tokenizer(CHATML, *SPECIAL)
    (example,) = Encoder(tokenizer, chat_template=str(path)).encode([row(TALK)])
    assert pieces(tokenizer, example) == ["<s>[INST] Hi  [/INST]", "  Yes\n</s>", "[INST] Yes [/INST]", " Yes</s>"]


END = "<|im_end|>\n"
BAD_TEMPLATES: dict[str, tuple[str, str, str]] = {
    "syntax": ("{% for m in messages %}", "not valid Jinja: line 1", "correct it"),
    "raises": ("{{ raise_exception('no system here') }}", "no system here", "data.chat_template"),
    "accident": (
        "{{ messages[0].content + 1 }}",
        "cannot render a conversation with the roles user, assistant",
        "data.chat_template",
    ),
    "no prompt": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}" + END + "{% endfor %}",
        "no generation prompt",
        "data.chat_template",
    ),
    "no end": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
        "nothing after the reply of turn 2",
        "end-of-turn token",
    ),
    "rewrites": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ '<think></think>' if loop.last and m.role == 'assistant' }}{{ m.content }}"
        + END
        + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "rewrites earlier text: at the reply of turn 2",
        "data.loss_on=last",
    ),
    "drops": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split()[0] if m.role == 'assistant' else m.content }}"
        + END
        + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "drops or changes part of the reply of turn 2",
        "change the row",
    ),
    "upper": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | upper if m.role == 'assistant' else m.content }}"
        + END
        + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "drops or changes part of the reply of turn 2",
        "change the row",
    ),
    "other prompt": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ '<a>' if m.role == 'assistant' }}{{ m.content }}"
        + END
        + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<b>{% endif %}",
        "begins the reply of turn 2 in another way than its own generation prompt",
        "<b>', begins it",
    ),
    "forces a reasoning block": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}" + END + "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        "begins the reply of turn 2 in another way than its own generation prompt",
        "<think>\\n', begins it",
    ),
    "forces one behind marks": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'user' %}{{ m.content }}{% else %}{% generation %}"
        "{{ m.content }}" + END + "{% endgeneration %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        "begins the reply of turn 4 in another way than its own generation prompt",
        "give a template without that",
    ),
    "drops a question": (
        "{% for m in messages %}{% if not loop.first %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        + END
        + "{% endif %}{% endfor %}",
        "does not render the user text of turn 1 whole",
        "change the row",
    ),
    "reorders": (
        "{% for m in messages | reverse %}<|im_start|>{{ m.role }}\n{{ m.content }}" + END + "{% endfor %}",
        "renders turn 3 ('another') before an earlier one",
        "another template",
    ),
    "looks at length": (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content | length }}\n{{ m.content }}"
        + END
        + "{% endfor %}",
        "differently when invisible marks",
        "{% generation %}",
    ),
    "marks skip": (
        "{% for m in messages %}{{ m.role }}{% if loop.first %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}"
        "{{ m.content }}{% endif %}{% endfor %}",
        "contains 0 replies",
        "around exactly one reply",
    ),
    "marks none": (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if false %}{% generation %}{% endgeneration %}{% endif %}",
        "no {% generation %} block around the reply of turn 2",
        "correct the template",
    ),
    "marks all": (
        "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}",
        "contains 2 replies",
        "around exactly one reply",
    ),
    "marks nested": (
        "{% for m in messages %}{% generation %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% endgeneration %}{% endfor %}",
        "nests {% generation %}",
        "mark each reply once",
    ),
    "marks half": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}{% generation %}{{ m.content[:4] }}"
        "{% endgeneration %}{{ m.content[4:] }}{% endif %}{% endfor %}",
        "drops or changes part of the reply",
        "change the row",
    ),
}


@pytest.mark.parametrize("case", BAD_TEMPLATES)
def test_doubtful_templates_are_refused(make_tokenizer, case):
    """Each error names the row, the reason and the remedy."""
    template, reason, remedy = BAD_TEMPLATES[case]
    turns = ("user", "a question"), ("assistant", "a reply"), ("user", "another"), ("assistant", "the last one")
    with pytest.raises(UserError) as caught:
        Encoder(make_tokenizer(template, *SPECIAL)).encode([row(turns)])
    message = str(caught.value)
    assert message.startswith("rows.jsonl:7: the tokenizer's chat template")
    assert reason in message
    assert remedy in message


def refuse(call: Callable[[], Any], *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)


def test_errors_around_the_tokenizer(make_tokenizer, tmp_path: Path):
    """No template, a template file that is missing or empty, a slow tokenizer, no eos, a reserved character, no tokenizer."""
    bare = make_tokenizer(None)
    refuse(lambda: Encoder(bare).encode([row(TALK)]), "no chat template", "data.chat_template")
    missing = str(tmp_path / "missing.jinja")
    refuse(lambda: Encoder(bare, chat_template=missing), missing, "does not exist", "give the path")
    empty = tmp_path / "empty.jinja"
    empty.write_text(" \n")
    refuse(lambda: Encoder(bare, chat_template=str(empty)), "empty.jinja", "is empty", "write the Jinja text")

    class Slow:
        is_fast = False
        name_or_path = "models/old"

    refuse(lambda: Encoder(Slow()), "models/old", "slow one", "tokenizer.json")
    chat = make_tokenizer(CHATML, *SPECIAL)
    refuse(
        lambda: Encoder(chat).encode([row((("user", "Hi"), ("assistant", "a\U00100010b")))]),
        "rows.jsonl:7: turn 2",
        "U+100010",
        "remove it",
    )
    endless = make_tokenizer(CHATML)
    endless.eos_token = None
    refuse(
        lambda: Encoder(endless).encode([Row(text="x", where="rows.jsonl:9")]),
        "rows.jsonl:9",
        "eos_token",
        "set eos_token",
    )
    refuse(lambda: load_tokenizer(tmp_path / "nowhere"), "nowhere does not exist", "give the path")
    refuse(lambda: load_tokenizer(tmp_path), "holds no tokenizer", "copy it there")
    (tmp_path / "tokenizer.json").write_text("{broken")
    refuse(lambda: load_tokenizer(tmp_path), "does not load", "copy the model's tokenizer files again")


def test_wrong_offsets_are_refused(chatml):
    """Offsets that decrease, end early, or put a special token elsewhere (a bug that tokenizers had) are errors."""
    encoder = Encoder(chatml)
    good = encoder._tokenize

    def broken(change: Callable[[Any], Any]) -> Callable[[list[str]], Any]:
        return lambda texts: [(tokens, change(offsets.copy())) for tokens, offsets in good(texts)]

    for change in (
        lambda o: o[::-1],
        lambda o: o // 2,
        lambda o: np.maximum(o - 1, 0),
        lambda o: np.stack([o[:, 0]] * 2, 1),
    ):
        encoder._tokenize = broken(change)  # type: ignore[method-assign]
        refuse(lambda: encoder.encode([row(TALK)]), "rows.jsonl:7", "offsets do not follow the text", "update")


def test_load_tokenizer_round_trip(chatml, tmp_path):
    """A saved tokenizer is loaded with its template and encodes as before."""
    chatml.save_pretrained(tmp_path)
    (a,), (b,) = (Encoder(tokenizer).encode([row(TALK)]) for tokenizer in (chatml, load_tokenizer(tmp_path)))
    assert np.array_equal(a.tokens, b.tokens)
    assert np.array_equal(a.trained, b.trained)


def _trained(tokenizer: Any, template: str, *turns: tuple[str, str], **settings: Any) -> tuple[str, str]:
    """The text and the trained text of a conversation."""
    tokenizer.chat_template = template
    (example,) = Encoder(tokenizer, **settings).encode([row(turns)])
    return tokenizer.decode(example.tokens), tokenizer.decode(example.tokens[example.trained])


def test_an_empty_system_turn_is_rendered_as_transformers_renders_it(make_tokenizer):
    """An empty system turn keeps a template from adding its own system text. For a template that raises at any system turn, the rest is
    rendered."""
    persona = "{% if messages[0].role != 'system' %}<|im_start|>system\nPERSONA<|im_end|>\n{% endif %}" + CHATML
    turns = ("system", ""), ("user", "Hi"), ("assistant", "Yes")
    tokenizer = make_tokenizer(persona, *SPECIAL)
    text, trained = _trained(tokenizer, persona, *turns)
    messages = [{"role": role, "content": content} for role, content in turns]
    assert text == tokenizer.apply_chat_template(messages, tokenize=False)
    assert text.startswith("<|im_start|>system\n<|im_end|>\n") and trained == "Yes<|im_end|>\n"
    assert _trained(tokenizer, MISTRAL, *turns) == ("<s>[INST] Hi [/INST] Yes</s>", " Yes</s>")


LOST_SYSTEM = {
    "no system role": "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "only when asked": "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ messages[0].content + ' ' if loop.last }}{{ m.content }}"
    " [/INST]{% elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}{% endfor %}",
    "the beginning of it": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content[:6] if loop.first else m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}


@pytest.mark.parametrize("case", LOST_SYSTEM)
@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_a_row_whose_system_text_vanishes_is_refused(make_tokenizer, case, loss_on):
    """Also where its words happen to occur in another turn, and where every token is trained."""
    turns = ("system", "Answer in verse."), ("user", "Answer in verse. Hi"), ("assistant", "Yes")
    tokenizer = make_tokenizer(LOST_SYSTEM[case], *SPECIAL)
    refuse(
        lambda: _trained(tokenizer, LOST_SYSTEM[case], *turns, loss_on=loss_on),
        "rows.jsonl:7",
        "does not render the system text of turn 1 whole ('Answer in verse.'",
        "put it into the first user turn",
    )


def test_texts_that_a_template_writes_otherwise_are_found(make_tokenizer):
    """As JSON, with other white space, before the last question, without an earlier reply's reasoning, in a template that reads contents;
    with and without marks, no part of a text is missing."""
    turns = (
        ("system", 'Say "é"\nonly'),
        ("user", " a  b\n"),
        ("assistant", "<think>\nsum\n</think>\n\nc"),
        ("user", "d"),
        ("assistant", "e"),
    )
    end = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    loop = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    templates = {
        loop
        + "{{ m.content | tojson if m.role == 'system' else m.content }}<|im_end|>\n{% endfor %}"
        + end: '"Say \\"é\\"\\nonly"',
        loop
        + "{{ m.content.split() | join(' ') if m.role == 'user' else m.content }}<|im_end|>\n{% endfor %}"
        + end: "user\na b<",
        loop + "{{ m.content.split('</think>')[-1] | trim }}<|im_end|>\n{% endfor %}" + end: "assistant\nc<|im_end|>",
        loop
        + "{% if m.content.startswith(' a') %}# {% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        + end: "user\n#  a  b",
    }
    tokenizer = make_tokenizer(None, *SPECIAL)
    for template, written in templates.items():
        text, trained = _trained(tokenizer, template, *turns, loss_on="last")
        assert written in text and trained == "e<|im_end|>\n"


@pytest.mark.parametrize(
    ("loop", "header", "end"),
    [
        ("<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", "<|im_start|>assistant\n{{ '' }}", "<|im_end|>\n"),
        ("### {{ m.role }}:\n{{ m.content }}</s>\n\n", "### assistant:\n{{ '' }}", "</s>\n\n"),
        ("{{ m.role }}: {{ m.content }}</s>", "assistant: ", "</s>"),
    ],
)
def test_a_header_that_a_template_always_ends_with_is_not_trained(make_tokenizer, loop, header, end):
    """The template ignores add_generation_prompt. The text after the last reply is the header of the next turn, and so is the text between
    turns."""
    template = "{% for m in messages %}" + loop + "{% endfor %}" + header
    _, trained = _trained(make_tokenizer(template, *SPECIAL), template, *TALK)
    assert trained == f" Yes\n{end}Yes{end}"


def test_a_byte_order_mark_is_no_part_of_a_template(make_tokenizer, tmp_path):
    """A byte order mark is dropped from a template file and from the tokenizer's template; exports do not have it."""
    (tmp_path / "t.jinja").write_bytes(b"\xef\xbb\xbf" + CHATML.encode())
    tokenizer = make_tokenizer("\ufeff" + CHATML, *SPECIAL)
    for settings in ({"chat_template": str(tmp_path / "t.jinja")}, {}):
        encoder = Encoder(tokenizer, **settings)
        (example,) = encoder.encode([row((("user", "Hi"), ("assistant", "Yes")))])
        assert tokenizer.decode(example.tokens).startswith("<|im_start|>user\nHi")
        assert encoder.new_template == CHATML
