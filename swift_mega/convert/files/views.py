"""Views of a TensorSource in which a model has other tensors than its files."""

from dataclasses import replace

from torch import Tensor

from swift_mega.convert.files.tensors import TensorSource


class Untied(TensorSource):
    """View of a tied model in which the output layer is a separate tensor, with the numbers of the embedding."""

    def __init__(self, stored: TensorSource, *, head: str, embedding: str) -> None:
        self.directory, self.stored, self.head, self.embedding = stored.directory, stored, head, embedding
        self.entries = {**stored.entries, head: replace(stored.entries[embedding], name=head)}

    def read_into(
        self, target: Tensor, name: str, axis: int | None = None, start: int = 0, stop: int | None = None
    ) -> None:
        """Fills `target`. The output layer is read from the embedding."""
        self.stored.read_into(target, self.embedding if name == self.head else name, axis, start, stop)
