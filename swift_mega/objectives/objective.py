"""The interface of an objective: what is minimised, and what it needs from data, from frozen models and from the last stage.

An objective turns the outputs of one microbatch on the last stage (`Output`) into a sum of terms. The framework divides the sums of all
microbatches once, by the weight of the global batch (`Objective.weight`), which it knows from the data before the forward pass.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from swift_mega.config import schema
from swift_mega.data.pack import Microbatch
from swift_mega.discover import choose
from swift_mega.errors import UserError
from swift_mega.models.build import Decoder, ModelPart
from swift_mega.parallel.context import Context, sum_over_context
from swift_mega.parallel.groups import Groups
from swift_mega.parallel.sequence import local_tokens
from swift_mega.parallel.vocab import soft_cap, token_log_probabilities


@dataclass(frozen=True)
class Loss:
    """The loss of one microbatch on this rank.

    sum: the sum of the loss terms, a differentiable scalar.
    metrics: sums over the same terms, by name; like `sum` they are divided by the weight of the global batch. The objective declares the
    names (`Objective.metrics`).
    by_example: the terms are of whole examples, as from `Output.example_sums`. All context ranks of a row then have the same sums, and
    one of them is counted; the gradient of each rank is that of its own tokens.
    """

    sum: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    by_example: bool = False


@dataclass(frozen=True)
class Head:
    """From hidden states to log-probabilities on the last stage; with tensor parallelism the vocabulary is sharded."""

    part: ModelPart
    groups: Groups
    chunk: int | None = None
    """Number of tokens whose logits are in memory at once: `chunk` of `token_log_probabilities`."""

    def local_logits(self, chunk: Decoder, hidden: Tensor) -> Tensor:
        """Logits of this tensor rank's shard of the vocabulary, [tokens, padded vocabulary / tensor]. hidden: output of the last chunk."""
        weight = self.part.head_weight
        assert weight is not None, "the head is on the last stage"
        logits = F.linear(chunk.head_input(hidden), weight, self.part.head_bias)
        return soft_cap(logits, self.part.settings.scales.logit_softcap)

    def log_probabilities(self, chunk: Decoder, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities of the targets over the whole vocabulary, [tokens]; 0 where there is no target.

        hidden: output of the last chunk. targets: [tokens], on the host, negative where there is no target.
        """
        weight = self.part.head_weight
        assert weight is not None, "the head is on the last stage"
        tensor = self.groups.tensor if self.groups.layout.tensor > 1 else None
        return token_log_probabilities(
            chunk.head_input(hidden),
            weight,
            targets,
            group=tensor,
            vocab_size=self.part.settings.shape.vocab,
            first_row=weight.shape[0] * self.groups.coordinate.tensor,
            bias=self.part.head_bias,
            softcap=self.part.settings.scales.logit_softcap,
            chunk=self.chunk,
            kernels=self.part.kernels,
        )


@dataclass(frozen=True)
class Output:
    """One microbatch on the last stage: the hidden states, what follows from them, and what frozen passes left."""

    head: Head
    chunk: Decoder
    hidden: Tensor
    """[tokens / s, 1, hidden], of this context rank: output of the last chunk."""
    batch: Microbatch
    """The microbatch with this context rank's tokens, labels and positions; cu_seqlens, lengths and numbers are of the whole row."""
    passes: Mapping[str, Tensor] = field(default_factory=dict)
    """Name of a pass (`Objective.passes`) -> what it left of this microbatch."""

    def log_probabilities(self, targets: Tensor | None = None) -> Tensor:
        """[tokens] of this context rank, differentiable; 0 where there is no target. targets: on the host; None: the labels."""
        return self.head.log_probabilities(self.chunk, self.hidden, self.batch.labels if targets is None else targets)

    def local_logits(self) -> Tensor:
        """[tokens, padded vocabulary / tensor] of this context rank and this tensor rank's shard of the vocabulary."""
        return self.head.local_logits(self.chunk, self.hidden)

    def example_sums(self, values: Tensor) -> Tensor:
        """[examples]: sums of `values` [tokens] over the tokens of each example, the same on all context ranks; differentiable.

        The gradient of each context rank is that of its own tokens. Collective over context ranks.
        """
        numbers = example_numbers(self.batch, self.head.groups.row).to(values.device)
        sums = values.new_zeros(len(self.batch.lengths)).index_add(0, numbers, values)
        return sum_over_context(sums, self.head.groups.row)[: self.batch.examples]

    def example_log_probabilities(self) -> Tensor:
        """[examples]: sum of the labels' log-probabilities of each example."""
        return self.example_sums(self.log_probabilities())


def example_numbers(batch: Microbatch, context: Context | None) -> Tensor:
    """[tokens] int64 on the host: which example of the row each token of this rank is in."""
    starts = batch.cu_seqlens
    numbers = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff().to(torch.int64))
    return numbers if context is None else numbers[local_tokens(starts.tolist(), context.mesh, context.rank)]


@dataclass(frozen=True)
class Pass:
    """A forward pass of frozen weights over the global batch before the step, which leaves numbers for the loss.

    name: of the entry of `Output.passes`. ask: what is left of a microbatch: one number per token or example of this rank. It is called
    on the last stage, without gradients and without dropout.
    weights: "base": of the model as it was loaded, without what the tuner added or changed; "policy": as they are before the step.
    """

    name: str
    ask: Callable[[Output], Tensor]
    weights: Literal["base", "policy"] = "base"


class Objective(ABC):
    """What is minimised. Made once per run from its settings; has no other state."""

    Settings: ClassVar[type[schema.Objective]] = schema.Objective
    fields: ClassVar[tuple[str, ...]] = ()
    """Columns of the data that it reads beside the conversation (data/formats.py). With rejected_response, a row is a pair of examples."""
    metrics: ClassVar[tuple[str, ...]] = ()
    """Names of `Loss.metrics`, which are logged beside the loss: all ranks must know them."""

    def __init__(self, settings: schema.Objective) -> None:
        self.settings = settings

    @property
    def together(self) -> int:
        """How many examples that follow one another belong together, and are always in one microbatch."""
        return 2 if "rejected_response" in self.fields else 1

    def passes(self) -> Sequence[Pass]:
        """Forward passes of frozen weights that the loss needs."""
        return ()

    @abstractmethod
    def weight(self, batch: Microbatch) -> float:
        """How much a whole microbatch counts: the sum of the weights of its terms. Needs the data alone."""

    @abstractmethod
    def loss(self, output: Output) -> Loss:
        """The loss of one microbatch, on the last stage."""


def find_objective(settings: schema.Objective) -> Objective:
    """The objective that `settings.name` names; UserError with the known names where there is none."""
    made = choose("swift_mega.objectives", "OBJECTIVE", settings.name, setting="objective.name")
    if not isinstance(settings, made.Settings):
        raise UserError(
            f"objective.name={settings.name!r} has settings of class {made.Settings.__name__}, not {type(settings).__name__}; "
            "make the run's objective an instance of it"
        )
    return made(settings)  # type: ignore[no-any-return]
