"""A function of tokens, computed one tile of tokens at a time, so that its intermediate tensors never exist for all tokens.

The forward pass keeps only the input. The backward pass computes each tile again, differentiates it and drops it. So the function is
computed twice (as in Arctic Long Sequence Training, arXiv:2506.13996, and in Megatron's recomputation).

Parameters are inputs of one autograd node, which sums their gradients over tiles. So each parameter receives one gradient per backward
pass, for any number of tiles. Megatron's DistributedDataParallel requires that. Its hook on the parameter's AccumulateGrad moves the
gradient into main_grad, and with overlap_grad_reduce marks the parameter as ready. A bucket whose parameters are all ready is reduced,
and a second call in a microbatch would be an error. `torch.autograd.grad` of a tile returns gradients and runs no AccumulateGrad, so no
hook either.

With gradient_accumulation_fusion a linear layer adds each tile's gradient to main_grad itself, sets grad_added_to_main_grad, and returns
numbers without a meaning. One set of these is passed on: the hook does not read them, but must be called.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Again = Callable[[], AbstractContextManager[Any]]
"""Makes a context in which the random numbers are those that were drawn when `remember` was called."""


def tiled(
    call: Callable[[Tensor], Tensor],
    x: Tensor,
    parameters: Sequence[Tensor],
    tile: int,
    *,
    remember: Callable[[], Again] | None = None,
) -> Tensor:
    """call(x), `tile` tokens at a time.

    call: [tokens, ...] -> [tokens, ...]. The result of a token must not depend on other tokens. It may communicate: ranks with the same
    number of tokens take the same tiles in the same order, forward and backward. x: [tokens, ...].
    parameters: all trained parameters that `call` uses; any other one would get no gradient.
    remember: called before the forward pass; its result repeats the random numbers in the second computation. None: `call` draws none.
    """
    if not torch.is_grad_enabled():
        return _by_tiles(call, x, tile)
    return _Tiled.apply(x, call, tile, nullcontext if remember is None else remember(), *parameters)


def _tiles(x: Tensor, tile: int) -> list[slice]:
    return [slice(start, start + tile) for start in range(0, max(len(x), 1), tile)]


def _by_tiles(call: Callable[[Tensor], Tensor], x: Tensor, tile: int) -> Tensor:
    """Without a graph; the result of each tile is copied to its place and dropped."""
    whole: Tensor | None = None
    for part in _tiles(x, tile):
        out = call(x[part])
        if len(out) == len(x):
            return out
        if whole is None:
            whole = out.new_empty(len(x), *out.shape[1:])
        whole[part] = out
    assert whole is not None
    return whole


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, call: Callable[[Tensor], Tensor], tile: int, again: Again, *parameters: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x)
        # Not saved by autograd: hooks on saved tensors may move activations to the host, and parameters are not activations.
        ctx.parameters = parameters
        ctx.call, ctx.tile, ctx.again = call, tile, again
        return _by_tiles(call, x, tile)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,), gradient = ctx.saved_tensors, gradients[0]
        wanted, parts = ctx.needs_input_grad[0], _tiles(x, ctx.tile)
        trained = (
            [number for number, needed in enumerate(ctx.needs_input_grad[-len(ctx.parameters) :]) if needed]
            if ctx.parameters
            else []
        )
        grad_x = torch.empty_like(x) if wanted else None
        sums = [_GradientSum(ctx.parameters[number], len(parts) > 1) for number in trained]
        with ctx.again(), torch.enable_grad():
            for part in parts:
                piece = x[part].detach().requires_grad_(wanted)
                inputs = [*([piece] if wanted else []), *(ctx.parameters[number] for number in trained)]
                found = list(torch.autograd.grad(ctx.call(piece), inputs, gradient[part], allow_unused=True))
                if grad_x is not None:
                    own = found.pop(0)
                    grad_x[part] = 0 if own is None else own
                for total, more in zip(sums, found, strict=True):
                    total.add(more)
        of_parameters: list[Tensor | None] = [None] * len(ctx.parameters)
        for number, total in zip(trained, sums, strict=True):
            of_parameters[number] = total.value()
        return grad_x, None, None, None, *of_parameters


class _GradientSum:
    """The sum of a parameter's gradients over tiles, in float32 for narrower dtypes. Each gradient was rounded once, and so is the sum."""

    def __init__(self, parameter: Tensor, several: bool) -> None:
        self.parameter, self.several = parameter, several
        narrow = parameter.dtype in (torch.bfloat16, torch.float16)
        self.dtype = torch.float32 if narrow else parameter.dtype
        self.total: Tensor | None = None

    def add(self, more: Tensor | None) -> None:
        if more is None:
            return
        if not self.several or getattr(self.parameter, "grad_added_to_main_grad", False):
            self.total = more
        elif self.total is None:
            self.total = more.to(self.dtype, copy=True)  # what autograd returns may be shared with another parameter
        else:
            self.total.add_(more)

    def value(self) -> Tensor | None:
        return None if self.total is None else self.total.to(self.parameter.dtype)
