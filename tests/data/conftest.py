"""A small tokenizer, trained in the test, and files of rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import tiny

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """make_tokenizer(template, *special): a byte-level BPE of a few hundred merges, with each of `special` as a single token."""

    return tiny.tokenizer


@pytest.fixture(scope="session")
def chatml(make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer with the chatml template, whose pad token is its end-of-turn token."""
    return make_tokenizer(tiny.CHATML, "<|im_start|>", "<|im_end|>", eos="<|im_end|>")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """write(*rows, name=…): a JSONL file of rows (objects, or lines as they are); returns its path."""

    def make(*rows: Any, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n" if lines else "", encoding="utf-8")
        return str(path)

    return make
