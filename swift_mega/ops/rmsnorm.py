"""RMSNorm over the last dim (Zhang & Sennrich 2019, arXiv:1910.07467), with few passes over memory on the CPU.

On the CPU torch computes it from eight operators and differentiates each of them. The gradient in closed form needs only the input and
one number per vector. With r = 1 / rms(x), n = x r and the incoming gradient g: dx = r (w g - n mean(w g n)), and dw is the sum of g n
over all vectors.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swift_mega.ops.kernels import AUTO, Form, Kernels, Op


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        size = x.shape[-1]
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(size).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (x * scale).mul_(gradients[0]).flatten(0, -2).sum(0)
        if ctx.needs_input_grad[0]:
            grad_x = gradients[0] * weight
            mean = (grad_x * x).sum(-1, keepdim=True).div_(x.shape[-1])
            grad_x.mul_(scale).addcmul_(x, mean.mul_(scale.pow(3)), value=-1)
        return grad_x, grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, kernels: Kernels = AUTO) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight. x: [..., hidden], weight: [hidden], of one dtype; returns x's shape and dtype."""
    plain = x.dtype == weight.dtype and x.dim() > 1
    return kernels.form(RMS_NORM, x.device, x.dtype, plain).run(x, weight, eps)  # type: ignore[no-any-return]


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` by torch."""
    return F.rms_norm(x, weight.shape, weight, eps)


def _lacks(device: torch.device, dtype: torch.dtype, plain: bool) -> str | None:
    # torch computes narrow dtypes in float32 inside.
    able = plain and device.type == "cpu" and dtype in (torch.float32, torch.float64)
    return None if able else "the CPU, and float32 or float64 in input and weight"


RMS_NORM = Op(
    "rms_norm",
    (
        Form("tuned", "gradient in closed form", _RmsNorm.apply, _lacks),
        Form("reference", "torch's", rms_norm_reference),
    ),
)
"""Its case: whether input and weight have one dtype, and the input more than one dim."""
