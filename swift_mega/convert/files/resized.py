"""A model with a larger vocabulary: more rows in embedding and output layer.

It is a directory with its own config and tokenizer, the new rows, and the path of the original weights, which are not copied.
`open_checkpoint` reads it as one model.

New rows are made as in transformers' resize_token_embeddings: either the mean of the old rows, or drawn from a normal distribution with
that mean and 1e-9 of the old rows' covariance, so that new tokens change the probabilities of the others as little as possible
(https://nlp.stanford.edu/~johnhew/vocab-expansion.html). They are made once, with a fixed seed, so they do not depend on the layout.
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
    """View of `stored` in which the rows of each tensor of `more` are appended to the tensor of the same name."""

    def __init__(self, directory: Path, stored: TensorSource, more: TensorSource | None) -> None:
        self.directory, self.stored, self.more = directory, stored, more
        self.entries = dict(stored.entries)
        for name, added in (more.entries if more else {}).items():
            old = stored.entries[name]
            self.entries[name] = replace(old, shape=(old.shape[0] + added.shape[0], *old.shape[1:]))

    def read_into(
        self, target: Tensor, name: str, axis: int | None = None, start: int = 0, stop: int | None = None
    ) -> None:
        """Fills `target` from `stored` and `more`."""
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
    """The tensors of a directory that `write_resized` made; None for any other directory."""
    path = Path(directory)
    if not (path / MARKER).is_file():
        return None
    stored = Checkpoint(read_json(path / MARKER)["weights"])
    return Resized(path, stored, Checkpoint(path / ROWS) if (path / ROWS).is_dir() else None)


def weights_of(directory: str | Path) -> str:
    """The directory of a model's weight files: `directory` itself, or the original of a resized model."""
    marker = Path(directory) / MARKER
    return str(read_json(marker)["weights"]) if marker.is_file() else str(directory)


def write_resized(
    view: Path, stored: TensorSource, family: Family, settings: Settings, vocab: int, *, kind: Kind
) -> None:
    """Turns `view`, a directory with config and tokenizer of `stored`, into the same model with `vocab` vocabulary rows."""
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
    """Tensors with one row per token of the vocabulary: embedding, output layer, its bias, and copies in multi-token prediction layers."""
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
    """New rows [count, …] in the dtype of `old` [vocabulary, …], as transformers computes them. It makes float32 copies of `old`."""
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
