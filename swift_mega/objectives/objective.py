"""The interface of objectives: from the last stage's hidden states to a sum and a count; the framework divides them globally."""

from dataclasses import dataclass, field
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

import swift_mega.objectives as folder
from swift_mega.config import schema
from swift_mega.data.pack import Microbatch
from swift_mega.discover import choose
from swift_mega.models.build import Decoder, ModelPart
from swift_mega.parallel.groups import Groups
from swift_mega.parallel.vocab import soft_cap, token_log_probabilities


@dataclass(frozen=True)
class Loss:
    """The loss of one microbatch.

    sum: the sum of the loss terms, a differentiable scalar. count: the number of terms, on the host. metrics: sums over the same terms.
    """

    sum: Tensor
    count: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


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
        )


class Objective(Protocol):
    """What is minimised. Has no state."""

    def loss(self, head: Head, chunk: Decoder, hidden: Tensor, batch: Microbatch) -> Loss:
        """The loss of one microbatch, on the last stage."""
        ...


def find_objective(settings: schema.Objective) -> Objective:
    """The objective that `settings.name` names; UserError with the known names where there is none."""
    return choose(folder, "OBJECTIVE", settings.name, setting="objective.name")
