"""The tiny model that benchmarks and scripts take under --smoke: a random Llama with a chat tokenizer, as the tests have it."""

import sys
from pathlib import Path


def smoke_model(folder: Path) -> Path:
    """Writes it to `folder`/model: two layers, a few hundred tokens, 512 positions."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    import tiny

    return tiny.make_chat(folder / "model", "llama", num_hidden_layers=2, max_position_embeddings=512)
