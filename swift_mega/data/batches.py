"""Which examples make up step s, on which data rank: a function of (seed, s) alone, so a run can resume anywhere.

The training data is an endless stream, epoch after epoch, each in its own order; step s takes the s-th run of
`global_batch_size` units of it, across the seam between two epochs where it has to. So no example is ever lost to a
partial batch, and fewer examples than one batch simply come around again. The units of a step are grouped into
microbatches before these are dealt to the data ranks in turn: any number of ranks sees the same microbatches.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from swift_mega.config.schema import Data
from swift_mega.data.pack import Example, Microbatch, collate, pack_examples
from swift_mega.data.shuffle import shuffled
from swift_mega.errors import UserError

_EPOCH = 3
"""Stream of the hash, apart from those that sample and split files."""


class Batches:
    """The microbatches of each step for one data rank.

    A unit is an example or, with data.packing, a packed row of at most data.max_length tokens. `once`: for validation;
    units come in order, each exactly once in `steps_per_epoch` steps, and the last batch is filled up with units that
    have no loss.

    micro_batch_size, global_batch_size: units. pad_to, pad_each: tokens, what each microbatch, and each example in it, is padded to
    a multiple of; a packed row then has up to data.max_length tokens rounded up so.
    Raises UserError where the global batch cannot be dealt out evenly.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        settings: Data,
        micro_batch_size: int,
        global_batch_size: int,
        data_rank: int = 0,
        data_size: int = 1,
        pad_to: int = 1,
        pad_each: int = 1,
        pad_token: int = 0,
        once: bool = False,
    ) -> None:
        if not examples:
            raise UserError("no examples to make batches of: data.dataset gave none")
        _check_sizes(micro_batch_size, global_batch_size, data_size)
        self._examples = examples
        self._units = _units(examples, settings, pad_each)
        self._settings = settings
        self._micro = micro_batch_size
        self._global = global_batch_size
        self._rank, self._size = data_rank, data_size
        self._pad_to, self._pad_each, self._pad_token = pad_to, pad_each, pad_token
        self._once = once
        self._orders: dict[int, NDArray[np.int64]] = {}

    @property
    def units(self) -> int:
        """Examples, or packed rows, of one epoch."""
        return len(self._units)

    @property
    def microbatches(self) -> int:
        """Microbatches per step on each data rank."""
        return self._global // (self._micro * self._size)

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every unit was seen; the last of them may already hold units of the next epoch."""
        return self.steps(1)

    def steps(self, epochs: float) -> int:
        """Steps of that many passes over the data, rounded up to whole batches; at least 1."""
        # A hair is taken off so that 0.1 epochs of 30 units with batches of 3 are 1 step, not 2, in floating point.
        return max(1, math.ceil(epochs * self.units / self._global - 1e-9))

    def repeated(self, steps: int) -> int:
        """Units that the last of `steps` steps takes from a pass that it does not finish."""
        return (steps * self._global) % self.units

    def batch(self, step: int) -> list[Microbatch]:
        """The microbatches of step `step` (from 0) for this data rank, each with the examples of its units in order."""
        chosen = self._chosen(step)
        rows = []
        for number in range(self._rank, len(chosen) // self._micro, self._size):
            examples = [e for unit in chosen[number * self._micro : (number + 1) * self._micro] for e in self._of(unit)]
            rows.append(collate(examples, self._pad_to, pad_each=self._pad_each, pad_token=self._pad_token))
        return rows

    def _chosen(self, step: int) -> list[int]:
        """Units of the global batch; -1 stands for a filler without loss."""
        places = range(step * self._global, (step + 1) * self._global)
        if self._once:
            return [place if place < self.units else -1 for place in places]
        return [int(self._order(place // self.units)[place % self.units]) for place in places]

    def _of(self, unit: int) -> list[Example]:
        if unit < 0:
            return [min(self._examples, key=len).untrained()]
        return [self._examples[index] for index in self._units[unit]]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            order = (
                shuffled(self.units, self._settings.seed, epoch, _EPOCH)
                if self._settings.shuffle
                else np.arange(self.units)
            )
            # A batch spans few epochs, and steps move forward: older orders are not needed again, and cheap to make.
            self._orders = {near: kept for near, kept in self._orders.items() if near >= epoch - 1}
            self._orders[epoch] = order
        return self._orders[epoch]


def _units(examples: Sequence[Example], settings: Data, pad_each: int) -> list[list[int]]:
    if settings.packing:
        return pack_examples([len(example) for example in examples], settings.max_length, pad_each)
    return [[index] for index in range(len(examples))]


def _check_sizes(micro: int, total: int, ranks: int) -> None:
    for name, value in (("micro_batch_size", micro), ("global_batch_size", total)):
        if value < 1:
            raise UserError(f"train.{name}={value}: a number of examples; give at least 1")
    unit = micro * ranks
    if total % unit:
        below, above = total // unit * unit, -(-total // unit) * unit
        near = f"{below} or {above}" if below else str(above)
        raise UserError(
            f"train.global_batch_size={total} is no multiple of train.micro_batch_size={micro} times {ranks} data-parallel "
            f"ranks ({unit}); set it to {near}"
        )
