"""What an objective is: from the last stage's hidden states to a sum and a count that the framework divides globally."""

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
    """`sum` over this microbatch, differentiable; `count` of what it is a sum over, on the host; `metrics`, sums over the same."""

    sum: Tensor
    count: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Head:
    """The last stage's way from hidden states to log-probabilities, the vocabulary cut by tensor parallelism or not."""

    part: ModelPart
    groups: Groups
    chunk: int | None = None
    """Tokens whose logits exist at once, as `token_log_probabilities` takes it."""

    def local_logits(self, chunk: Decoder, hidden: Tensor) -> Tensor:
        """hidden: what the last chunk returned -> [tokens, vocabulary / tensor] of this rank's rows, padding included."""
        weight = self.part.head_weight
        assert weight is not None, "the head is on the last stage"
        logits = F.linear(chunk.head_input(hidden), weight, self.part.head_bias)
        return soft_cap(logits, self.part.settings.scales.logit_softcap)

    def log_probabilities(self, chunk: Decoder, hidden: Tensor, targets: Tensor) -> Tensor:
        """hidden: what the last chunk returned; targets [tokens], negative where there is none, on the host -> [tokens], 0 there."""
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
    """Stateless: what is minimised."""

    def loss(self, head: Head, chunk: Decoder, hidden: Tensor, batch: Microbatch) -> Loss:
        """The loss of one microbatch, on the last stage."""
        ...


def find_objective(settings: schema.Objective) -> Objective:
    """The objective of `settings.name`; UserError with the known ones."""
    return choose(folder, "OBJECTIVE", settings.name, setting="objective.name")
