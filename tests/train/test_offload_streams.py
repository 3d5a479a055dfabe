"""When copies happen, which stream waits for which, and which tensors are on the device meanwhile: with stand-ins for CUDA's streams."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from swift_mega.device.device import Device
from swift_mega.train import offload

LAYERS = 5
CPU = torch.device("cpu")


class Place:
    """A tensor that a pending copy reads or writes. Like a pending copy on CUDA, it does not keep the memory alive."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.where = (tensor.storage_offset(), tensor.shape, tensor.stride())
        self.dtype = tensor.dtype

    def open(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        assert storage is not None, "memory was given back before its copy was over"
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.where)


class Computing:
    """The stream that computes: its work happens at once."""

    def __init__(self, side: "Side") -> None:
        self.side = side

    def wait_event(self, event: int) -> None:
        self.side.run(event)


class Side:
    """A stream whose copies happen as late as CUDA allows: when another stream waits for one. Until then targets have NaN."""

    def __init__(self) -> None:
        self.computing = Computing(self)
        self.copies: list[tuple[Place, Place]] = []
        self.done = 0
        self.current = self.ordered = False

    def wait_stream(self, other: object) -> None:
        assert other is self.computing
        self.ordered = True

    def record_event(self) -> int:
        return len(self.copies)

    def copy(self, source: Tensor, target: Tensor) -> None:
        assert self.current, "a copy on the computing stream"
        assert self.ordered, "a copy that does not wait for what the computing stream was given"
        self.ordered = False
        target.fill_(float("nan"))
        self.copies.append((Place(source), Place(target)))

    def run(self, until: int) -> None:
        while self.done < until:
            source, target = self.copies[self.done]
            target.open().copy_(source.open())
            self.done += 1

    @contextlib.contextmanager
    def use(self, stream: object) -> Iterator[None]:
        assert stream is self
        self.current = True
        yield
        self.current = False


@pytest.fixture
def side(monkeypatch: pytest.MonkeyPatch, cpu: Device) -> Side:
    side = Side()
    monkeypatch.setattr("torch.cuda.Stream", lambda device: side)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: side.computing)
    monkeypatch.setattr("torch.cuda.stream", side.use)
    monkeypatch.setattr(offload, "copy", side.copy)
    return side


class Block(torch.nn.Module):
    """Like a decoder's block: each layer saves its input, and nothing else."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.layers = layers
        self.input_tensor: Tensor | None = None
        self.final_layernorm: torch.nn.Module | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        for _ in range(self.layers):
            hidden = hidden.sin()
        return hidden if self.final_layernorm is None else self.final_layernorm(hidden)


class Chunk:
    """Like a part of the model."""

    def __init__(self, block: torch.nn.Module) -> None:
        self.decoder = block


def gradient(block: Block, start: Tensor) -> Tensor:
    leaf = start.clone().requires_grad_()
    block(leaf * 1).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def test_every_wait_is_there(side: Side) -> None:
    """Two microbatches in flight, as in a pipeline, with copies as late as they may be."""
    starts = [torch.randn(6, 1, 8), torch.randn(4, 1, 8)]
    want = [gradient(Block(), start) for start in starts]
    block = Block()
    offload.offload_layer_inputs([Chunk(block)], CPU)
    leaves = [start.clone().requires_grad_() for start in starts]
    sums = [block(leaf * 1).sum() for leaf in leaves]
    for each in sums:
        each.backward()
    assert all(torch.equal(leaf.grad, expected) for leaf, expected in zip(leaves, want, strict=True))
    side.run(len(side.copies))
    # The last input of the second microbatch was still on the device when it was needed.
    assert len(side.copies) == 2 * LAYERS + 2 * LAYERS - 1


def no_wait(self: Any, copied: Any) -> None:
    pass


def forget(self: Any) -> None:
    self.on_device = None


def unordered(self: Any, source: Tensor, target: Tensor) -> tuple[Tensor, Any]:
    with torch.cuda.stream(self.stream):
        offload.copy(source, target)
    return target, self.stream.record_event()


@pytest.mark.parametrize(
    "broken, wrong, message",
    [
        ("HostCopies.wait", no_wait, "given back before its copy was over|not the gradient"),
        ("OffloadedInput.give_back", forget, "given back before its copy was over"),
        ("HostCopies._copy", unordered, "does not wait for what the computing stream was given"),
    ],
)
def test_the_stand_in_sees_a_missing_wait(
    side: Side, monkeypatch: pytest.MonkeyPatch, broken: str, wrong: Any, message: str
) -> None:
    start = torch.randn(6, 1, 8)
    want = gradient(Block(), start)
    monkeypatch.setattr(f"swift_mega.train.offload.{broken}", wrong)
    block = Block()
    offload.offload_layer_inputs([Chunk(block)], CPU)
    with pytest.raises(AssertionError, match=message):
        assert torch.equal(gradient(block, start), want), "not the gradient"
        side.run(len(side.copies))


def logged(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The copies in order, each identified by its bytes: ("out" | "back", first number of the tensor)."""
    log: list[Any] = []
    copies = offload.HostCopies

    def out(self: Any, tensor: Tensor) -> Any:
        log.append(("out", tensor.numel()))
        return copies_to_host(self, tensor)

    def back(self: Any, host: Tensor) -> Any:
        log.append(("back", host.numel()))
        return copies_to_device(self, host)

    copies_to_host, copies_to_device = copies.to_host, copies.to_device
    monkeypatch.setattr(copies, "to_host", out)
    monkeypatch.setattr(copies, "to_device", back)
    return log


class Growing(Block):
    """A block in which the inputs of layers have different sizes: 1, 2, 3, … numbers."""

    def forward(self, hidden: Tensor) -> Tensor:
        for number in range(self.layers):
            hidden = hidden.sin()
            hidden = torch.cat([hidden, hidden.new_zeros(1)]) if number + 1 < self.layers else hidden
        return hidden


def test_one_layer_ahead(cpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last input is still on the device. The copy back of each other input starts when the input of the next layer is taken. At
    most two are there."""
    log, take = logged(monkeypatch), offload.OffloadedInput.take
    on_device: list[int] = []

    def watched(self: offload.OffloadedInput) -> Tensor:
        tensor, offloaded, there = take(self), self, 1  # the taken tensor, and the number of inputs on the device
        while (offloaded := offloaded.before) is not None:  # type: ignore[assignment]
            there += offloaded.on_device is not None
        log.append(("taken", tensor.numel()))
        on_device.append(there)
        return tensor

    monkeypatch.setattr(offload.OffloadedInput, "take", watched)
    block = Growing(4)
    offload.offload_layer_inputs([Chunk(block)], CPU)
    gradient(block, torch.randn(1))
    out = [("out", size) for size in (1, 2, 3, 4)]
    assert log[:4] == out
    assert log[4:] == [("back", 3), ("taken", 4), ("back", 2), ("taken", 3), ("back", 1), ("taken", 2), ("taken", 1)]
    assert on_device == [2, 2, 2, 1]


def test_forward_holds_one(cpu: Device) -> None:
    """Of the inputs saved so far, only the latest is on the device."""
    block = Block()
    copies = offload.offload_layer_inputs([Chunk(block)], CPU)
    result = block(torch.randn(3, requires_grad=True) * 1)
    there, offloaded = [], copies.leaving
    while offloaded is not None:
        there.append(offloaded.on_device is not None)
        offloaded = offloaded.before
    assert there == [True] + [False] * (LAYERS - 1)
    result.sum().backward()
    assert copies.leaving is None


def test_what_stays_on_the_device(cpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters and their views, tensors that are not floating point, and what a pipeline stage received."""

    class Mixed(Block):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 3))

        def forward(self, hidden: Tensor) -> Tensor:
            hidden = hidden.sin()  # saves the received tensor
            rows = torch.tensor([1, 0])
            return (hidden[rows] @ self.weight.t()[:3, :3]) * self.weight[0]

    log, block = logged(monkeypatch), Mixed()
    offload.offload_layer_inputs([Chunk(block)], CPU)
    block.input_tensor = torch.randn(2, 3, requires_grad=True)
    block(block.input_tensor).sum().backward()
    assert [move for move, _ in log if move == "out"] == ["out"] * 2, "the inputs of the product and of the scale"


def test_saved_twice_moves_once(cpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    class Square(Block):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden * hidden * hidden[0]  # the first row is another view: it is copied separately

    log, start = logged(monkeypatch), torch.randn(3, 2)
    want = gradient(Square(), start)
    block = Square()
    offload.offload_layer_inputs([Chunk(block)], CPU)
    assert torch.equal(gradient(block, start), want)
    assert sorted(size for move, size in log if move == "out") == [2, 6, 6]


def test_a_kept_graph_is_walked_again(cpu: Device) -> None:
    block, start = Block(), torch.randn(3)
    want = gradient(Block(), start)
    offload.offload_layer_inputs([Chunk(block)], CPU)
    leaf = start.clone().requires_grad_()
    total = block(leaf * 1).sum()
    total.backward(retain_graph=True)
    total.backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, want + want)


@pytest.mark.parametrize("why", ["eval", "no_grad", "final norm", "error"])
def test_nothing_else_moves(cpu: Device, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """Nothing in an evaluation, nothing that the final norm saves, and nothing saved outside the block, even after an error in it."""

    class Failing(torch.nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            if why == "error":
                raise KeyError("stopped")
            return hidden.sin()

    log, block = logged(monkeypatch), Block(0)
    block.final_layernorm = Failing()
    offload.offload_layer_inputs([Chunk(block)], CPU)
    leaf = torch.randn(3, requires_grad=True)
    if why in ("eval", "no_grad"):
        block.layers = 2
        block.train(why != "eval")
    stopped = pytest.raises(KeyError, match="stopped") if why == "error" else contextlib.nullcontext()
    with torch.set_grad_enabled(why != "no_grad"), stopped:
        block(leaf * 1)
    (leaf * 1).sin().sum().backward()
    assert log == []
