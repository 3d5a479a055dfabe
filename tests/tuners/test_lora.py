"""An adapter of a fused linear equals separate PEFT-style adapters of its parts, value and gradients, in float64."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from swift_mega.config import schema
from swift_mega.models.packs import COLUMN, GATE_UP, GATED_QKV, QKV, ROW, Heads, Pack
from swift_mega.tuners.lora import Adapter

HEADS = Heads(2, 4)
NAMES = {
    QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    GATED_QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    GATE_UP: ("mlp.gate_proj", "mlp.up_proj"),
    COLUMN: ("mlp.up_proj",),
    ROW: ("mlp.down_proj",),
}
TOKENS, INPUT, RANK = 5, 12, 3


def _adapter(pack: Pack, rows: int, chosen: tuple[bool, ...]) -> Adapter:
    weight = torch.nn.Parameter(torch.zeros(rows, INPUT, dtype=torch.float64), requires_grad=False)
    parts = [f"model.layers.0.{name}.weight" for name in NAMES[pack]]
    named = SimpleNamespace(parameter=weight, rule=SimpleNamespace(pack=pack), expert=False, parts=parts)
    target: Any = SimpleNamespace(named=named, parts=chosen)
    settings = schema.Lora(rank=RANK, alpha=2 * RANK)
    adapter = Adapter(target, settings=settings, heads=HEADS, size=1, rank=0, sequence=False)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return adapter


def _separate(adapter: Adapter, pack: Pack, x: Tensor, out: Tensor) -> Tensor:
    """Selects each part's outputs in the fused output by index, and adds the result of the part's own adapter."""
    numbers = pack.split(torch.arange(out.shape[-1]), HEADS)
    for name, places in zip(adapter.names, numbers, strict=True):
        if name in adapter.up:
            out = out.index_add(-1, places, 2.0 * (x @ adapter.down[name].t() @ adapter.up[name].t()))
    return out


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize(
    ("pack", "rows", "chosen"),
    [
        (QKV, 48, (True, True, True)),  # three groups: query, key and value alternate
        (QKV, 48, (True, False, True)),
        (QKV, 48, (False, True, False)),
        (QKV, 16, (True, True, True)),  # one group: one after another
        (GATED_QKV, 48, (True, True, True)),
        (GATED_QKV, 24, (True, True, True)),  # one group: one after another, but the queries in another order
        (GATED_QKV, 24, (True, False, False)),
        (GATED_QKV, 24, (False, True, True)),
        (GATE_UP, 20, (True, True)),
        (GATE_UP, 20, (False, True)),
        (COLUMN, 20, (True,)),
        (ROW, 20, (True,)),
    ],
)
def test_fused_equals_separate_adapters(pack, rows, chosen, view):
    """view: the linear's output is a view of another tensor, which must not change."""
    torch.manual_seed(0)
    adapter = _adapter(pack, rows, chosen)
    x = torch.randn(TOKENS, 1, INPUT, dtype=torch.float64, requires_grad=True)
    base = torch.randn(2 * TOKENS, 1, rows, dtype=torch.float64, requires_grad=True)
    made = base * 1.0
    kept = made.detach().clone()
    pieces = made.split(TOKENS) if view else (base[:TOKENS] * 1.0,)
    got = adapter(x, pieces[0])
    want = _separate(adapter, pack, x, base[:TOKENS])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert torch.equal(made, kept)
    above, parameters = torch.randn_like(got), tuple(adapter.parameters())
    found = torch.autograd.grad(got, (x, base, *parameters), above)
    expected = torch.autograd.grad(want, (x, base, *parameters), above)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_frozen_input_gets_no_gradient():
    """The first layer's input comes from a frozen embedding: no gradient is computed for it."""
    adapter = _adapter(COLUMN, 20, (True,))
    x, out = torch.randn(TOKENS, 1, INPUT, dtype=torch.float64), torch.zeros(TOKENS, 1, 20, dtype=torch.float64)
    adapter(x, out).sum().backward()
    assert x.grad is None and all(parameter.grad is not None for parameter in adapter.parameters())


def test_no_tokens():
    """An expert may get no token."""
    adapter = _adapter(COLUMN, 20, (True,))
    x = torch.zeros(0, INPUT, dtype=torch.float64, requires_grad=True)
    result = adapter(x, torch.zeros(0, 20, dtype=torch.float64))
    result.sum().backward()
    assert result.shape == (0, 20) and x.grad is not None and x.grad.shape == (0, INPUT)
