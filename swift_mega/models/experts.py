"""The second linear of an expert that has a bias, among Megatron's local modules."""

from typing import Any

from megatron.core.tensor_parallel import RowParallelLinear


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
