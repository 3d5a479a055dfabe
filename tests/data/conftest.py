"""A tokenizer made on the spot, and files of rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Who are you? I am an assistant, made to help you.",
    "def add(a, b):\n    return a + b\n\nassistant user system Hello there, how are you today?\n",
    "<think>\nLet me think about this.\n</think>\n\nThe answer is four.  Two  spaces, and\ttabs.\n\n\n",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """make_tokenizer(template, *special): a byte-level BPE of a few hundred merges, with `special` as single tokens."""

    def make(template: str | None = None, *special: str, eos: str = "</s>") -> PreTrainedTokenizerFast:
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        raw.train_from_iterator(
            CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
        )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token=eos, pad_token=eos)
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def chatml(make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer with the chatml template, whose pad token is its end-of-turn token."""
    return make_tokenizer(CHATML, "<|im_start|>", "<|im_end|>", eos="<|im_end|>")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """write(*rows, name=…): a JSONL file of rows (objects, or lines as they are); returns its path."""

    def make(*rows: Any, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n" if lines else "", encoding="utf-8")
        return str(path)

    return make
