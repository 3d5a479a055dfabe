"""NaN and infinity are found in every dtype of checkpoints, at any index, and the error names the tensor."""

import math

import pytest
import torch

from swift_mega.convert.files.finite import check_finite, is_finite
from swift_mega.errors import UserError

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_anywhere(dtype, value):
    for place in (0, 77, 2 * 4099 - 1):
        tensor = torch.randn(2, 4099).to(dtype)
        assert is_finite(tensor)
        tensor.view(-1)[place] = value
        assert not is_finite(tensor) and not is_finite(tensor.t())
        with pytest.raises(UserError, match="1 value that") as error:
            check_finite("w", tensor)
        assert f"the first ({value}) at {[place // 4099, place % 4099]}" in str(error.value)


@pytest.mark.parametrize("dtype", FP8)
def test_every_code_of_fp8(dtype):
    """All 256 bytes of FP8, each among finite values of both signs, against torch's own conversion to float32."""
    for code in range(256):
        tensor = torch.tensor([0, 0x80, 0x70, 0xF0, code, 1], dtype=torch.uint8).view(dtype)
        assert is_finite(tensor) == bool(torch.isfinite(tensor.float()).all()), code


def test_the_largest_numbers_are_finite():
    for dtype in (*FLOATS, *FP8):
        most = torch.finfo(dtype).max
        assert is_finite(torch.tensor([most, -most, 0.0], dtype=torch.float64).to(dtype))


def test_many_are_counted():
    tensor = torch.zeros(3, 5, dtype=torch.bfloat16)
    tensor[1, 2:] = math.nan
    tensor[2, 0] = math.inf
    with pytest.raises(
        UserError, match=r"^model\.norm \[3, 5\] has 4 values that are not finite, the first \(nan\) at \[1, 2\]"
    ):
        check_finite("model.norm", tensor)


def test_other_tensors_pass():
    for tensor in (
        torch.tensor([127, -1], dtype=torch.int8),
        torch.empty(0, 3),
        torch.tensor(1.5),
        torch.tensor([True]),
    ):
        check_finite("w", tensor)
