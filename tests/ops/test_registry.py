"""The registry of kernels: which form of an op is chosen, what is refused, and that reference forms are what they say."""

from typing import Any

import pytest
import torch
from torch import Tensor

from swift_mega.errors import UserError
from swift_mega.ops import attention as attention_module
from swift_mega.ops import blocks, gated_delta
from swift_mega.ops.alibi import slopes
from swift_mega.ops.attention import ATTENTION, AttentionCase, attention
from swift_mega.ops.attention_kernels import Choice
from swift_mega.ops.blocks import BLOCKS, Block, BlocksCase, Parts
from swift_mega.ops.causal_conv import CAUSAL_CONV
from swift_mega.ops.gated_delta import GATED_DELTA
from swift_mega.ops.kernels import AUTO, Form, Kernels, Op, Use
from swift_mega.ops.rmsnorm import RMS_NORM, rms_norm
from swift_mega.ops.rope import ROPE, rotate
from tests.ops.test_attention import _compare, _problem
from tests.ops.test_sinks import dense as dense_with_sinks

CPU, CUDA, REFERENCE = torch.device("cpu"), torch.device("cuda"), Kernels("reference")


def an_op(asked: list[Any]) -> Op:
    """Two fused forms, of which the second runs in float32 only, and a reference. `asked` records what the registry asks."""

    def lacks(device: torch.device, dtype: torch.dtype, case: Any) -> str | None:
        asked.append((device.type, dtype, case))
        return None if dtype == torch.float32 else "float32"

    return Op(
        "op",
        (
            Form("fused", "first", lambda: 1, lambda *given: "luck"),
            Form("fused", lambda device, dtype, case: f"second on {device.type} for {case}", lambda: 2, lacks),
            Form("reference", "torch", lambda: 3),
        ),
    )


def test_the_first_form_that_lacks_nothing() -> None:
    asked: list[Any] = []
    op = an_op(asked)
    for _ in range(3):
        assert AUTO.form(op, CPU, torch.float32, "x").run() == 2
    assert asked == [("cpu", torch.float32, "x")], "resolved once"
    assert AUTO.form(op, CPU, torch.float64).run() == 3
    assert (
        REFERENCE.form(op, CPU, torch.float32).run()
        == Kernels("fused", {"op": "reference"}).form(op, CPU, torch.float32).run()
        == 3
    )
    assert Kernels("reference", {"op": "fused"}).form(op, CPU, torch.float32).run() == 2
    assert AUTO.text(Use(op, "x"), CPU, torch.float32) == "second on cpu for x (fused; fused needs luck)"
    assert AUTO.text(Use(op), CPU, torch.float64) == "torch (reference; fused needs luck; fused needs float32)"
    assert REFERENCE.text(Use(op), CPU, torch.float64) == "torch (reference)"
    with pytest.raises(UserError, match="op has no fused form here: fused needs luck; fused needs float32"):
        Kernels("fused").form(op, CPU, torch.float64)


def test_a_run_that_asks_for_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ops that lack a fused form are named, with what each needs. Without touching the GPU, only those that have none at all."""
    uses = [Use(an_op([])), Use(RMS_NORM, True), Use(ATTENTION, AttentionCase(64)), Use(GATED_DELTA)]
    fused = Kernels("fused")
    with pytest.raises(UserError) as caught:
        fused.check(uses, CPU, torch.float64)
    assert str(caught.value) == (
        "train.kernels=fused, and these ops have none on CPU in float64: op (needs luck; needs float32), rms_norm (there is none), "
        "attention (needs CUDA), gated_delta (needs CUDA); set train.kernels=auto, which takes the best form that each op has, and "
        "train.kernels_by_op.OP=fused for those that must be fused"
    )
    with pytest.raises(UserError, match=r"these ops have none: rms_norm \(there is none\); set"):
        fused.check(uses, None, torch.bfloat16)
    of_cuda = [Use(ATTENTION, AttentionCase(64)), Use(BLOCKS, BlocksCase(64)), Use(GATED_DELTA)]
    monkeypatch.setattr(gated_delta, "_kernel", lambda: None)
    with pytest.raises(
        UserError, match=r"on CUDA in bfloat16: gated_delta \(needs flash-linear-attention, which is not"
    ):
        fused.check(of_cuda, CUDA, torch.bfloat16)
    monkeypatch.setattr(gated_delta, "_kernel", lambda: gated_delta_rule)
    fused.check(of_cuda, CUDA, torch.bfloat16)
    with pytest.raises(UserError, match=r"attention \(needs a kernel for such heads in this dtype\), attention_blocks"):
        fused.check(of_cuda, CUDA, torch.float64)
    by_op = Kernels("auto", {"attention": "fused"})
    by_op.check(of_cuda, CUDA, torch.bfloat16)
    with pytest.raises(
        UserError, match=r"kernels_by_op asks for fused forms, and .* on CPU in float32: attention \(needs CUDA"
    ):
        by_op.check(of_cuda, CPU, torch.float32)
    with pytest.raises(
        UserError, match=r"kernels_by_op\.rop=reference: this run has no such op; it has op, rms_norm, attention, gated"
    ):
        Kernels("auto", {"rop": "reference"}).check(uses, CPU, torch.float32)


def gated_delta_rule() -> None:
    """A stand-in for flash-linear-attention, which is not called."""


def test_which_forms_run_here() -> None:
    """By device and dtype, with the reason; attention's own choice is asked."""
    text = AUTO.text
    assert text(Use(RMS_NORM, True), CPU, torch.float32) == "gradient in closed form (tuned)"
    assert text(Use(RMS_NORM, True), CPU, torch.bfloat16).startswith(
        "torch's (reference; tuned needs the CPU, and float32"
    )
    assert text(Use(ROPE), CUDA, torch.bfloat16) == "gradient by the opposite rotation (tuned)"
    assert text(Use(CAUSAL_CONV), CUDA, torch.bfloat16) == "torch's (reference)"
    assert text(Use(GATED_DELTA), CPU, torch.float32) == "torch, by chunks (reference; fused needs CUDA)"
    half, case = torch.bfloat16, AttentionCase(64)
    assert text(Use(ATTENTION, case), CUDA, half) == "torch flash (fused)"
    assert text(Use(ATTENTION, case), CUDA, torch.float64).startswith("tiles in torch (tuned; fused needs a kernel for")
    blocked = "torch's CPU kernel, gradient by blocks of queries (tuned; fused needs CUDA)"
    assert (
        text(Use(ATTENTION, case), CPU, torch.float32)
        == text(Use(BLOCKS, BlocksCase(64)), CPU, torch.float32)
        == blocked
    )
    assert text(Use(ATTENTION, AttentionCase(64, softcap=True)), CPU, torch.float32).startswith("tiles in torch (tuned")
    assert text(Use(BLOCKS, BlocksCase(64)), CUDA, half) == "torch flash (fused)"
    assert text(Use(BLOCKS, BlocksCase(64, True)), CPU, half).startswith(
        "tiles in torch (reference; fused needs CUDA; tuned"
    )
    assert REFERENCE.text(Use(ATTENTION, case), CUDA, half) == "torch, one softmax per example (reference)"


# ------------------------------------------------------------------------------------------------ the reference forms

BOUNDS = (0, 3, 4, 11, 20)


@pytest.mark.parametrize("case", [
    {}, {"window": 1}, {"window": 4}, {"softcap": 1.5, "window": 4}, {"alibi": torch.tensor(slopes(6))},
], ids=str)  # fmt: skip
def test_the_reference_of_attention_is_one_softmax(case: dict[str, Any]) -> None:
    given = {"window": None, **case, "bounds": BOUNDS, "cu_seqlens": torch.tensor(BOUNDS), "scale": 0.4}
    _compare(attention, _problem(20, (6, 2), torch.float64), 1e-12, kernels=REFERENCE, **given)
    _compare(attention, _problem(20, (6, 2), torch.bfloat16), 5e-2, kernels=REFERENCE, **given)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_the_reference_of_attention_with_sinks(softcap: float | None) -> None:
    """And with values that are narrower than keys."""
    sizes = ((6, 8), (2, 8), (2, 5))
    inputs = [torch.randn(20, *size, dtype=torch.float64, requires_grad=True) for size in sizes]
    inputs.append(torch.randn(6, dtype=torch.float64, requires_grad=True))
    given: dict[str, Any] = {"bounds": BOUNDS, "scale": 0.4, "window": 4, "softcap": softcap}
    want = dense_with_sinks(*inputs, **given)
    got = attention(*inputs[:3], sinks=inputs[3], cu_seqlens=torch.tensor(BOUNDS), kernels=REFERENCE, **given)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    above = torch.randn_like(want)
    for found, expected in zip(
        torch.autograd.grad(got, inputs, above), torch.autograd.grad(want, inputs, above), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def nodes(of: Tensor) -> set[str]:
    """Names of the autograd nodes behind a tensor."""
    found, waiting = set(), [of.grad_fn]
    while waiting:
        if (node := waiting.pop()) is not None and node not in found:
            found.add(node)
            waiting += [before for before, _ in node.next_functions]
    return {node.name() for node in found}


def test_reference_forms_are_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradient of our own in the graph; the blocks of a ring in tiles, without torch's CPU kernel. `auto` has what is left out."""
    x, weight, tables = torch.randn(5, 2, 8, requires_grad=True), torch.ones(8), torch.rand(5, 1, 4)
    row: dict[str, Any] = {"bounds": (0, 5), "cu_seqlens": torch.tensor([0, 5]), "scale": 1.0, "window": None}
    for kernels, present in ((REFERENCE, False), (AUTO, True)):
        assert ("_RmsNormBackward" in nodes(rms_norm(x, weight, 1e-5, kernels))) is present
        assert ("_RotateBackward" in nodes(rotate(x, tables, tables, False, kernels))) is present
        assert ("_CpuAttentionBackward" in nodes(attention(x, x, x, kernels=kernels, **row))) is present

    def refuse(*given: Any, **more: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(blocks, "part_forward", refuse)
    monkeypatch.setattr(blocks, "gradients_of_keys", refuse)
    q, whole = x.detach(), [Block(0, 5, 0, 5, True)]
    parts, sums = Parts(q, 8), blocks.Gradients(*(torch.zeros_like(q) for _ in range(3)))
    blocks.forward(parts, q, q, q, whole, scale=1.0, kernels=REFERENCE)
    out, lse = parts.finished(None)
    blocks.backward(sums, q, q, q, q, out, lse, whole, scale=1.0, kernels=REFERENCE)
    with pytest.raises(ZeroDivisionError):
        blocks.forward(parts, q, q, q, whole, scale=1.0)
    with pytest.raises(ZeroDivisionError):
        blocks.backward(sums, q, q, q, q, out, lse, whole, scale=1.0)


def test_attention_asks_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that is not the CPU the form is `choose`'s: no kernel means tiles, without asking again."""
    monkeypatch.setattr(attention_module, "choose", lambda *given, **more: Choice("none"))
    monkeypatch.setattr(attention_module, "_by_tiles", lambda *given, **row: "tiles")
    x = torch.empty(4, 2, 8, device="meta")
    given: dict[str, Any] = {
        "bounds": (0, 4),
        "cu_seqlens": torch.empty(2, device="meta"),
        "scale": 1.0,
        "window": None,
    }
    assert attention(x, x, x, **given) == "tiles"
