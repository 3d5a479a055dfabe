"""Checkpoints seen otherwise than they are stored: what loads, converts and merges them reads a view as it reads files."""

from dataclasses import replace

from torch import Tensor

from swift_mega.convert.files.hf_files import Checkpoint


class Untied(Checkpoint):
    """A tied model's checkpoint with an output layer of its own, which is the embedding again."""

    def __init__(self, stored: Checkpoint, *, head: str, embedding: str) -> None:
        # Not Checkpoint's own: it is a checkpoint to all who read one, and reads another.
        self.directory, self.stored, self.head, self.embedding = stored.directory, stored, head, embedding
        self.entries = {**stored.entries, head: replace(stored.entries[embedding], name=head)}

    def read_into(
        self, target: Tensor, name: str, axis: int | None = None, start: int = 0, stop: int | None = None
    ) -> None:
        """Fills `target` as Checkpoint's does."""
        self.stored.read_into(target, self.embedding if name == self.head else name, axis, start, stop)
