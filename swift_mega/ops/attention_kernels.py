"""CUDA attention kernels for packed rows behind one signature, and the choice between them.

Every kernel is a pair of functions. forward returns the output and its log-sum-exp; backward computes the gradients from those two.
Because the log-sum-exp is returned, one autograd function (ops/flash.py) can add sinks, and the parts of a softmax that come from other
ranks can be merged (ops/blocks.py).

| kernel | dtypes | head_dim | soft-cap | ALiBi | grouped keys | needs |
|---|---|---|---|---|---|---|
| flash-attn 3 | bf16, fp16 | to 256 | yes | by features | yes | Hopper, `flash_attn_interface` of 2025-11 or newer |
| flash-attn 2 | bf16, fp16 | to 256 | yes | yes | yes | Ampere or newer, `flash_attn` 2.7 or newer |
| torch flash | bf16, fp16 | to 256 | no | by features | yes | Ampere or newer |
| torch memory-efficient | bf16, fp16, fp32 | any | no | by features | expanded | bf16: Ampere or newer |

`choose` takes the first that fits, from the top. Where none fits: flex_attention for soft-capped scores in bf16 and fp16 (ops/flex.py),
else tiles in torch (ops/blocks.py). float64 always gets tiles. torch's `scaled_dot_product_attention` is not used on CUDA: with one call
per example, cuDNN builds a graph for each new length; with one call per row, it needs a [tokens, tokens] mask.
"""

import functools
from dataclasses import dataclass

import torch

from swift_mega.ops import alibi as features
from swift_mega.ops import flex
from swift_mega.ops.flash_attn_kernels import installed_flash_attn_2, installed_flash_attn_3
from swift_mega.ops.kernel import HALF, Kernel
from swift_mega.ops.torch_kernels import EFFICIENT, TORCH_EFFICIENT, TORCH_FLASH

TILES = "tiles in torch"


@dataclass(frozen=True)
class Choice:
    """What computes attention: a kernel, flex_attention, or tiles in torch (neither field set)."""

    name: str
    """Shown in the header of a run."""
    kernel: Kernel | None = None
    flex: bool = False


def choose(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    softcap: bool = False,
    alibi: bool = False,
    sinks: bool = False,
    longest: int = 0,
) -> Choice:
    """What computes attention on this CUDA device. head_dim: of queries and keys.

    longest: tokens of the longest example. It limits ALiBi as features.
    """
    for kernel in _kernels(_capability(device), dtype, torch.are_deterministic_algorithms_enabled()):
        own = alibi and not kernel.alibi
        wide = head_dim + (features.FEATURES if own else 0)
        if (softcap and not kernel.softcap) or (kernel.name != EFFICIENT and wide > 256):
            continue
        if own and longest > features.LONGEST.get(dtype, longest):
            continue
        return Choice(kernel.name + (", ALiBi as features" if own else ""), kernel)
    if softcap and not sinks and dtype in HALF:
        refused = flex.refusal(device, dtype, head_dim)
        if refused is None:
            return Choice("flex_attention", flex=True)
        return Choice(f"{TILES} ({refused})")
    return Choice(TILES)


def kernel_for_blocks(device: torch.device, dtype: torch.dtype, head_dim: int, *, softcap: bool) -> Kernel | None:
    """The kernel for attention to parts of the keys on this CUDA device (ops/blocks.py). None: tiles in torch."""
    kernel = choose(device, dtype, head_dim, softcap=softcap, sinks=True).kernel
    return kernel if kernel is not None and kernel.blocks else None


def attention_kernel_name(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    softcap: bool = False,
    alibi: bool = False,
    sinks: bool = False,
    ring: bool = False,
) -> str:
    """What computes attention in such a layer, in words for the header of a run, for example "torch flash".

    ring: keys are spread over ranks, so that a call takes blocks of them (ops/blocks.py).
    """
    if device.type == "cuda" and ring:
        kernel = kernel_for_blocks(device, dtype, head_dim, softcap=softcap)
        return TILES if kernel is None else kernel.name
    if device.type == "cuda":
        return choose(device, dtype, head_dim, softcap=softcap, alibi=alibi, sinks=sinks).name
    if softcap or (dtype in HALF and sinks):
        return TILES
    return "torch's CPU kernel" + ("" if dtype in HALF else ", gradient by blocks of queries")


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Compute capability. Without a GPU, where only shapes are traced: that of Hopper."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (9, 0)


@functools.cache
def _kernels(capability: tuple[int, int], dtype: torch.dtype, deterministic: bool) -> tuple[Kernel, ...]:
    """The available kernels for a dtype, best first."""
    found: list[Kernel | None] = []
    if dtype in HALF and capability >= (8, 0):
        # flash-attn 3 has a deterministic gradient only up to head_dim 192, so deterministic runs use other kernels.
        if capability[0] == 9 and not deterministic:
            found.append(installed_flash_attn_3())
        found += [installed_flash_attn_2(), TORCH_FLASH]
    if dtype in (*HALF, torch.float32) and (dtype != torch.bfloat16 or capability >= (8, 0)):
        found.append(TORCH_EFFICIENT)
    return tuple(kernel for kernel in found if kernel is not None)
