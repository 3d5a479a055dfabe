"""Finds NaN and infinity in tensors, and reports the name of the tensor, before a model is made of them.

It takes one pass over memory: if any number is NaN or infinite, so is the minimum or the maximum. torch cannot compare FP8 numbers, so
their bytes are compared: the codes that are not finite are the largest ones of each sign.
"""

import torch
from torch import Tensor

from swift_mega.errors import UserError

_CODES = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}
"""The smallest code that is not finite, without the sign bit."""


def is_finite(tensor: Tensor) -> bool:
    """Whether every number is finite; integers are."""
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
    """UserError with the tensor's name, how many of its numbers are NaN or infinite, and the index of the first one.

    written: the dtype in which the numbers will be written; numbers outside its range are an error too. first_row: the row of the whole
    tensor at which `tensor` begins.
    """
    odd = None if is_finite(tensor) else ~_finite(tensor)
    if odd is not None:
        count, first = int(odd.sum()), odd.nonzero()[0].tolist()
        value, place = float(tensor[tuple(first)]), [first[0] + first_row, *first[1:]] if first else []
        raise UserError(
            f"{name} {list(tensor.shape)} has {count} value{'s that are' if count > 1 else ' that is'} not finite, the first ({value}) at "
            f"{place}; such weights are refused: copy the checkpoint from the source again, or take an earlier one"
        )
    if written is not None and not is_finite(tensor.to(written)):
        kind, count = str(written).removeprefix("torch."), int((~_finite(tensor.to(written))).sum())
        largest, end = float(tensor.double().abs().max()), torch.finfo(written).max
        wider = "bfloat16 or float32" if written == torch.float16 else "float64"
        raise UserError(
            f"{name} {list(tensor.shape)} has {count} value{'s' if count > 1 else ''} beyond the range of {kind} (the largest is "
            f"{largest:.3g}, {kind} ends at {end:.3g}) and would become infinity; write it in {wider} (--torch_dtype), or convert the "
            "model to that dtype first"
        )


def _finite(tensor: Tensor) -> Tensor:
    return torch.isfinite(tensor.float() if tensor.dtype in _CODES else tensor)
