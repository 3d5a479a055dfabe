"""The tiny model for --smoke of benchmarks and scripts: the random Llama with a chat tokenizer that the tests use."""

import sys
from pathlib import Path


def smoke_model(folder: Path) -> Path:
    """Writes the model to `folder`/model and returns this path: two layers, a vocabulary of a few hundred tokens, 512 positions."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    import tiny

    return tiny.make_chat(folder / "model", "llama", num_hidden_layers=2, max_position_embeddings=512)
