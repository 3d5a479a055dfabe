"""Prompts for comparisons: lines of text, or rows read as training reads them; and the only reader of users' text files."""

from pathlib import Path

import pytest

from swift_mega.data.chat import Encoder
from swift_mega.data.formats import Row, Turn
from swift_mega.data.prompts import prompt_rows
from swift_mega.errors import UserError
from swift_mega.text_files import lines, read_text


def test_a_data_set_is_read_as_training_reads_it(chatml, write):
    """The encoder's tokens for a conversation with a reply and for a document; transformers' prompt where the reply is missing."""
    talk = {"query": "a\u2028b", "response": "c", "system": ""}
    path = write(talk, {"messages": [{"role": "user", "content": "d"}]}, {"text": "e f"})
    found = prompt_rows(path, chatml)
    assert [where for where, _ in found] == [f"{path}:{number}" for number in (1, 2, 3)]
    turns = Turn(role="system", content=""), Turn(role="user", content="a\u2028b"), Turn(role="assistant", content="c")
    whole, document = Encoder(chatml).encode([Row(turns=turns, where=""), Row(text="e f", where="")])
    asked = chatml.apply_chat_template([{"role": "user", "content": "d"}], add_generation_prompt=True)["input_ids"]
    assert [tokens for _, tokens in found] == [whole.tokens.tolist(), asked, document.tokens.tolist()]


def test_lines_of_text_end_at_line_feeds_only(chatml, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n \n" + "t\u2028wo\x0c\n".encode())
    assert [chatml.decode(tokens) for _, tokens in prompt_rows(str(path), chatml)] == ["one", "t\u2028wo\x0c"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [{"role": "user", "content": None}]}, "turn 1 (user) is empty"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "unknown role 'narrator'"),
        ({"query": "a", "history": 5}, "history is a number (5)"),
        ({"query": 3}, "query is a number (3)"),
        ({"messages": []}, "column 'messages' is empty (a list ([]))"),
        ({"messages": [{"role": "system", "content": "x"}]}, "there is no question in it"),
    ],
)
def test_a_row_that_training_would_refuse_is_refused(chatml, write, row, said):
    with pytest.raises(UserError) as caught:
        prompt_rows(write(row), chatml)
    assert said in str(caught.value) and "rows.jsonl:1" in str(caught.value)


def test_conversations_need_a_template(make_tokenizer, write):
    with pytest.raises(
        UserError, match=r"rows\.jsonl:1: a conversation, and the tokenizer has no chat template; give a text file"
    ):
        prompt_rows(write({"query": "a"}), make_tokenizer(None))


def test_one_reader_of_text(tmp_path: Path):
    """A byte order mark is dropped, line ends stay. A file that cannot be read is one error, which begins with the file's role."""
    file = tmp_path / "a"
    file.write_bytes(b"\xef\xbb\xbfx\r\ny")
    assert read_text(file, what="it") == "x\r\ny"
    assert lines("x\r\ny\u2028z\n") == ["x", "y\u2028z"]
    assert lines("") == []
    file.write_bytes(b"x\xff")
    for path, said in ((file, "byte 1"), (tmp_path / "none", "does not exist"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=f"^--prompts=it.*{said}"):
            read_text(path, what="--prompts=it")
