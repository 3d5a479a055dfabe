"""Numbers that are none, found by the name of their tensor before a model is made of them.

One pass over memory: the smallest and the largest number are NaN or infinite where any number is. For FP8, which torch cannot compare,
the bytes are compared: what is not finite has the largest codes of its sign.
"""

import torch
from torch import Tensor

from swift_mega.errors import UserError

_CODES = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}
"""The first code that is not finite, without the sign."""


def is_finite(tensor: Tensor) -> bool:
    """Whether every number is finite; whole numbers are."""
    if not tensor.numel():
        return True
    if tensor.dtype in _CODES:
        code = _CODES[tensor.dtype]
        positive, any_sign = tensor.view(torch.int8).amax(), tensor.view(torch.uint8).amax()
        return int(positive) < code and int(any_sign) < code + 128
    if not tensor.is_floating_point():
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def check_finite(name: str, tensor: Tensor) -> None:
    """UserError with the tensor's name, how many of its numbers are NaN or infinite, and where the first one is."""
    if is_finite(tensor):
        return
    odd = ~torch.isfinite(tensor.float())
    count, first = int(odd.sum()), odd.nonzero()[0].tolist()
    value = float(tensor[tuple(first)].float())
    raise UserError(
        f"{name} {list(tensor.shape)} holds {count} number{'s' if count > 1 else ''} that are not finite, the first ({value}) at "
        f"{first}; a model cannot be made of it: copy the checkpoint from the source again, or take an earlier one"
    )
