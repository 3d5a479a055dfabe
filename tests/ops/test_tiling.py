"""Tiles change neither values nor gradients, keep only the input, and give each parameter its gradient once."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swift_mega.ops.tiling import tiled
from tests.largest import Largest

TOKENS, WIDTH, INNER = 23, 6, 40


class Mlp(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up, self.down = nn.Linear(WIDTH, INNER, dtype=dtype), nn.Linear(INNER, WIDTH, dtype=dtype)
        self.unused = nn.Parameter(torch.zeros(2, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def problem(dtype: torch.dtype = torch.float64, tokens: int = TOKENS) -> tuple[Mlp, Tensor, Tensor]:
    """A module, its input, and the gradient of its output."""
    mlp = Mlp(dtype)
    return (
        mlp,
        torch.randn(tokens, 1, WIDTH, dtype=dtype, requires_grad=True),
        torch.randn(tokens, 1, WIDTH, dtype=dtype),
    )


def trained(mlp: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in mlp.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("tile", [1, 5, 23, 100])
@pytest.mark.parametrize("frozen", [(), ("up",), ("up", "down"), ("x",)])
def test_values_and_gradients(tile: int, frozen: tuple[str, ...]) -> None:
    """Equal to the module on all tokens, for trained parameters; None for parameters that are not used."""
    mlp, x, above = problem()
    for name in frozen:
        (x if name == "x" else getattr(mlp, name)).requires_grad_(False)
    wanted = [*([x] if x.requires_grad else []), *trained(mlp)]
    plain = mlp(x)
    expected = torch.autograd.grad(plain, wanted, above, allow_unused=True)
    out = tiled(mlp, x, trained(mlp), tile)
    found = torch.autograd.grad(out, wanted, above, allow_unused=True)
    torch.testing.assert_close(out, plain, rtol=0, atol=1e-14)
    for have, want, of in zip(found, expected, wanted, strict=True):
        assert (have is None) == (want is None) == (of is mlp.unused)
        if have is not None:
            torch.testing.assert_close(have, want, rtol=0, atol=1e-13)


def test_without_gradients_there_is_no_graph() -> None:
    mlp, x, _ = problem()
    with torch.no_grad():
        assert tiled(mlp, x, trained(mlp), 5).grad_fn is None
    mlp.requires_grad_(False)
    assert tiled(mlp, x.detach(), [], 5).grad_fn is None


def test_a_row_without_tokens() -> None:
    mlp, x, _ = problem(tokens=0)
    out = tiled(mlp, x, trained(mlp), 5)
    out.sum().backward()
    assert out.shape == x.shape and x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("tile", [5, 100])
def test_each_parameter_gets_its_gradient_once(tile: int) -> None:
    """The hook on AccumulateGrad, as Megatron's DDP uses it, is called once in a backward pass, with the whole sum."""
    mlp, x, above = problem()
    mlp.unused.requires_grad_(False)
    calls: dict[str, int] = {}
    keep = []
    for name, parameter in mlp.named_parameters():
        if name == "unused":
            continue
        node = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
        node.register_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
        keep.append(node)
    tiled(mlp, x, trained(mlp), tile).backward(above)
    assert calls == {f"{linear}.{kind}": 1 for linear in ("up", "down") for kind in ("weight", "bias")}


def test_a_gradient_that_two_parameters_share() -> None:
    """Autograd returns one tensor for both parameters: adding a tile's gradient to one must not add it to the other."""
    a, b = (torch.zeros(WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x = torch.ones(4, WIDTH, dtype=torch.float64)
    tiled(
        lambda piece: piece.sum(0, keepdim=True).expand_as(piece) * 0 + piece + (a + b), x, [a, b], 1
    ).sum().backward()
    assert a.grad is not None and b.grad is not None
    assert a.grad.tolist() == b.grad.tolist() == [4.0] * WIDTH


class Fused(torch.autograd.Function):
    """Like Megatron's linears with gradient_accumulation_fusion: adds the gradient to main_grad, and returns a placeholder."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        weight.main_grad += gradients[0].flatten(0, -2).t() @ x.flatten(0, -2)
        weight.grad_added_to_main_grad = True
        return gradients[0] @ weight, torch.full_like(weight, torch.nan)


def test_gradients_that_a_linear_adds_to_main_grad() -> None:
    """Each tile's gradient is added to main_grad. One placeholder is returned, for the hook that must be called."""
    weight = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.float64))
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight), False
    x = torch.randn(TOKENS, 1, WIDTH, dtype=torch.float64, requires_grad=True)
    out = tiled(lambda piece: Fused.apply(piece, weight), x, [weight], 5)
    out.sum().backward()
    wanted = torch.ones(TOKENS, WIDTH, dtype=torch.float64).t() @ x.detach()[:, 0]
    torch.testing.assert_close(weight.main_grad, wanted, rtol=0, atol=1e-13)
    assert weight.grad is not None and weight.grad.isnan().all() and x.grad is not None and not x.grad.isnan().any()


def test_bfloat16_gradients_are_summed_in_float32() -> None:
    """4096 tiles with equal gradients: a bfloat16 sum would stop at 256 of them."""
    weight = nn.Parameter(torch.ones(1, WIDTH, dtype=torch.bfloat16))
    tiled(lambda piece: piece * weight, torch.ones(4096, WIDTH, dtype=torch.bfloat16), [weight], 1).sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16
    assert weight.grad.tolist() == [[4096.0] * WIDTH]


def test_random_numbers_are_drawn_once() -> None:
    """A recomputed tile drops the same numbers, and later random numbers do not change."""
    mlp, x, above = problem()

    def dropping(piece: Tensor) -> Tensor:
        return mlp(F.dropout(piece, 0.5))

    def remember() -> Any:
        state = torch.get_rng_state()

        @contextmanager
        def again() -> Iterator[None]:
            now = torch.get_rng_state()
            torch.set_rng_state(state)
            yield
            torch.set_rng_state(now)

        return again

    found = []
    for call in (
        lambda: tiled(dropping, x, trained(mlp), 5, remember=remember),
        lambda: torch.cat([dropping(piece) for piece in x.split(5)]),
    ):
        torch.manual_seed(7)
        out = call()
        found.append([out.detach(), *torch.autograd.grad(out, [x, mlp.up.weight], above), torch.rand(2)])
    for have, want in zip(*found, strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=1e-13)


def test_memory() -> None:
    """Only the input is kept. No tensor is larger than the input, while the module alone makes one of INNER / WIDTH times its size."""
    for tokens, tile in itertools.product((64, 640), (8,)):
        mlp, x, above = problem(tokens=tokens)
        kept: list[int] = []

        def keep(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(tensor.data_ptr())
            return tensor

        with Largest() as largest:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                out = tiled(mlp, x, trained(mlp), tile)
            out.backward(above)
        assert kept == [x.data_ptr()]
        assert largest.numbers == max(tokens * WIDTH, tile * INNER)
        with Largest() as plain:
            mlp(x)
        assert plain.numbers == tokens * INNER
