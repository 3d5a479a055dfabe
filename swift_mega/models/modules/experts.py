"""Experts made of Megatron's local modules: with biases, and with one product per linear for all experts of a rank.

Without Transformer Engine, Megatron loops over the experts, with about ten kernel launches for each. Where the experts are frozen,
`GroupedExperts` computes all their products with torch's grouped_mm. Parameters, their names and checkpoints do not change, because the
weights of a rank's experts are views of one tensor. Between the two linears Megatron's own MLP runs.

Trained experts keep the loop, for two reasons. Their weights move into the buffer of Megatron's distributed optimizer, with the linears of
one expert side by side and the last expert first, which grouped_mm cannot read. And grouped_mm's gradient of the weights is wrong for an
expert without tokens on some GPUs (pytorch/pytorch#172439).
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from swift_mega.device.device import send
from swift_mega.errors import UserError
from swift_mega.models.settings import Settings

LINEARS = ("linear_fc1", "linear_fc2")
GROUPED = {"cuda": (torch.bfloat16,)}
"""dtypes for which grouped_mm is one kernel, by kind of device. For others it loops too."""
ALIGNED = 16
"""Bytes. The size of a row of every tensor that grouped_mm takes is a multiple of this."""


def check_biases(settings: Settings, expert_tensor: int) -> None:
    """UserError where every expert-tensor rank would add an expert's bias; Megatron has no other way."""
    if settings.shape.experts and settings.biases.mlp and expert_tensor > 1:
        raise UserError(
            f"parallel.expert_tensor={expert_tensor}: this model's experts have biases, which Megatron cannot split over tensor "
            "ranks; set parallel.expert_tensor=1, and parallel.expert to spread them"
        )


class BiasedRow(RowParallelLinear):
    """Second linear of an expert, with a bias. Megatron allows it on one expert-tensor rank only, so there is nothing to reduce.

    Megatron's reduction over one rank returns its input as a view. The expert then adds its bias to the view in place, which autograd
    refuses. Megatron also marks the bias as sequence parallel, so that its gradient is summed over tensor ranks; here those ranks have
    other experts.
    """

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self.explicit_expert_comm = True  # leaves the reduction to the dispatcher, so none is done here
        self.bias.sequence_parallel = False


class GroupedExperts(SequentialMLP):
    """SequentialMLP whose products are grouped where the experts are frozen and grouped_mm supports their tensors."""

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        for name in LINEARS:
            weights = self._of_all(name, "weight")
            if weights[0].device.type in GROUPED:
                for weight, place in zip(weights, torch.stack([weight.data for weight in weights]), strict=True):
                    weight.data = place

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """As SequentialMLP's: tokens [tokens, hidden] sorted by expert, the number of tokens of each expert, router weights [tokens]."""
        stacks = self._stacks(permuted_local_hidden_states)
        if stacks is None:
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)  # type: ignore[no-any-return]
        splits = tokens_per_expert.tolist()  # does not wait: Megatron's dispatcher has copied it to the host
        ends = send(torch.tensor(splits).cumsum(0).to(torch.int32), permuted_local_hidden_states.device)
        first, second = (self._linear(name, stack, splits, ends) for name, stack in zip(LINEARS, stacks, strict=True))

        def weighed(x: Tensor) -> tuple[Tensor, None]:
            out, bias = second(x)
            # MLP does this itself, but only for the bias of a single expert.
            return (out if bias is None else out + bias * permuted_probs[:, None]), None

        expert: Any = self.local_experts[0]
        joined: Any = SimpleNamespace(
            config=expert.config,
            activation_func=expert.activation_func,
            linear_fc1=_Linear(first),
            linear_fc2=_Linear(weighed),
        )
        return MLP.forward(joined, permuted_local_hidden_states, permuted_probs)  # type: ignore[no-any-return]

    def _stacks(self, x: Tensor) -> list[Tensor] | None:
        """The weights [experts, out, in] of both linears, as views; None where grouped_mm does not take them, or tokens x."""
        config = self.config
        if x.dtype not in GROUPED.get(x.device.type, ()) or not hasattr(F, "grouped_mm") or not len(x):
            return None
        if config.fp8 or getattr(config, "fp4", None) or config.moe_apply_probs_on_input or self.num_local_experts == 1:
            return None
        if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
            return None
        stacks = []
        for name in LINEARS:
            weights = self._of_all(name, "weight")
            stack = None if any(weight.requires_grad for weight in weights) else together(weights)
            if stack is None or any(size * stack.element_size() % ALIGNED for size in stack.shape[1:]):
                return None
            stacks.append(stack)
        return stacks

    def _of_all(self, linear: str, name: str) -> list[Tensor]:
        return [getattr(getattr(expert, linear), name) for expert in self.local_experts]

    def _linear(
        self, name: str, stack: Tensor, splits: list[int], ends: Tensor
    ) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
        """A function in place of one linear of all experts: returns its output [tokens, out] and the bias of each token, or None.

        ends: [experts] int32, the end of each expert's tokens. Each adapter gets its own expert's tokens, as in the loop.
        """

        def run(x: Tensor) -> tuple[Tensor, Tensor | None]:
            out = F.grouped_mm(x, stack.transpose(1, 2), offs=ends)
            linears: list[Any] = [getattr(expert, name) for expert in self.local_experts]
            if hasattr(linears[0], "adapter"):
                pieces = zip(linears, x.split(splits), out.split(splits), strict=True)
                out = torch.cat([linear.adapter(piece, result) for linear, piece, result in pieces])
            if linears[0].bias is None:
                return out, None
            biases = torch.stack([linear.bias for linear in linears])
            experts = torch.arange(len(splits), device=x.device)
            return out, biases[
                torch.repeat_interleave(experts, ends.diff(prepend=ends.new_zeros(1)), output_size=len(x))
            ]

        return run


class _Linear(torch.nn.Module):
    """Wraps a function as a module, which Megatron's code expects."""

    def __init__(self, run: Callable[[Tensor], tuple[Tensor, Tensor | None]]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Calls the function."""
        return self.run(x)


def together(tensors: Sequence[Tensor]) -> Tensor | None:
    """[n, ...]: one view of n tensors of the same shape that lie at equal distances in one storage; None where they do not."""
    first, *rest = tensors
    if not all(each.is_contiguous() and each.shape == first.shape and each.dtype == first.dtype for each in tensors):
        return None
    storage = first.untyped_storage().data_ptr()
    starts = [each.storage_offset() for each in tensors]
    step = starts[1] - starts[0] if rest else first.numel()
    regular = all(start == starts[0] + number * step for number, start in enumerate(starts))
    if step < first.numel() or not regular or any(each.untyped_storage().data_ptr() != storage for each in rest):
        return None
    return first.detach().as_strided((len(tensors), *first.shape), (step, *first.stride()))
