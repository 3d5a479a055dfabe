"""Which examples make up step s, on which data rank: a function of (seed, s) alone, so a run can resume anywhere.

The training data is a stream, epoch after epoch, each in its own order; step s takes the s-th run of `global_batch_size` units
of it, across the seam between two epochs where it has to. A run over a number of epochs ends with the last unit of them: its last
step holds what is left, so every example is trained exactly that many times. A run over a number of steps has no end of the
stream: fewer examples than it takes come around again.

The units of a step are grouped into microbatches before these are dealt to the data ranks in turn: any number of ranks sees the
same microbatches. Ranks have the same number of microbatches in every step; where there are too few units, some are padding
alone. The loss is a sum over tokens, divided by their number, so neither a short step nor padding changes an example's weight in it.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from swift_mega.config.schema import Data
from swift_mega.data.pack import Example, Microbatch, collate, pack_examples, padding_row, rounded_up
from swift_mega.data.shuffle import shuffled
from swift_mega.errors import UserError

_EPOCH = 3
"""Stream of the hash, apart from those that sample and split files."""


class Batches:
    """The microbatches of each step for one data rank.

    A unit is an example or, with data.packing, a packed row of at most data.max_length tokens. epochs: after how many passes
    over the units the stream ends, rounded up to whole units; None: never. `once`: for validation; one pass, in order.

    micro_batch_size, global_batch_size: units. group: a rank's microbatches of a step are a multiple of it. pad_to, pad_each: tokens,
    what each microbatch, and each example in it, is padded to a multiple of; a packed row then has up to data.max_length tokens
    rounded up so.
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
        epochs: float | None = None,
        group: int = 1,
        once: bool = False,
    ) -> None:
        if not examples:
            raise UserError("no examples to make batches of: data.dataset gave none")
        _check_sizes(micro_batch_size, global_batch_size, data_size)
        self._examples = examples
        self._units = _units(examples, settings, pad_each)
        self._seed = settings.seed
        self._micro = micro_batch_size
        self._global = global_batch_size
        self._rank, self._size = data_rank, data_size
        self._pad_to, self._pad_each, self._pad_token = pad_to, pad_each, pad_token
        self._shuffle, self._group = settings.shuffle and not once, group
        passes = 1.0 if once else epochs
        # A hair is taken off so that 0.1 epochs of 30 units are 3, not 4, in floating point.
        self._end = None if passes is None else max(1, math.ceil(passes * self.units - 1e-9))
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
    def steps(self) -> int:
        """Steps until the stream ends; the last of them may hold fewer units."""
        assert self._end is not None, "a stream of a number of steps has no end"
        return -(-self._end // self._global)

    def passes(self, steps: int) -> float:
        """How often `steps` steps go over the units."""
        return min(steps * self._global, self._end or math.inf) / self.units

    def batch(self, step: int) -> list[Microbatch]:
        """The microbatches of step `step` (from 0) for this data rank, each with the examples of its units in order."""
        chosen = self._chosen(step)
        number = rounded_up(-(-len(chosen) // self._micro), self._size * self._group)
        parts = [chosen[start : start + self._micro] for start in range(0, number * self._micro, self._micro)]
        return [self._row(units) for units in parts[self._rank :: self._size]]

    def _row(self, units: list[int]) -> Microbatch:
        examples = [self._examples[index] for unit in units for index in self._units[unit]]
        if not examples:
            return padding_row(self._pad_to, pad_token=self._pad_token)
        return collate(examples, self._pad_to, pad_each=self._pad_each, pad_token=self._pad_token)

    def _chosen(self, step: int) -> list[int]:
        """Units of the global batch, of which the last one of the stream may have fewer."""
        first, last = step * self._global, (step + 1) * self._global
        places = range(first, last if self._end is None else min(last, self._end))
        assert places, f"step {step} is after the end"
        return [int(self._order(place // self.units)[place % self.units]) for place in places]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            order = shuffled(self.units, self._seed, epoch, _EPOCH) if self._shuffle else np.arange(self.units)
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
