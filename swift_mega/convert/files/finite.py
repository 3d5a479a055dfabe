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


def check_finite(name: str, tensor: Tensor, written: torch.dtype | None = None, first_row: int = 0) -> None:
    """UserError with the tensor's name, how many of its numbers are NaN or infinite, and where the first one is.

    written: the dtype that the numbers are about to get, whose range they may be beyond. first_row: of the tensor, where this is a
    part of it.
    """
    odd = None if is_finite(tensor) else ~_finite(tensor)
    if odd is not None:
        count, first = int(odd.sum()), odd.nonzero()[0].tolist()
        value, place = float(tensor[tuple(first)]), [first[0] + first_row, *first[1:]] if first else []
        raise UserError(
            f"{name} {list(tensor.shape)} holds {count} number{'s' if count > 1 else ''} that are not finite, the first ({value}) at "
            f"{place}; a model cannot be made of it: copy the checkpoint from the source again, or take an earlier one"
        )
    if written is not None and not is_finite(tensor.to(written)):
        kind, count = str(written).removeprefix("torch."), int((~_finite(tensor.to(written))).sum())
        largest, end = float(tensor.double().abs().max()), torch.finfo(written).max
        wider = "bfloat16 or float32" if written == torch.float16 else "float64"
        raise UserError(
            f"{name} {list(tensor.shape)} has {count} number{'s' if count > 1 else ''} beyond the range of {kind} (the largest is "
            f"{largest:.3g}, {kind} ends at {end:.3g}) and would hold infinity; write it in {wider} (--torch_dtype), or convert the "
            "model to that first"
        )


def _finite(tensor: Tensor) -> Tensor:
    return torch.isfinite(tensor.float() if tensor.dtype in _CODES else tensor)
