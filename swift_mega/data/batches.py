"""Which examples make up step s, on which data rank: a function of (seed, s) alone, so a run can resume at any step.

The training data is a stream of units, epoch after epoch, and each epoch has its own order. Step s takes units
s · global_batch_size to (s + 1) · global_batch_size - 1 of the stream; a step may span two epochs. A run that is set in epochs ends with
the last unit of the last epoch. Its last step takes the remaining units, so every example is trained exactly `epochs` times.
A run that is set in steps repeats the data as often as it needs.

The units of a step are grouped into microbatches first, and the microbatches are then dealt to the data ranks round-robin. So the
microbatches are the same for any number of ranks. All ranks have the same number of microbatches in every step; where units are too
few, some microbatches are only padding. The loss is a sum over trained tokens, divided by their number, so neither a short step nor
padding changes the weight of an example.
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
"""Stream of the hash; other streams sample and split files (`sources`)."""


class Batches:
    """The microbatches of each step for one data rank.

    A unit is an example or, with data.packing, a packed row of at most data.max_length tokens. together: so many examples that follow one
    another (a pair: 2) are always in one unit, in their order; without packing they are one unit. epochs: passes over the units until the
    stream ends, rounded up to whole units; None: it does not end. once: one pass in order, for validation.

    micro_batch_size, global_batch_size: units. group: the number of a rank's microbatches in a step is a multiple of it.
    pad_to, pad_each: tokens; each microbatch is padded to a multiple of pad_to, and each example in it to a multiple of pad_each. A packed
    row then has at most data.max_length tokens, rounded up to a multiple of pad_each.
    Raises UserError where the global batch cannot be split evenly over the data ranks.
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
        together: int = 1,
    ) -> None:
        if not examples:
            raise UserError("data.dataset has no examples, so there are no batches; name other files")
        _check_sizes(micro_batch_size, global_batch_size, data_size)
        self._examples = examples
        self._units = _units(examples, settings, pad_each, together)
        self._seed = settings.seed
        self._micro = micro_batch_size
        self._global = global_batch_size
        self._rank, self._size = data_rank, data_size
        self._pad_to, self._pad_each, self._pad_token = pad_to, pad_each, pad_token
        self._shuffle, self._group = settings.shuffle and not once, group
        passes = 1.0 if once else epochs
        # 1e-9 is subtracted so that 0.1 epochs of 30 units are 3, not 4, in floating point.
        self._end = None if passes is None else max(1, math.ceil(passes * self.units - 1e-9))
        self._orders: dict[int, NDArray[np.int64]] = {}

    @property
    def units(self) -> int:
        """Units (examples or packed rows) of one epoch."""
        return len(self._units)

    @property
    def microbatches(self) -> int:
        """Microbatches per step on each data rank."""
        return self._global // (self._micro * self._size)

    @property
    def steps(self) -> int:
        """Steps until the stream ends; the last one may have fewer units."""
        assert self._end is not None, "a stream of a number of steps has no end"
        return -(-self._end // self._global)

    def passes(self, steps: int) -> float:
        """Passes over the units (epochs) that `steps` steps make."""
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
            return padding_row(self._pad_to, pad_token=self._pad_token, numbers=self._examples[0].numbers)
        return collate(examples, self._pad_to, pad_each=self._pad_each, pad_token=self._pad_token)

    def _chosen(self, step: int) -> list[int]:
        """Units of the global batch of `step`; the last batch of the stream may have fewer."""
        first, last = step * self._global, (step + 1) * self._global
        places = range(first, last if self._end is None else min(last, self._end))
        assert places, f"step {step} is after the end"
        return [int(self._order(place // self.units)[place % self.units]) for place in places]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            order = shuffled(self.units, self._seed, epoch, _EPOCH) if self._shuffle else np.arange(self.units)
            # A batch spans few epochs and steps go forward, so older orders are rarely needed again; they are cheap to compute.
            self._orders = {near: kept for near, kept in self._orders.items() if near >= epoch - 1}
            self._orders[epoch] = order
        return self._orders[epoch]


def _units(examples: Sequence[Example], settings: Data, pad_each: int, together: int) -> list[list[int]]:
    assert len(examples) % together == 0, (len(examples), together)
    kept = [list(range(first, first + together)) for first in range(0, len(examples), together)]
    if not settings.packing:
        return kept
    if together == 1:
        return pack_examples([len(example) for example in examples], settings.max_length, pad_each)
    sizes = [sum(rounded_up(len(examples[index]), pad_each) for index in some) for some in kept]
    packed = pack_examples(sizes, settings.max_length, pad_each)
    return [[index for number in numbers for index in kept[number]] for numbers in packed]


def _check_sizes(micro: int, total: int, ranks: int) -> None:
    for name, value in (("micro_batch_size", micro), ("global_batch_size", total)):
        if value < 1:
            raise UserError(f"train.{name}={value}: expected a number of examples, at least 1")
    unit = micro * ranks
    if total % unit:
        below, above = total // unit * unit, -(-total // unit) * unit
        near = f"{below} or {above}" if below else str(above)
        raise UserError(
            f"train.global_batch_size={total} is not a multiple of train.micro_batch_size={micro} times {ranks} data-parallel "
            f"ranks ({unit}); set it to {near}"
        )
