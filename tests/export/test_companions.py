"""Chat templates and stop tokens beside the weights, as transformers reads them back."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig

from swift_mega.errors import UserError
from swift_mega.export.companions import Trained, of_adapter, stop_tokens
from tiny import CHATML, tokenizer

MINE = "{% for m in messages %}[{{ m.role }}]\r\n{{ m.content }} é{% endfor %}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with config.json and a tokenizer, without weights."""
    LlamaConfig(eos_token_id=5, bos_token_id=4, pad_token_id=None).save_pretrained(tmp_path / "model")
    tokenizer(CHATML, "<|im_start|>", "<|im_end|>").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def _edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **fields}))


def _template(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder).chat_template


def test_the_template_is_what_transformers_reads(model: Path) -> None:
    """Exactly the trained template, whichever file had the older one; a template of another name stays beside it."""
    Trained(chat_template=MINE).write(model)
    assert (model / "chat_template.jinja").read_bytes() == MINE.encode()
    assert _template(model) == MINE.replace("\r\n", "\n")  # Jinja reads both line ends as one
    (model / "chat_template.jinja").unlink()
    older = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "TOOLS"}]
    _edit(model / "tokenizer_config.json", chat_template=older)
    _edit(model / "chat_template.json", chat_template=CHATML)
    assert _template(model) == {"default": CHATML, "tool_use": "TOOLS"}
    Trained(chat_template="MINE").write(model)
    assert _template(model) == {"default": "MINE", "tool_use": "TOOLS"}
    assert "chat_template" not in json.loads((model / "tokenizer_config.json").read_text())
    assert not (model / "chat_template.json").exists()


@pytest.mark.parametrize(
    ("before", "trained", "after"),
    [
        ({"eos_token_id": 7, "temperature": 0.5}, (9, 9), [7, 9]),
        ({"eos_token_id": [7, 9]}, (9, 3), [7, 9, 3]),
        ({"temperature": 0.5}, (9,), 9),
        (None, (9,), [5, 9]),
        (None, (5,), 5),
    ],
)
def test_stop_tokens_are_added_to_those_there_were(model: Path, before: Any, trained: Any, after: Any) -> None:
    """Oracle: GenerationConfig, which transformers makes from config.json where the file is missing."""
    if before is not None:
        _edit(model / "generation_config.json", **before)
    Trained(end_tokens=trained).write(model)
    if (model / "generation_config.json").exists():
        found = GenerationConfig.from_pretrained(model)
        assert found.temperature == (before or {}).get("temperature")
    else:
        found = GenerationConfig.from_model_config(LlamaConfig.from_pretrained(model))
    assert found.eos_token_id == after
    assert found.bos_token_id == (4 if before is None else None)
    assert list(stop_tokens(model)) == (after if isinstance(after, list) else [after])


def test_an_adapter_carries_both(model: Path, tmp_path: Path) -> None:
    """Also for an adapter by another trainer: the template in its tokenizer_config.json."""
    adapter, theirs = tmp_path / "adapter", tmp_path / "theirs"
    adapter.mkdir(), theirs.mkdir()
    Trained(chat_template=MINE, end_tokens=(9,)).write_beside_adapter(adapter, model)
    assert of_adapter(adapter) == Trained(chat_template=MINE, end_tokens=(5, 9))
    assert sorted(path.name for path in adapter.iterdir()) == ["chat_template.jinja", "generation_config.json"]
    assert of_adapter(theirs) == Trained()
    _edit(theirs / "tokenizer_config.json", chat_template=MINE)
    assert of_adapter(theirs) == Trained(chat_template=MINE)


@pytest.mark.parametrize("content", ["[1]", "{", '{"eos_token_id": "</s>"}', '{"eos_token_id": [true]}'])
def test_a_damaged_generation_config_is_named(model: Path, content: str) -> None:
    """One error that names the file."""
    (model / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=r"generation_config\.json"):
        stop_tokens(model)
