"""Every form of row, every way to name a data set, and every input that is refused."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from swift_mega.config.schema import Data
from swift_mega.data.formats import Row, to_row
from swift_mega.data.sources import Rows, load
from swift_mega.errors import UserError

HELLO = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
U, A, S = "user", "assistant", "system"


def talk(row: Row) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in row.turns]


def numbered(rows: list[Row]) -> list[int]:
    return [int(row.turns[0].content) for row in rows]


def count_rows(number: int) -> list[dict[str, str]]:
    return [{"query": str(index), "response": "r"} for index in range(number)]


SHAPES: list[tuple[dict[str, Any], list[tuple[str, str]]]] = [
    (HELLO, [(U, "Hi"), (A, "Hello")]),
    ({**HELLO, "system": "Be brief"}, [(S, "Be brief"), (U, "Hi"), (A, "Hello")]),
    ({"messages": [{"role": S, "content": " "}, *HELLO["messages"]]}, [(S, " "), (U, "Hi"), (A, "Hello")]),
    ({**HELLO, "system": ""}, [(S, ""), (U, "Hi"), (A, "Hello")]),
    ({"messages": [{"role": S, "content": "s"}, *HELLO["messages"]], "system": ""}, [(S, "s"), (U, "Hi"), (A, "Hello")]),
    ({"messages": [{"role": U, "content": [{"type": "text", "text": "Hi"}]}, HELLO["messages"][1]]}, [(U, "Hi"), (A, "Hello")]),
    ({"query": "q", "response": "r"}, [(U, "q"), (A, "r")]),
    ({"prompt": "q", "completion": "r", "system": None}, [(U, "q"), (A, "r")]),
    ({"query": "q", "response": "r", "history": [["a", "b"], ["c", "d"]], "system": "s"},
     [(S, "s"), (U, "a"), (A, "b"), (U, "c"), (A, "d"), (U, "q"), (A, "r")]),
    ({"instruction": "Add", "input": "1+1", "output": "2"}, [(U, "Add\n1+1"), (A, "2")]),
    ({"instruction": "Add", "input": "", "output": "2", "history": []}, [(U, "Add"), (A, "2")]),
    ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
     [(S, "s"), (U, "x"), (A, "y")]),
    ({"conversation": [{"human": "x", "assistant": "y"}, {"human": "z", "assistant": "w"}], "system": "s"},
     [(S, "s"), (U, "x"), (A, "y"), (U, "z"), (A, "w")]),
    ({"conversations": HELLO["messages"]}, [(U, "Hi"), (A, "Hello")]),
]  # fmt: skip


@pytest.mark.parametrize(("record", "expected"), SHAPES)
def test_shapes(record, expected):
    """All of SWIFT's forms become the same turns, and no column counts as unused."""
    ignored: Counter[str] = Counter()
    assert talk(to_row(record, where="f:1", ignored=ignored)) == expected
    assert not ignored


def test_plain_text_and_loss_and_unused_columns():
    """A text row and SWIFT's single assistant turn are documents. loss is kept. Columns without a use are counted."""
    ignored: Counter[str] = Counter()
    assert to_row({"text": "abc", "id": 3}, where="f:1", ignored=ignored).text == "abc"
    assert to_row({"messages": [{"role": A, "content": "abc"}]}, where="f:1", ignored=ignored).text == "abc"
    turns = [{"role": U, "content": "q", "time": 1}, {"role": A, "content": "r", "loss": False}]
    row = to_row({"messages": turns, "prompt": "q", "id": 4, "images": []}, where="f:1", ignored=ignored)
    assert [turn.loss for turn in row.turns] == [None, False]
    assert ignored == {"id": 2, "prompt": 1, "messages[].time": 1}


def test_files_are_joined_in_order(write):
    """Several files of different form, one of them a .json list with a byte order mark."""
    first = write(*count_rows(2), name="a.jsonl")
    second = write("\ufeff" + json.dumps([{"query": "2", "response": "r\u2028s"}]), name="b.json")
    rows = load(Data(dataset=(first, second)))
    assert numbered(rows.train) == [0, 1, 2]
    assert rows.train[2].turns[1].content == "r\u2028s"
    assert [row.where for row in rows.train] == [f"{first}:1", f"{first}:2", f"{second}[0]"]


def test_number_of_rows(write):
    """path#N samples in file order. Where N is larger than the file, it repeats the whole file and samples the rest, as SWIFT does."""
    path = write(*count_rows(10))
    some = numbered(load(Data(dataset=(f"{path}#4",))).train)
    assert len(set(some)) == 4
    assert some == sorted(some)
    assert some == numbered(load(Data(dataset=(f"{path}#4",))).train)
    assert some != numbered(load(Data(dataset=(f"{path}#4",), seed=1)).train)
    many = Counter(numbered(load(Data(dataset=(f"{path}#23",))).train))
    assert sorted(many.values()) == [2] * 7 + [3] * 3


def test_a_file_whose_name_holds_a_hash(write):
    """An existing path is used as it is."""
    assert len(load(Data(dataset=(write(*count_rows(3), name="part#2.jsonl"),))).train) == 3


@pytest.mark.parametrize("wanted", ["", "#7", "#40"])
def test_validation_split(write, wanted):
    """The split is disjoint even where rows repeat, has the requested share, and is the same every time."""
    path = write(*count_rows(20))
    settings = Data(dataset=(path + wanted,), split_dataset_ratio=0.25)
    rows = load(settings)
    train, held = numbered(rows.train), numbered(rows.validation)
    total = int(wanted[1:] or 20)
    assert len(train) + len(held) == total
    assert len(held) == round(min(total, 20) * 0.25)
    assert not set(train) & set(held)
    assert rows == load(settings)


def test_validation_files(write):
    """All val_dataset rows are validation rows."""
    rows = load(Data(dataset=(write(*count_rows(3)),), val_dataset=(write(*count_rows(2), name="v.jsonl"),)))
    assert (len(rows.train), numbered(rows.validation)) == (3, [0, 1])


def test_columns(write):
    """data.columns renames, also swaps, and renamed columns do not count as unused."""
    path = write({"ask": "q", "reply": "r", "query": None})
    rows = load(Data(dataset=(path,), columns={"ask": "instruction", "reply": "output"}))
    assert talk(rows.train[0]) == [(U, "q"), (A, "r")]
    assert rows.ignored == {}
    swapped = load(
        Data(dataset=(write({"query": "r", "response": "q"}),), columns={"query": "response", "response": "query"})
    )
    assert talk(swapped.train[0]) == [(U, "q"), (A, "r")]


LETTERS = {"query": "2+2?", "response": "B", "gold": "A"}


@pytest.mark.parametrize(
    "columns", [{"gold": "response", "response": "text"}, {"response": "text", "gold": "response"}]
)
def test_a_column_in_the_place_of_another(write, columns):
    """Equal short strings are one object in Python: the contents of a row must not decide what is renamed, nor may the order of the
    mapping."""
    equal = {"query": "3+3?", "response": "A", "gold": "A"}
    rows = load(Data(dataset=(write(LETTERS, equal),), columns=columns))
    assert [talk(row) for row in rows.train] == [[(U, "2+2?"), (A, "A")], [(U, "3+3?"), (A, "A")]]
    assert rows.ignored == {"text": 2}
    moved = {name: {"text": "system"}.get(target, target) for name, target in columns.items()}
    rows = load(Data(dataset=(write(LETTERS, equal),), columns=moved)).train
    assert [talk(row) for row in rows] == [[(S, "B"), (U, "2+2?"), (A, "A")], [(S, "A"), (U, "3+3?"), (A, "A")]]


DEEP = "[" * 20_000 + "]" * 20_000
ODD_VALUES = {
    "digits": "7" * 5_000,
    "minus": "-" + "7" * 5_000,
    "exponent": "1e999",
    "brackets": json.dumps("[" * 20_000),
}


@pytest.mark.parametrize("value", ODD_VALUES.values(), ids=ODD_VALUES)
def test_an_unused_column_may_hold_anything(write, value):
    """Numbers too large for Python, and brackets without nesting."""
    rows = load(Data(dataset=(write(f'{{"query": "q", "response": "r", "id": {value}}}'),)))
    assert talk(rows.train[0]) == [(U, "q"), (A, "r")] and rows.ignored == {"id": 1}


@pytest.mark.parametrize(
    "value", [DEEP, "[" * 20_000, '{"a":' * 20_000 + "1" + "}" * 20_000, "[" * 900 + "]" * 900, "{" * 20_000]
)
def test_a_row_nested_beyond_the_stack(write, value):
    with pytest.raises(
        UserError, match=r"rows.jsonl:1: not (read as|valid) JSON.*write one complete JSON object per line"
    ):
        load(Data(dataset=(write(f'{{"query": "q", "response": "r", "id": {value}}}'),)))


ENTRIES = [
    ({"file_name": 3}, "has no file_name"), ({"file_name": ""}, "has no file_name"), (3, "has no file_name"),
    ({"file_name": "rows.jsonl", "columns": 3}, "columns is a number"),
    ({"file_name": "rows.jsonl", "columns": {"prompt": ["q"]}}, "'prompt' is a list"),
    ({"file_name": "rows.jsonl", "tags": [1]}, "tags is a list"),
    ({"file_name": "rows.jsonl", "tags": {"role_tag": 1}}, "'role_tag' is a number"),
    ({"file_name": "rows.jsonl", "num_samples": "4"}, "num_samples is a string"),
    ({"file_name": "rows.jsonl", "num_samples": 0}, "num_samples is a number"),
    ({"file_name": "rows.jsonl", "formatting": {}}, "formatting {} is unknown"),
    ({"file_name": "rows.jsonl", "ranking": True}, "preference data"),
]  # fmt: skip


@pytest.mark.parametrize("entry, said", ENTRIES)
def test_a_bad_entry_is_in_nobody_elses_way(write, entry, said):
    """In LLaMA-Factory's object and in SWIFT's list: other entries are read; the bad entry raises its error only when it is used."""
    write({"query": "q", "response": "r"})
    info = write(json.dumps({"bad": entry, "good": {"file_name": "rows.jsonl"}}), name="i.json")
    assert len(load(Data(dataset=("good",), dataset_info=info)).train) == 1
    with pytest.raises(UserError, match=re.escape(said)):
        load(Data(dataset=("bad",), dataset_info=info))
    if isinstance(entry, dict):
        entry = {"dataset_path" if key == "file_name" else key: value for key, value in entry.items()}
    info = write(json.dumps([entry, 3, None, {"dataset_path": "rows.jsonl", "dataset_name": "good"}]), name="i.json")
    assert len(load(Data(dataset=("good",), dataset_info=info)).train) == 1


def test_two_columns_for_one(write):
    """Two columns for one name are an error and never lost silently: by one mapping, also with that of dataset_info, by a synonym, or by
    an existing column."""
    row = {"title": "The title", "body": "The body", "answer": "yes"}
    path = write(row)
    for order in (("title", "body"), ("body", "title")):
        with pytest.raises(
            UserError, match=f"maps '{order[0]}' and '{order[1]}' both to 'query'.*map one of them elsewhere"
        ):
            load(Data(dataset=(path,), columns=dict.fromkeys(order, "query")))
    with pytest.raises(UserError, match="maps 'body' to 'prompt', which is not used beside the row's other columns"):
        load(Data(dataset=(path,), columns={"title": "query", "body": "prompt"}))
    with pytest.raises(UserError, match="maps 'title' to 'response', which is not used"):
        load(Data(dataset=(write({**row, "messages": HELLO["messages"]}),), columns={"title": "response"}))
    info = write(
        json.dumps([{"dataset_path": "rows.jsonl", "dataset_name": "one", "columns": {"title": "query"}}]),
        name="i.json",
    )
    with pytest.raises(UserError, match="maps 'title' and 'body' both to 'query'"):
        load(Data(dataset=("one",), dataset_info=info, columns={"body": "query"}))
    info = write(
        json.dumps({"one": {"file_name": "rows.jsonl", "columns": {"prompt": "title", "query": "title"}}}),
        name="i.json",
    )
    with pytest.raises(UserError, match="column 'title' is named for two of ours, 'instruction' and 'input'"):
        load(Data(dataset=("one",), dataset_info=info))


def test_a_file_named_twice_is_split_once(write, tmp_path):
    """By path, with numbers of rows, by two names of dataset_info, by links: no row is in both splits, and each is validated once."""
    path = Path(write(*count_rows(10), name="ten.jsonl"))
    (tmp_path / "soft.jsonl").symlink_to(path)
    (tmp_path / "hard.jsonl").hardlink_to(path)
    info = write(json.dumps({"one": {"file_name": "ten.jsonl"}, "two": {"file_name": "soft.jsonl"}}), name="info.json")
    other = f"{tmp_path}/./ten.jsonl"
    for given in (
        [path, path], [f"{path}#20", path], [f"{path}#3", f"{path}#4"], [f"{path}#1", path], [path, tmp_path / "soft.jsonl"],
        [tmp_path / "hard.jsonl", path], [other, path, f"{path}#25"], ["one", "two"], ["one#3", "two#30"], [path, "two"],
    ):  # fmt: skip
        rows = load(Data(dataset=tuple(map(str, given)), split_dataset_ratio=0.3, dataset_info=info))
        train, held = numbered(rows.train), numbered(rows.validation)
        assert train and held and not set(train) & set(held), given
        assert len(held) == len(set(held)), given
    assert len(load(Data(dataset=(str(path), str(path)), split_dataset_ratio=0.3)).train) == 14


def test_a_file_read_in_two_ways_is_split_once(write):
    """Two data sets with different columns of one file: the same records are validation in both."""
    path = write(*({"a": str(n), "b": str(n + 100), "r": "x"} for n in range(10)))
    names = {name: {"file_name": path, "columns": {"prompt": name, "response": "r"}} for name in "ab"}
    rows = load(Data(dataset=("a", "b"), dataset_info=write(json.dumps(names), name="i.json"), split_dataset_ratio=0.3))
    train, held = ({n % 100 for n in numbered(side)} for side in (rows.train, rows.validation))
    assert (len(rows.validation), len(held)) == (6, 3) and not train & held


def test_validating_on_the_training_file_is_refused(write):
    """Under any name of the file."""
    path = write(*count_rows(3))
    for name in (path, f"{path}#2", path.replace("rows.jsonl", "./rows.jsonl")):
        with pytest.raises(UserError, match=r"is the file of data.dataset=.*trained and validated on; name another"):
            load(Data(dataset=(path,), val_dataset=(name,)))


def test_placeholders_and_default_system(write):
    """Names are filled into conversations, system turns included; documents are not changed."""
    path = write(
        {"query": "Who?", "response": "{{NAME}} by {{AUTHOR}}, {{NAME}}", "system": "You are {{NAME}}"},
        HELLO,
        {"text": "{{NAME}}"},
    )
    rows = load(Data(dataset=(path,), model_name="Mega", model_author="us", system="Be brief")).train
    assert talk(rows[0]) == [(S, "You are Mega"), (U, "Who?"), (A, "Mega by us, Mega")]
    assert talk(rows[1])[0] == (S, "Be brief")
    assert rows[2].text == "{{NAME}}"


def test_dataset_info_of_llama_factory(write):
    """Names, columns, tags and num_samples of LLaMA-Factory's file; paths are relative to it; entries for the hub are ignored."""
    write({"q": "a", "i": "b", "r": "c"}, {"q": "d", "i": "", "r": "e"}, name="one.jsonl")
    write({"talk": [{"who": "me", "says": "x"}, {"who": "it", "says": "y"}], "sys": "s"}, name="two.jsonl")
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "me", "assistant_tag": "it"}
    info = {
        "one": {"file_name": "one.jsonl", "columns": {"prompt": "q", "query": "i", "response": "r", "history": None}},
        "few": {"file_name": "one.jsonl", "columns": {"prompt": "q", "query": "i", "response": "r"}, "num_samples": 1},
        "two": {
            "file_name": "two.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "talk", "system": "sys"},
            "tags": tags,
        },
        "far": {"hf_hub_url": "someone/something"},
    }
    path = write(json.dumps(info), name="dataset_info.json")

    def rows(*names: str) -> Rows:
        return load(Data(dataset=names, dataset_info=path))

    assert [talk(row) for row in rows("one").train] == [[(U, "a\nb"), (A, "c")], [(U, "d"), (A, "e")]]
    assert len(rows("few").train) == 1
    assert len(rows("few#5").train) == 5
    assert [talk(row) for row in rows("two").train] == [[(S, "s"), (U, "x"), (A, "y")]]
    assert len(rows("one", "two", "one#1").train) == 4


def test_dataset_info_of_swift(write):
    """SWIFT's list: dataset_path, an optional dataset_name, columns in SWIFT's direction."""
    write({"q": "a", "r": "c"}, name="one.jsonl")
    path = write(
        json.dumps(
            [
                {"dataset_path": "one.jsonl", "columns": {"q": "query", "r": "response"}},
                {"dataset_path": "one.jsonl", "dataset_name": "same", "columns": {"q": "query", "r": "response"}},
            ]
        ),
        name="info.json",
    )
    rows = load(Data(dataset=("one", "same"), dataset_info=path))
    assert [talk(row) for row in rows.train] == [[(U, "a"), (A, "c")]] * 2


def turns(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


BAD_ROWS: dict[str, tuple[Any, str, str]] = {
    # the row (or line), what the message says is wrong, what it says to do
    "not json": ('{"query": "a", "response": ', "not valid JSON at character", "one complete JSON object per line"),
    "two in a line": ('{"text": "a"} {"text": "b"}', "Extra data", "one complete JSON object per line"),
    "a number": ("17", "a row is a number (17)", "write a JSON object"),
    "a key twice": ('{"query": "a", "query": "b", "response": "c"}', "'query' occurs twice", "remove the other"),
    "no known column": ({"foo": "a", "bar": "b"}, "no known column among ['bar', 'foo']", "data.columns"),
    "empty object": ({}, "no known column among none", "messages"),
    "all empty": ({"query": "", "response": None}, "column 'query' is empty (a string (''))", "fill it in"),
    "no turns": ({"messages": []}, "column 'messages' is empty (a list ([]))", "or remove the row"),
    "null for a reply": ({"query": "a", "response": None}, "column 'response' is empty (null (None))", "fill it in"),
    "nothing asked": ({"query": "", "response": "a"}, "column 'query' is empty (a string (''))", "or remove the row"),
    "no reply": ({"query": "a"}, "'query' has no reply", "data.columns"),
    "no output": ({"instruction": "a", "input": "b"}, "'instruction' has no reply", "add one of response, output"),
    "no question": ({"response": "a"}, "'response' has no question", '{"text": …}'),
    "empty reply": ({"query": "a", "response": "  "}, "turn 2 (assistant) is empty", "remove the row"),
    "empty question": (turns((U, ""), (A, "r")), "turn 1 (user) is empty", "fill it in"),
    "starts with a reply": (turns((A, "r"), (U, "q"), (A, "r")), "turn 1 is assistant where user is expected", "in alternation"),
    "two questions": (turns((U, "q"), (U, "q"), (A, "r")), "turn 2 is user where assistant is expected", "in alternation"),
    "late system": (turns((U, "q"), (A, "r"), (S, "s"), (A, "r")), "turn 3 is system where user is expected", "system (optional)"),
    "ends with a question": (turns((U, "q"), (A, "r"), (U, "q")), "ends with user", "end it with an assistant turn"),
    "system alone": (turns((S, "s")), "ends with system", "end it with an assistant turn"),
    "system twice": ({**turns((S, "s"), (U, "q"), (A, "r")), "system": "t"}, "both a system column and", "keep one"),
    "unknown role": (turns(("User", "q"), (A, "r")), "turn 1: unknown role 'User'", "known are system, user"),
    "tool role": (turns((U, "q"), ("tool", "x"), (A, "r")), "role 'tool' is tool use", "remove such rows"),
    "role is a number": (turns((3, "q"), (A, "r")), "unknown role 3", "known are"),
    "content is a number": (turns((U, 3), (A, "r")), "turn 1 is a number (3)", "write a string"),
    "half a character": (r'{"query": "a\ud83d", "response": "r"}', "half a surrogate pair", "write the whole character"),
    "content of parts": (turns((U, [{"type": "image"}]), (A, "r")), "turn 1 is a list", "not supported yet"),
    "no content": ({"messages": [{"role": U}, {"role": A, "content": "r"}]}, "turn 1 has no 'content'", "every turn"),
    "turn is a string": ({"messages": ["q", "r"]}, "turn 1 is a string ('q')", "write an object"),
    "messages is a string": ({"messages": "q"}, "messages is a string", "write a list of turns"),
    "history is a string": ({"query": "q", "response": "r", "history": "a"}, "history is a string", "list of [question, reply]"),
    "history of three": ({"query": "q", "response": "r", "history": [["a", "b", "c"]]}, "history[0] is a list", "write a pair"),
    "loss on a question": ({"messages": [{"role": U, "content": "q", "loss": True}, {"role": A, "content": "r"}]},
                           "loss is set on a user turn", "assistant turns only"),
    "loss is a word": ({"messages": [{"role": U, "content": "q"}, {"role": A, "content": "r", "loss": "yes"}]},
                       "loss is 'yes'", "true or false"),
    "images": ({**HELLO, "images": ["a.png"]}, "'images' is multimodal data", "remove the column"),
    "tools": ({**HELLO, "tools": "[{}]"}, "'tools' is tool use", "remove the column"),
    "rejected": ({**HELLO, "rejected_response": "no"}, "'rejected_response' is preference data", "remove the column"),
    "label": ({**HELLO, "label": True}, "'label' is preference data", "remove the column"),
    "tool calls": ({"messages": [{"role": U, "content": "q"}, {"role": A, "content": "r", "tool_calls": [{}]}]},
                   "turn 2: 'tool_calls' is tool use", "remove it"),
    "loss_scale": ({"messages": [{"role": U, "content": "q"}, {"role": A, "content": "r", "loss_scale": 2.0}]},
                   "'loss_scale' is a weight per turn", "remove it"),
    "no name": ({"query": "q", "response": "I am {{NAME}}"}, "the row has {{NAME}}", "data.model_name is not set"),
    "no author": ({"query": "q", "response": "{{AUTHOR}}"}, "the row has {{AUTHOR}}", "data.model_author is not set"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(write, case):
    """One error that begins with file:line, and says what was found and what to do."""
    row, reason, remedy = BAD_ROWS[case]
    path = write(HELLO, row, HELLO)
    with pytest.raises(UserError) as caught:
        load(Data(dataset=(path,)))
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ")
    assert reason in message
    assert remedy in message
    assert "\n" not in message


def test_bad_files(write, tmp_path):
    """Files that are missing, empty, of another kind, not text, or have a gap."""

    def refuse(path: str, *parts: str, **settings: Any) -> None:
        with pytest.raises(UserError, match=".*".join(map(re.escape, parts))):
            load(Data(dataset=(path,), **settings))

    good = write(HELLO, name="good.jsonl")
    refuse(str(tmp_path / "goood.jsonl"), "goood.jsonl does not exist", "good.jsonl", "give the path")
    refuse(str(tmp_path), "is a directory (with good.jsonl)", "name the files")
    refuse(write(name="empty.jsonl"), "empty.jsonl is empty", "one JSON object per line")
    refuse(write("[]", name="none.json"), "has an empty list", "at least one row")
    refuse(write("[1]", name="one.json"), "one.json[0]: a row is a number", "JSON object")
    refuse(write("a,b", name="rows.csv"), "'.csv' are not read", "convert it to .jsonl")
    refuse(write(HELLO, "", HELLO, name="gap.jsonl"), "gap.jsonl:2: an empty line", "remove it")
    (tmp_path / "latin.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    refuse(str(tmp_path / "latin.jsonl"), "not UTF-8 text (byte 10)", "convert the file")
    with pytest.MonkeyPatch.context() as patch:  # root reads everything, so the refusal of the system is simulated
        patch.setattr(Path, "read_bytes", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        refuse(good, "good.jsonl cannot be read: Permission denied", "check its path and its permissions")
    refuse(f"{good}#0", "'0' is not a number of rows", "path#500")
    refuse(f"{good}#many", "'many' is not a number of rows", "path#500")
    refuse(good, "maps 'ask', which no row has", "messages", columns={"ask": "query"})
    refuse(
        good, "to 'question_text', which is not a known column", "choose among", columns={"messages": "question_text"}
    )
    both = write({"ask": "a", "query": "b", "response": "c"}, name="both.jsonl")
    refuse(both, "both.jsonl:1", "has a column 'query' already", "drop it", columns={"ask": "query"})
    refuse(good, "model_name='Mega' is set, but no row has {{NAME}}", "unset it", model_name="Mega")
    refuse(good, "split_dataset_ratio=1.5", "below 1", split_dataset_ratio=1.5)
    refuse(good, "of 1 rows leaves", "at least one of each", split_dataset_ratio=0.1)
    refuse(good, "are both set", "unset the other", split_dataset_ratio=0.5, val_dataset=(good,))
    with pytest.raises(UserError, match=r"data.dataset is empty.*name at least one"):
        load(Data())


BAD_INFO: dict[str, tuple[Any, str, str]] = {
    "not there": (None, "does not exist", "give the path"),
    "not json": ("{", "cannot be read as JSON", "correct the file"),
    "a number": (3, "contains a number", "write an object"),
    "unknown name": ({"other": {"file_name": "a.jsonl"}}, "'name' is neither a file nor a name", "knows other"),
    "hub only": ({"name": {"hf_hub_url": "a/b"}}, "'name' is neither a file nor a name", "knows none"),
    "no file": ({"name": {"columns": {}}}, "has no file_name", "write the path"),
    "unknown key": (
        {"name": {"file_name": "a.jsonl", "filename": "b"}},
        "not known: filename",
        "supported are file_name",
    ),
    "ranking": ({"name": {"file_name": "a.jsonl", "ranking": True}}, "preference data", "choose another"),
    "formatting": (
        {"name": {"file_name": "a.jsonl", "formatting": "openai"}},
        "formatting 'openai' is unknown",
        "sharegpt",
    ),
    "column": (
        {"name": {"file_name": "a.jsonl", "columns": {"images": "i"}}},
        "column 'images' is not supported",
        "known are",
    ),
    "tag": ({"name": {"file_name": "a.jsonl", "tags": {"speaker": "i"}}}, "tags speaker are unknown", "role_tag"),
    "swift": ([{"dataset_name": "name"}], "entry 0 has no dataset_path", "write the path"),
}


@pytest.mark.parametrize("case", BAD_INFO)
def test_bad_dataset_info(write, tmp_path, case):
    """Every invalid dataset_info.json stops the run with its reason and remedy."""
    content, reason, remedy = BAD_INFO[case]
    path = str(tmp_path / "info.json")
    if content is not None:
        path = write(content if isinstance(content, str) else json.dumps(content), name="info.json")
    with pytest.raises(UserError) as caught:
        load(Data(dataset=("name",), dataset_info=path))
    assert reason in str(caught.value)
    assert remedy in str(caught.value)
