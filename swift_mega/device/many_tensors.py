"""Norm and scaling of many tensors at once, in place of the loops that Megatron uses where Transformer Engine and Apex are absent.

Megatron's `local_multi_tensor_l2_norm` reads the norm of each parameter's gradient on the host. An adapter has hundreds of them, and the
GPU runs idle at each. The functions here have the same signatures, and leave the result on the device of the gradients.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def l2_norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Sequence[Sequence[Tensor]], per_tensor: bool, *rest: Any
) -> tuple[Tensor, None]:
    """The 2-norm of all numbers in the first list, [1] float32 on its first tensor's device, and None for the norms of single tensors."""
    (tensors,) = tensor_lists
    exact = torch.promote_types(tensors[0].dtype, torch.float32)
    norms = torch._foreach_norm(list(tensors), 2, exact)
    # With optimizer offload some gradients are on the host.
    together = torch.stack([norm.to(tensors[0].device) for norm in norms])
    return torch.linalg.vector_norm(together).reshape(1).float(), None


def scale(chunk_size: int, noop_flag: Tensor, tensor_lists: Sequence[Sequence[Tensor]], factor: float) -> None:
    """Each tensor of the second list becomes `factor` times that of the first. For gradients both lists have the same tensors."""
    source, into = map(list, tensor_lists)
    if any(one is not other for one, other in zip(source, into, strict=True)):
        torch._foreach_copy_(into, source)
    torch._foreach_mul_(into, factor)


def in_place_of(name: str, ours: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Replaces only Megatron's function `name`: one of Transformer Engine or Apex stays."""
    return lambda original: ours if getattr(original, "__name__", "") == name else original
