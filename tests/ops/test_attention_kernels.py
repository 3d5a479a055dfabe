"""The CUDA kernels: which one is called, and with which arguments.

By number: the calls of every kernel, with stand-ins on the CPU that compute what its documentation says (kernel_stand_ins.py). By shape:
the whole dispatch, forward and backward, on tensors without data. The results of the real kernels need a GPU.
"""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from swift_mega.ops import attention as attention_module
from swift_mega.ops import attention_kernels as module
from swift_mega.ops import blocks, flex
from swift_mega.ops import flash as flash_module
from swift_mega.ops.alibi import LONGEST, slopes, with_positions
from swift_mega.ops.attention import attention, attention_kernel_name
from swift_mega.ops.attention_kernels import Choice, choose
from swift_mega.ops.blocks import Block, Gradients, Parts
from swift_mega.ops.flash_attn_kernels import flash_attn_2, flash_attn_3
from swift_mega.ops.kernel import Call
from swift_mega.ops.torch_kernels import LSE_WASTE, TORCH_EFFICIENT, TORCH_FLASH, efficient_runs
from tests.ops import kernel_stand_ins as stand_ins
from tests.ops.test_attention import _dense as dense
from tests.ops.test_sinks import dense as dense_with_sinks

FLASH_2 = flash_attn_2(stand_ins.flash_2_forward, stand_ins.flash_2_backward, "2.8")
FLASH_3 = flash_attn_3(stand_ins.flash_3_forward, stand_ins.flash_3_backward)
BOUNDS = (0, 3, 4, 11, 20)
CASES: list[dict[str, Any]] = [
    {},
    {"window": 1},
    {"window": 4, "sinks": True},
    {"softcap": 1.5},
    {"softcap": 1.5, "window": 4},
    {"alibi": True},
    {"value_dim": 5, "sinks": True},
    {"heads": (6, 6), "window": 9},
]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("kernel", "case"),
    [
        pytest.param(kernel, case, id=f"{kernel.name} {case}")
        for kernel in (FLASH_2, FLASH_3, TORCH_FLASH, TORCH_EFFICIENT)
        for case in CASES
        if kernel.softcap or "softcap" not in case  # `choose` gives other calls to other kernels
    ],
)
def test_calls_compute_the_definition(kernel, case, deterministic, monkeypatch, torch_operators):
    """Value and gradients to float64 rounding; heads of 9 or 17 features, which no kernel accepts; key heads one at a time."""
    monkeypatch.setattr(attention_module, "choose", lambda *given, **more: Choice(kernel.name, kernel))
    monkeypatch.setattr(flash_module, "AT_ONCE", 1 if deterministic else 1 << 40)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    heads, kv_heads = case.get("heads", (6, 2))
    torch.manual_seed(0)
    sizes = ((heads, 9), (kv_heads, 9), (kv_heads, case.get("value_dim", 9)))
    inputs = [torch.randn(20, *size, dtype=torch.float64, requires_grad=True) for size in sizes]
    above = torch.randn(20, heads, sizes[2][1], dtype=torch.float64)
    sinks = torch.randn(heads, dtype=torch.float64, requires_grad=True) if case.get("sinks") else None
    alibi = torch.tensor(slopes(heads)) if case.get("alibi") else None
    given = {"bounds": BOUNDS, "scale": 0.4, "window": case.get("window"), "softcap": case.get("softcap")}
    starts = torch.tensor(BOUNDS, dtype=torch.int32)
    got = attention_module._on_cuda(*inputs, alibi, sinks, cu_seqlens=starts, **given)
    if sinks is not None:
        want = dense_with_sinks(*inputs, sinks, **given)
        inputs.append(sinks)
    else:
        want = dense(*inputs, *given.values(), alibi)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    expected = torch.autograd.grad(want, inputs, above)
    for found, wanted in zip(torch.autograd.grad(got, inputs, above), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("bounds", "runs"),
    [
        ((0, 5), [(0, 1)]),
        ((0, 10, 20, 30), [(0, 3)]),
        ((0, *range(100, 111)), [(0, 4), (4, 11)]),
        ((0, 1, 2, 3, 1000), [(0, 4)]),
        ((0, 1, 2, 3, 4, 1000), [(0, 4), (4, 5)]),
    ],
)
def test_long_examples_beside_short_ones_make_no_large_log_sum_exp(bounds, runs):
    assert list(efficient_runs(bounds)) == runs
    for first, last in runs:
        longest = max(bounds[n + 1] - bounds[n] for n in range(first, last))
        assert longest * (last - first) <= LSE_WASTE * (bounds[last] - bounds[first])


def test_several_calls_of_the_memory_efficient_kernel(torch_operators):
    """One long example and many short ones: the results of two calls are merged."""
    bounds = (0, 40, *range(41, 61))
    assert len(list(efficient_runs(bounds))) > 1
    call = Call(torch.tensor(bounds, dtype=torch.int32), None, 40, 40, 0.4, True, None, bounds=bounds)
    q, k, v = (torch.randn(60, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    want = dense(q, k, v, bounds, 0.4, None)
    out, lse = TORCH_EFFICIENT.forward(q, k, v, call)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    above = torch.randn_like(out)
    found = TORCH_EFFICIENT.backward(above, q.detach(), k.detach(), v.detach(), out.detach(), lse.detach(), call)
    for one, other in zip(found, torch.autograd.grad(want, (q, k, v), above), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.bfloat16, LONGEST[torch.bfloat16]), (torch.float16, LONGEST[torch.float16])]
)
def test_positions_as_features_cost_less_than_the_dtype(dtype, size):
    """The last queries of the longest allowed example, steepest and flattest head of 32: positions as features against an exact bias.

    Both as a kernel computes them: float32 scores of narrow queries and keys, weights rounded to the dtype. Compared with float64.
    """
    torch.manual_seed(0)
    rows, scale, some = 32, 64**-0.5, torch.tensor([slopes(32)[-1], max(slopes(24))])
    q, k, v = (torch.randn(count, 2, 64).to(dtype) for count in (size, size, size))
    wide_q, wide_k = with_positions(q, k, some, bounds=(0, size), scale=scale)
    assert wide_q.shape[-1] == wide_k.shape[-1] == 72 and wide_q.dtype == wide_k.dtype == dtype
    distance = torch.arange(size - rows, size)[:, None] - torch.arange(size)

    def out(query: Tensor, key: Tensor, bias: Any, exact: torch.dtype) -> Tensor:
        scores = torch.einsum("qhd,khd->hqk", query[-rows:].to(exact), key.to(exact)) * scale + bias
        weights = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
        weights = weights if exact == torch.float64 else weights.to(dtype).float()
        return torch.einsum("hqk,khd->hqd", weights.double(), v.double())

    bias = -some.double()[:, None, None] * distance
    want = out(q, k, bias, torch.float64)
    of_bias, of_features = (
        ((found - want).norm() / want.norm()).item()
        for found in (out(q, k, bias.float(), torch.float32), out(wide_q, wide_k, 0.0, torch.float32))
    )
    assert of_features < 1.3 * of_bias, (of_features, of_bias)


# ------------------------------------------------------------------------------------------------ shapes, on both torch versions

HALF, WIDE = (torch.bfloat16, torch.float16), torch.float32
FLASH_OPS = {"aten::_flash_attention_forward", "aten::_flash_attention_backward"}
EFFICIENT_OPS = {"aten::_efficient_attention_forward", "aten::_efficient_attention_backward"}
ROWS: list[tuple[dict[str, Any], set[str]]] = [
    *(({"dtype": dtype, "dims": (size, size)}, FLASH_OPS) for dtype in HALF for size in (64, 80, 96, 128, 256)),
    ({"dims": (76, 76)}, FLASH_OPS),
    ({"dims": (192, 128), "heads": (8, 8)}, FLASH_OPS),
    ({"window": 64}, FLASH_OPS),
    ({"window": 64, "sinks": True}, FLASH_OPS),
    ({"alibi": True}, FLASH_OPS),
    ({"alibi": True, "dims": (256, 256)}, EFFICIENT_OPS),
    ({"dims": (320, 320)}, EFFICIENT_OPS),
    ({"softcap": 30.0, "window": 64}, set()),
    ({"dtype": WIDE}, EFFICIENT_OPS),
    ({"dtype": WIDE, "window": 64, "sinks": True}, EFFICIENT_OPS),
    ({"dtype": WIDE, "dims": (192, 128), "heads": (8, 8)}, EFFICIENT_OPS),
    ({"dtype": WIDE, "alibi": True}, EFFICIENT_OPS),
    ({"dtype": WIDE, "softcap": 30.0}, set()),
    ({"dtype": torch.float64, "window": 64, "sinks": True}, set()),
]
NAMES = [", ".join(f"{name} {value}" for name, value in case.items()) for case, _ in ROWS]
ROW = (0, 100, 101, 6000, 16384)


class Recorder(TorchDispatchMode):
    """Records the attention operators that are called, and the size of the largest tensor that any operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if "attention" in name:
            self.called.add(name)
        if name == "aten::_efficient_attention_backward":  # torch's own function of shapes lacks the argument `out`
            out = *(torch.empty_like(x) for x in args[1:4]), None
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            self.largest = max(self.largest, tensor.numel() if isinstance(tensor, Tensor) else 0)
        return out


def _without_data(case: dict[str, Any], device: str) -> tuple[list[Tensor], dict[str, Any]]:
    def empty(*size: int, dtype: torch.dtype) -> Tensor:
        # Not torch.empty: without a GPU, the facade of swift_mega.device.device gives CPU tensors for "cuda".
        return torch.ops.aten.empty.memory_format(size, dtype=dtype, device=device)

    dtype, (heads, kv_heads) = case.get("dtype", torch.bfloat16), case.get("heads", (8, 2))
    key_dim, value_dim = case.get("dims", (64, 64))
    inputs = [
        empty(ROW[-1], *size, dtype=dtype) for size in ((heads, key_dim), (kv_heads, key_dim), (kv_heads, value_dim))
    ]
    given = {
        "bounds": ROW,
        "cu_seqlens": empty(len(ROW), dtype=torch.int32),
        "scale": 0.1,
        "window": case.get("window"),
        "softcap": case.get("softcap"),
        "alibi": empty(heads, dtype=torch.float32) if case.get("alibi") else None,
    }
    if case.get("sinks"):
        inputs.append(empty(heads, dtype=dtype))
    return inputs, given


@pytest.mark.parametrize(("case", "operators"), ROWS, ids=NAMES)
def test_what_is_called_and_how_large_it_gets(case, operators):
    """On meta tensors, with autograd: an operator accepts our arguments, shapes fit, and no tensor has the size [tokens, tokens]."""
    inputs, given = _without_data(case, "meta")
    inputs = [x.requires_grad_() for x in inputs]
    with Recorder() as recorder:
        out = attention(*inputs[:3], **given, sinks=inputs[3] if len(inputs) > 3 else None)
        found = torch.autograd.grad(out, inputs, torch.empty_like(out))
    assert out.shape == (ROW[-1], inputs[0].shape[1], inputs[2].shape[-1]) and out.dtype == inputs[0].dtype
    assert [x.shape for x in found] == [x.shape for x in inputs] and all(x.dtype == inputs[0].dtype for x in found)
    assert recorder.called == operators
    assert recorder.largest <= ROW[-1] ** 2 / 4


@pytest.mark.parametrize(
    ("dtype", "softcap", "operators"),
    [
        (torch.bfloat16, None, FLASH_OPS),
        (torch.bfloat16, 30.0, set()),
        (WIDE, None, set()),
        (torch.float64, None, set()),
    ],
)
def test_blocks_of_a_ring(dtype, softcap, operators):
    """A causal diagonal, and older keys after a window. Sizes are copied to the device once, not for every layer."""
    q, k, v = (torch.empty(4096, *size, device="meta", dtype=dtype) for size in ((8, 192), (2, 192), (2, 128)))
    row = [
        Block(0, 2048, 0, 2048, True),
        Block(2048, 1024, 2048, 2048, False, 1500),
        Block(3072, 1024, 0, 4096, False, None),
    ]
    sums = Gradients(*(torch.empty_like(x, dtype=torch.float64 if dtype == torch.float64 else WIDE) for x in (q, k, v)))
    with Recorder() as recorder:
        for layer in range(2):
            parts, before = Parts(q, 128), blocks._starts.cache_info().misses
            blocks.forward(parts, q, k, v, row, scale=0.1, softcap=softcap)
            out, lse = parts.finished(None)
            blocks.backward(sums, torch.empty_like(out), q, k, v, out, lse, row, scale=0.1, softcap=softcap)
            assert layer == 0 or blocks._starts.cache_info().misses == before
    assert out.shape == (4096, 8, 128) and lse.shape == (8, 4096)
    assert recorder.called == operators
    assert recorder.largest <= 8 * 4096 * 1024


@pytest.mark.skipif(not torch.version.cuda, reason="a CPU build of torch makes no views of fake CUDA tensors")
@pytest.mark.parametrize(("case", "operators"), [row for row in ROWS if row[1]])
def test_fake_cuda_tensors(case, operators, monkeypatch):
    """The same on fake tensors of device "cuda". Both halves of the autograd function are called by hand, because autograd itself
    needs a GPU."""
    runs: list[Any] = []

    class Context:
        def save_for_backward(self, *tensors: Any) -> None:
            self.saved_tensors = tensors

    for cls in (flash_module._Flash, attention_module._ByBlocks):

        def apply(*given: Any, cls: Any = cls) -> Tensor:
            context = Context()
            out = cls.forward(context, *given)
            runs.append((cls, context, out))
            return out

        monkeypatch.setattr(cls, "apply", apply)
    with FakeTensorMode(), torch.no_grad():
        inputs, given = _without_data(case, "cuda")
        with Recorder() as recorder:
            out = attention(*inputs[:3], **given, sinks=inputs[3] if len(inputs) > 3 else None)
            ((cls, context, inner),) = runs
            cls.backward(context, torch.empty_like(inner))
    assert out.device.type == "cuda" and recorder.called == operators


@pytest.mark.parametrize(
    ("name", "first"),
    [
        (
            "_flash_attention_forward",
            "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask",
        ),
        (
            "_flash_attention_backward",
            "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal rng_state unused",
        ),
        (
            "_efficient_attention_forward",
            "query key value bias cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p custom_mask_type compute_log_sumexp",
        ),
        (
            "_efficient_attention_backward",
            "grad_out_ query key value bias out cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k logsumexp dropout_p philox_seed "
            "philox_offset custom_mask_type bias_requires_grad",
        ),
    ],
)
def test_schemas_of_the_installed_torch(name, first):
    """Positional arguments of our calls have the expected names; the others have defaults. The stand-ins have the operators' parameter
    names."""
    arguments = getattr(torch.ops.aten, name).default._schema.arguments
    names = [one.name for one in arguments]
    assert names[: len(first.split())] == first.split()
    assert all(one.kwarg_only and one.has_default_value() for one in arguments[len(first.split()) :])
    stand_in = inspect.signature(stand_ins.OPERATORS[name]).parameters
    assert set(stand_in) - {"given"} <= set(names)


def test_the_stand_ins_have_the_parameters_of_an_installed_flash_attn():
    flash = pytest.importorskip("flash_attn.flash_attn_interface")
    for real, ours in (
        (flash._flash_attn_varlen_forward, stand_ins.flash_2_forward),
        (flash._flash_attn_varlen_backward, stand_ins.flash_2_backward),
    ):
        assert set(inspect.signature(ours).parameters) <= set(inspect.signature(real).parameters)


# ------------------------------------------------------------------------------------------------ the choice


def test_who_serves(monkeypatch):
    """The order of the table, with and without flash-attn, on several GPUs."""
    device, half = torch.device("cuda"), torch.bfloat16
    installed: dict[str, Any] = {"2": None, "3": None}
    monkeypatch.setattr(module, "installed_flash_attn_2", lambda: installed["2"])
    monkeypatch.setattr(module, "installed_flash_attn_3", lambda: installed["3"])

    def name(dtype: torch.dtype, capability: tuple[int, int] = (9, 0), head_dim: int = 128, **given: Any) -> str:
        module._kernels.cache_clear()
        monkeypatch.setattr(module, "_capability", lambda device: capability)
        return choose(device, dtype, head_dim, **given).name

    assert name(half) == name(half, sinks=True) == "torch flash"
    assert name(half, head_dim=257) == "torch memory-efficient"
    assert name(half, alibi=True) == "torch flash, ALiBi as features"
    assert name(half, alibi=True, longest=LONGEST[half] + 1) == "tiles in torch"
    assert name(half, softcap=True).startswith("tiles in torch (no GPU")
    monkeypatch.setattr(flex, "refusal", lambda *given: None)
    assert name(half, softcap=True) == "flex_attention" and name(half, softcap=True, sinks=True) == "tiles in torch"
    assert name(torch.float32) == "torch memory-efficient" and name(torch.float32, softcap=True) == "tiles in torch"
    assert name(torch.float64) == name(torch.bfloat16, (7, 5)) == "tiles in torch"
    assert name(torch.float16, (7, 5)) == "torch memory-efficient"
    installed["2"] = FLASH_2
    assert (
        name(half, softcap=True) == name(half, alibi=True) == name(half, alibi=True, longest=99999) == "flash-attn 2.8"
    )
    installed["3"] = FLASH_3
    assert name(half) == "flash-attn 3" and name(half, (8, 0)) == "flash-attn 2.8"
    torch.use_deterministic_algorithms(True)
    try:
        assert name(half) == "flash-attn 2.8"  # flash-attn 3 has no deterministic gradient of 256 features
    finally:
        torch.use_deterministic_algorithms(False)
    module._kernels.cache_clear()


def test_names_for_the_header_of_a_run():
    cpu = torch.device("cpu")
    assert attention_kernel_name(cpu, torch.float32, 64) == "torch's CPU kernel, gradient by blocks of queries"
    assert attention_kernel_name(cpu, torch.float32, 64, softcap=True) == "tiles in torch"
    cuda = torch.device("cuda")
    assert attention_kernel_name(cuda, torch.float32, 64) == "torch memory-efficient"
    # That op takes no blocks of keys, and neither does flex_attention.
    assert attention_kernel_name(cuda, torch.float32, 64, ring=True) == "tiles in torch"
    assert attention_kernel_name(cuda, torch.bfloat16, 64, ring=True) == "torch flash"
    assert attention_kernel_name(cuda, torch.bfloat16, 64, softcap=True, ring=True) == "tiles in torch"
