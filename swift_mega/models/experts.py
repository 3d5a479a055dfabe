"""Experts that have biases: where they cannot be cut, and their second linear among Megatron's local modules."""

from typing import Any

from megatron.core.tensor_parallel import RowParallelLinear

from swift_mega.errors import UserError
from swift_mega.models.settings import Settings


def check_biases(settings: Settings, expert_tensor: int) -> None:
    """UserError where expert-tensor ranks would each add an expert's bias; Megatron has no other way."""
    if settings.shape.experts and settings.biases.mlp and expert_tensor > 1:
        raise UserError(
            f"parallel.expert_tensor={expert_tensor}: this model's experts have biases, which Megatron cannot cut over tensor "
            "ranks; set parallel.expert_tensor=1, and parallel.expert to spread them"
        )


class BiasedRow(RowParallelLinear):
    """Megatron allows a bias of experts on one expert-tensor rank only, so there is nothing to reduce.

    Megatron's reduction over one rank hands its input on as a view, to which the expert then adds its bias in place: autograd refuses.
    And it marks the bias as one that tensor ranks see some tokens each of, whose gradient is summed over them; those ranks hold other
    experts here.
    """

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self.explicit_expert_comm = True  # what is left to the dispatcher is not reduced here
        self.bias.sequence_parallel = False
