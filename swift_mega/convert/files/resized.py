"""A model with more rows in embedding and output layer: a directory that holds its own config and tokenizer, the new rows, and the path of
the weights, of which nothing is copied. `open_checkpoint` reads it as a whole.

New rows are transformers' (resize_token_embeddings): drawn around the mean of the old ones with 1e-9 of their covariance, so that the new
words change the odds of the others as little as can be (https://nlp.stanford.edu/~johnhew/vocab-expansion.html); or that mean itself.
They are made once, from one seed, so no layout changes them.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.multivariate_normal import MultivariateNormal

from swift_mega.convert.check import FLOATS, carried_of
from swift_mega.convert.files.hf_files import Checkpoint, read_json
from swift_mega.convert.files.tensors import TensorSource
from swift_mega.errors import UserError
from swift_mega.models.family import Family
from swift_mega.models.settings import Settings

MARKER, ROWS = "resized.json", "new_rows"
EPSILON = 1e-9
SEED = 0
Kind = Literal["transformers", "mean"]


class Resized(TensorSource):
    """`stored` with the rows of `more` after those of the same names."""

    def __init__(self, directory: Path, stored: TensorSource, more: TensorSource | None) -> None:
        self.directory, self.stored, self.more = directory, stored, more
        self.entries = dict(stored.entries)
        for name, added in (more.entries if more else {}).items():
            old = stored.entries[name]
            self.entries[name] = replace(old, shape=(old.shape[0] + added.shape[0], *old.shape[1:]))

    def read_into(
        self, target: Tensor, name: str, axis: int | None = None, start: int = 0, stop: int | None = None
    ) -> None:
        """Fills `target` from both."""
        if self.more is None or name not in self.more.entries:
            self.stored.read_into(target, name, axis, start, stop)
            return
        old, whole = self.stored.entries[name].shape[0], self.entries[name].shape[0]
        if axis in (None, 0):
            stop = whole if stop is None else stop
            ends = (min(start, old), min(stop, old)), (max(start - old, 0), max(stop - old, 0))
            parts = [read.read(name, 0, *end) for read, end in zip((self.stored, self.more), ends, strict=True)]
        else:
            parts = [read.read(name, axis, start, stop) for read in (self.stored, self.more)]
        target.copy_(torch.cat(parts).view(target.shape))


def open_resized(directory: str | Path) -> TensorSource | None:
    """The checkpoint of a directory that `write_resized` made; None where it is another."""
    path = Path(directory)
    if not (path / MARKER).is_file():
        return None
    stored = Checkpoint(read_json(path / MARKER)["weights"])
    return Resized(path, stored, Checkpoint(path / ROWS) if (path / ROWS).is_dir() else None)


def weights_of(directory: str | Path) -> str:
    """Where the weights of a model lie: the directory itself, or the one that it was made of."""
    marker = Path(directory) / MARKER
    return str(read_json(marker)["weights"]) if marker.is_file() else str(directory)


def write_resized(
    view: Path, stored: TensorSource, family: Family, settings: Settings, vocab: int, *, kind: Kind
) -> None:
    """Makes of `view`, which has config and tokenizer of `stored`, the same model with `vocab` rows."""
    (view / MARKER).write_text(json.dumps({"weights": str(stored.directory.resolve())}))
    added = vocab - settings.shape.vocab
    if added <= 0:
        return
    rows = {name: new_rows(stored.read(name), added, kind) for name in _names(family, settings, stored)}
    if settings.tied and family.head in rows:
        rows[family.head] = rows[family.embedding].clone()
    (view / ROWS).mkdir()
    save_file(rows, view / ROWS / "model.safetensors", {"format": "pt"})
    path = view / "config.json"
    path.write_text(json.dumps({**read_json(path), "vocab_size": vocab}, indent=2) + "\n")


def _names(family: Family, settings: Settings, stored: TensorSource) -> list[str]:
    """Tensors with a row for each word: embedding, output layer and its bias, and their copies in layers of multi-token prediction."""
    ours = [part for rule in family.rules if rule.pack.padded for part in rule.parts]
    copies = [
        name for name in carried_of(settings, stored.entries) if name.endswith(("embed_tokens.weight", "head.weight"))
    ]
    found = [name for name in (*ours, *copies) if name in stored.entries]
    for name in found:
        if stored.entries[name].shape[0] != settings.shape.vocab or stored.entries[name].dtype not in FLOATS:
            raise UserError(
                f"{stored.directory}: {name} is {list(stored.entries[name].shape)} {stored.entries[name].dtype}, not a plain weight with "
                f"vocab_size={settings.shape.vocab} rows; use the config.json of this checkpoint"
            )
    return found


def new_rows(old: Tensor, count: int, kind: Kind) -> Tensor:
    """[count, …] of the dtype of `old` [vocabulary, …], as transformers computes them; float32 copies of `old` exist meanwhile."""
    if old.dim() == 1:
        mean = old.mean(dim=0, dtype=torch.float32)
        if kind == "mean":
            return mean.to(old.dtype).repeat(count)
        generator, deviation = torch.Generator().manual_seed(SEED), EPSILON * old.std(dim=0).float()
        return torch.empty(count, dtype=old.dtype).normal_(float(mean), float(deviation), generator=generator)
    wide = old.to(torch.float32)
    mean = torch.mean(wide, dim=0)
    if kind == "transformers":
        wide = wide - mean
        covariance = EPSILON * (wide.T @ wide / len(old))
        if constraints.positive_definite.check(covariance).all():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(SEED)
                return MultivariateNormal(mean, covariance_matrix=covariance).sample((count,)).to(old.dtype)
    return mean[None].repeat(count, 1).to(old.dtype)
