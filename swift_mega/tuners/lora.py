"""LoRA on Megatron's linears (Hu et al. 2021, arXiv:2106.09685), equal to PEFT's LoRA on the unfused Hugging Face linears.

Every Hugging Face linear inside a fused Megatron linear has its own factors, `down` [rank, in] and `up` [out, rank]. The Pack that
arranges the weight in the fused linear also arranges the `up` factors. Parts with contiguous outputs (gate, up) are one product each.
Interleaved parts (query, key, value of several groups) become one matrix [out, parts * rank], in which each part has its own columns.
So a fused linear costs a few small products, and activations are never permuted. Only tensors of width `rank` are sent between ranks.

With more tensor ranks than key heads, a rank's rows of linear_qkv are not an equal fraction of query, key and value, and may contain no
rows of one of them. The `up` factors are still sharded evenly, so that every rank stores the same amount. They are gathered for use, and
each rank takes the rows that its outputs need.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor, nn

from swift_mega.config import schema
from swift_mega.convert.files.tensors import TensorSource
from swift_mega.models import settings as model_settings
from swift_mega.models.build import ModelPart, NamedParameter
from swift_mega.models.family import Family, Rule
from swift_mega.models.packs import COLUMN, REPLICATED, ROW, Fused, Heads, Pack
from swift_mega.parallel.groups import EXPERT_INPUT
from swift_mega.tuners.lora_files import MergedLora, read_adapter
from swift_mega.tuners.merged import Merged
from swift_mega.tuners.targets import ALL, Target, adapted_linears, check_targets, find_targets, linear_names
from swift_mega.tuners.tuner import Tuner


def _thin(x: Tensor, narrow: Tensor) -> Tensor:
    """x @ narrow.T for x [tokens, in] and a narrow [rank, in]: the transpose of narrow @ x.T.

    On the CPU (MKL), products with few columns can run at a fifth of the speed of products with few rows. This form is 1.4 to 4 times
    faster at rank 8.
    """
    return (narrow @ x.t()).t()


class _Down(torch.autograd.Function):
    """x @ cat(factors).T, [tokens, 1, parts * rank]; x: [tokens, ..., in]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *factors: Tensor) -> Tensor:
        down = factors[0] if len(factors) == 1 else torch.cat(factors)
        ctx.save_for_backward(x, down)
        ctx.parts = len(factors)
        # Contiguous, since the next operation may be a collective. The copy is cheap: the tensor has few columns.
        return _thin(x.flatten(0, -2), down).contiguous().view(*x.shape[:-1], len(down))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, down = ctx.saved_tensors
        grad = gradients[0].flatten(0, -2)
        grad_x = (grad @ down).view_as(x) if ctx.needs_input_grad[0] else None
        return grad_x, *(grad.t() @ x.flatten(0, -2)).chunk(ctx.parts)


class _Up(torch.autograd.Function):
    """out + scale * a @ up.T, computed in place in `out`, which the linear that made it does not need any more.

    The factors are joined into matrices here, and their gradients are split again, without an autograd node for each factor.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, a: Tensor, adapter: "Adapter", *factors: Tensor) -> Tensor:
        ups = adapter.matrices(factors)
        ctx.save_for_backward(a, *ups)
        ctx.adapter = adapter
        # autograd refuses an in-place write to a view: the rows of one expert, or the result of a reduction over one rank.
        if out._is_view():
            out = out.clone()
        else:
            ctx.mark_dirty(out)
        narrow = a.flatten(0, -2)
        for (rows, columns), up in zip(adapter.blocks, ups, strict=True):
            out.view(-1, out.shape[-1])[:, rows].addmm_(narrow[:, columns], up.t(), alpha=adapter.scale)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        a, *ups = ctx.saved_tensors
        adapter: Adapter = ctx.adapter
        grad = gradients[0].reshape(-1, gradients[0].shape[-1])
        narrow = a.flatten(0, -2) * adapter.scale
        grad_a, grad_ups = torch.empty_like(narrow), []
        for (rows, columns), up in zip(adapter.blocks, ups, strict=True):
            torch.mul(_thin(grad[:, rows], up.t()), adapter.scale, out=grad_a[:, columns])
            grad_ups.append((narrow[:, columns].t() @ grad[:, rows]).t())
        return gradients[0], grad_a.view_as(a), None, *adapter.factors(grad_ups)


class _ExpertDown(torch.autograd.Function):
    """x @ down.T for an expert that is sharded over expert-tensor ranks, each of which has the same tokens and a part of the gradient.

    The dispatcher sums the gradient of x over these ranks, so x gets this rank's part. The gradient of `down` is all-reduced here.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, group: Any) -> Tensor:
        ctx.save_for_backward(x, down)
        ctx.group = group
        return x @ down.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, down = ctx.saved_tensors
        whole = grad.contiguous().clone()
        torch.distributed.all_reduce(whole, group=ctx.group)
        return grad @ down, whole.t() @ x, None


class _ExpertUp(torch.autograd.Function):
    """a @ up.T where each expert-tensor rank has a partial sum of `a`, and the dispatcher sums the results over these ranks.

    For the gradient of `up`, the partial sums of `a` are all-reduced.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, up: Tensor, group: Any) -> Tensor:
        ctx.save_for_backward(a, up)
        ctx.group = group
        return a @ up.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        a, up = ctx.saved_tensors
        whole = a.contiguous().clone()
        torch.distributed.all_reduce(whole, group=ctx.group)
        return grad @ up, grad.t() @ whole, None


class Adapter(nn.Module):
    """The adapter of one Megatron linear, or of one expert of a grouped linear. Its output is added to the linear's."""

    off = False
    """Whether the linear gives its own output alone (`Lora.reference`)."""

    def __init__(
        self, target: Target, *, settings: schema.Lora, heads: Heads, size: int, rank: int, sequence: bool
    ) -> None:
        """size, rank: of the mesh axis that shards the linear. sequence: activations are sharded by tokens (sequence parallelism)."""
        super().__init__()
        weight, self.heads = target.named.parameter, heads
        # A Hugging Face linear that is itself fused has one pair of factors; its `up` has the row order of the Hugging Face weight.
        laid_out = target.named.rule.pack.linear
        self.pack = COLUMN if isinstance(laid_out, Fused) else laid_out
        self.row, self.expert = self.pack.axis == 1, target.named.expert
        self.size, self.rank, self.sequence = size, rank, sequence and not self.expert
        self.lora_rank = settings.rank
        self.scale = settings.alpha / (math.sqrt(settings.rank) if settings.rslora else settings.rank)
        self.dropout = settings.dropout
        self.outs = [part.shape[0] for part in self.pack.split(torch.empty(weight.shape, device="meta"), heads)]
        self.kept = self.outs
        """How many rows of each `up` this rank stores; `outs`: how many it uses."""
        self.used = self.pack.rows(heads)
        """[start, stop) of the used rows in each unsharded `up`, where a rank uses other rows than it stores; else None."""
        if self.used is not None:
            shares = self.pack.shares(heads)
            self.kept = [share * weight.shape[0] // sum(shares) for share in shares]
        self.names = [name.split(".")[-2] for name in target.named.parts]
        self.chosen = target.parts
        self.blocks, self.apart = self._blocks()
        make: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        for name, out, chosen in zip(self.names, self.kept, self.chosen, strict=True):
            if chosen:
                # Registered on this module, not in a ParameterDict: with overlap_param_gather, Megatron waits for a parameter in the
                # forward hook of the module that owns it, and a ParameterDict is never called.
                down = nn.Parameter(torch.empty(settings.rank, weight.shape[1], **make))
                up = nn.Parameter(torch.zeros(out, settings.rank, **make))
                self.register_parameter(f"down_{name}", down)
                self.register_parameter(f"up_{name}", up)
                self._mark(down, weight, sharded=self.row)
                self._mark(up, weight, sharded=not self.row)

    @property
    def down(self) -> dict[str, nn.Parameter]:
        """Last part of the Hugging Face module name -> `down` [rank, in], local to this rank."""
        return self._factors("down_")

    @property
    def up(self) -> dict[str, nn.Parameter]:
        """Last part of the Hugging Face module name -> `up` [out, rank], local to this rank."""
        return self._factors("up_")

    def _factors(self, prefix: str) -> dict[str, nn.Parameter]:
        return {
            name: getattr(self, prefix + name) for name, chosen in zip(self.names, self.chosen, strict=True) if chosen
        }

    def _mark(self, parameter: nn.Parameter, weight: nn.Parameter, *, sharded: bool) -> None:
        """Sets the attributes from which Megatron decides which ranks reduce a gradient, and which rank counts it in the norm."""
        first = parallel_state.get_expert_tensor_parallel_rank() == 0 if self.expert else False
        parameter.tensor_model_parallel = sharded or first  # type: ignore[attr-defined]
        parameter.partition_dim, parameter.partition_stride = int(self.row), 1  # type: ignore[attr-defined]
        parameter.allreduce = getattr(weight, "allreduce", True)  # type: ignore[attr-defined]
        # With sequence parallelism, each rank has a partial gradient of a replicated factor, so Megatron must sum it.
        parameter.sequence_parallel = self.sequence and not sharded  # type: ignore[attr-defined]

    @torch.no_grad()
    def initialise(self, modules: dict[str, str], seed: int) -> None:
        """Kaiming-uniform `down` and zero `up`, as in PEFT. The values depend only on the seed and the Hugging Face module name."""
        for name, parameter in self.down.items():
            columns = parameter.shape[1] * (self.size if self.row else 1)
            key = hashlib.sha256(f"{seed} {modules[name]}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
            whole = (
                torch.rand(parameter.shape[0], columns, generator=generator).mul_(2).sub_(1).div_(math.sqrt(columns))
            )
            parameter.copy_(whole.chunk(self.size, 1)[self.rank] if self.row else whole)

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """x: the linear's input, [tokens, 1, in] or [tokens, in]. out: its output. Returns out + scale * up(down(x)).

        `out` is changed in place, except for views and for experts that are sharded over expert-tensor ranks.
        """
        if self.off:
            return out
        if self.dropout and self.training:
            x = self._drop(x)
        down, up = tuple(self.down.values()), self._used(tuple(self.up.values()))
        if self.expert and self.size > 1:
            return out + self._expert_tensor(x, torch.cat(down), self.join_up(up) * self.scale)
        return _Up.apply(out, self._across(_Down.apply(x, *down)), self, *up)

    def _expert_tensor(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """up(down(x)) for an expert's linear that is sharded over expert-tensor ranks; `up` includes the scale."""
        group = parallel_state.get_expert_tensor_parallel_group()
        if self.row:
            return _ExpertUp.apply(F.linear(x, down), up, group)
        return F.linear(_ExpertDown.apply(x, down, group), up)

    def _used(self, factors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The rows of the `up` factors that this rank's outputs need, gathered from all tensor ranks; backward sums their gradients."""
        if self.used is None:
            return factors
        chosen = [number for number, is_chosen in enumerate(self.chosen) if is_chosen]
        # Despite its name, it all-gathers dim 0 and reduce-scatters the gradient.
        everyone = tensor_parallel.gather_from_sequence_parallel_region(torch.cat(factors)).unflatten(
            0, (self.size, -1)
        )
        parts = everyone.split([self.kept[number] for number in chosen], dim=1)
        ends = [self.used[number] for number in chosen]
        return tuple(part.flatten(0, 1)[start:stop] for part, (start, stop) in zip(parts, ends, strict=True))

    def _across(self, a: Tensor) -> Tensor:
        """The communication between the two products, on a [tokens, 1, parts * rank]: gather, reduce, or copy with a summed gradient."""
        if self.size == 1 or self.expert:
            return a
        if self.row:
            if self.sequence:
                return tensor_parallel.reduce_scatter_to_sequence_parallel_region(a)
            return tensor_parallel.reduce_from_tensor_model_parallel_region(a)
        if self.sequence:
            return tensor_parallel.gather_from_sequence_parallel_region(a)
        return tensor_parallel.copy_to_tensor_model_parallel_region(a)

    def _blocks(self) -> tuple[list[tuple[slice, slice]], bool]:
        """([(slice of outputs, slice of columns of a)] for each product of `_Up`, whether each product is one part).

        Parts with contiguous outputs, such as gate and up, are one product each. Query, key and value of several groups are interleaved;
        they are one product with a matrix that is zero at the outputs of one part and the columns of another.
        """
        rank = self.lora_rank
        if self.used is not None:
            ends = [(end - out, end) for out, end in zip(self.outs, accumulate(self.outs), strict=True)]
            rows = [slice(*end) for end, chosen in zip(ends, self.chosen, strict=True) if chosen]
            return [(row, slice(n * rank, (n + 1) * rank)) for n, row in enumerate(rows)], True
        numbers = (
            self.pack.split(torch.arange(sum(self.outs)), self.heads)
            if len(self.names) > 1
            else (torch.arange(self.outs[0]),)
        )
        parts = [part for part, chosen in zip(numbers, self.chosen, strict=True) if chosen]
        ranges = [(int(part[0]), int(part[-1]) + 1) for part in parts]
        if all(torch.equal(part, torch.arange(*rows)) for part, rows in zip(parts, ranges, strict=True)):
            return [(slice(*rows), slice(n * rank, (n + 1) * rank)) for n, rows in enumerate(ranges)], True
        return [(slice(0, sum(self.outs)), slice(0, rank * len(ranges)))], False

    def matrices(self, factors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The `up` factors of the chosen parts, as one matrix for each of `blocks`."""
        return factors if self.apart else [self.join_up(factors)]

    def factors(self, matrices: Sequence[Tensor]) -> Sequence[Tensor]:
        """Inverse of `matrices`."""
        if self.apart:
            return matrices
        chosen = [
            part for part, chosen in zip(self.pack.split(matrices[0], self.heads), self.chosen, strict=True) if chosen
        ]
        return [part[:, n * self.lora_rank : (n + 1) * self.lora_rank] for n, part in enumerate(chosen)]

    def join_up(self, factors: Sequence[Tensor]) -> Tensor:
        """[out, parts * rank]: the factor of each chosen part in its own columns, and in the rows where the Pack puts that part."""
        if len(self.names) == 1:
            return factors[0]
        width, before, blocks, left = len(factors) * self.lora_rank, 0, [], iter(factors)
        for out, chosen in zip(self.outs, self.chosen, strict=True):
            if not chosen:
                blocks.append(factors[0].new_zeros(out, width))
                continue
            blocks.append(F.pad(next(left), (before, width - before - self.lora_rank)))
            before += self.lora_rank
        return self.pack.join(blocks, self.heads)

    def _drop(self, x: Tensor) -> Tensor:
        """Dropout with the same mask on ranks that have the same input, and different masks on ranks that have different inputs.

        Experts use their own RNG states. How many numbers an expert draws depends on how many tokens it gets, and tensor ranks may hold
        different experts; but the default generators of tensor ranks must stay in the same state.
        """
        if self.expert:
            state = tensor_parallel.random.get_expert_parallel_rng_tracker_name() if self.row else EXPERT_INPUT
            with tensor_parallel.get_cuda_rng_tracker().fork(state):
                return F.dropout(x, self.dropout)
        if self.size > 1 and (self.row or self.sequence):
            with tensor_parallel.get_cuda_rng_tracker().fork():
                return F.dropout(x, self.dropout)
        return F.dropout(x, self.dropout)


class GroupedAdapter(nn.ModuleList):
    """The adapters of a grouped linear, Transformer Engine's single module for all experts of a rank."""

    def forward(self, x: Tensor, out: Tensor, splits: list[int]) -> Tensor:
        """x [tokens, in] and out [tokens, out], sorted by expert. splits: how many tokens each expert has. Returns [tokens, out]."""
        pieces = zip(self, x.split(splits), out.split(splits), strict=True)
        return torch.cat([adapter(piece, result) for adapter, piece, result in pieces])


def _add(linear: Any, given: tuple[Any, ...], result: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    """Forward hook of a Megatron linear, which returns (output, bias): adds the adapter's output."""
    return (
        linear.adapter(given[0], result[0], *given[1:2] if isinstance(linear.adapter, GroupedAdapter) else ()),
        result[1],
    )


class Lora(Tuner):
    """Freezes the model and adds adapters to the selected linears."""

    Settings = schema.Lora
    settings: schema.Lora
    trains_model = False
    reads_inputs = True
    peft_type = "LORA"

    @classmethod
    def merge(cls, base: TensorSource, adapter: str | Path) -> Merged:
        return MergedLora(base, read_adapter(adapter))

    def check(self, family: Family, settings: model_settings.Settings) -> None:
        check_targets(family, settings, self.settings.target_modules)

    def adapted_linears(self, family: Family, settings: model_settings.Settings) -> tuple[tuple[str, ...], ...] | None:
        return adapted_linears(family, settings, self.settings.target_modules)

    def attach(self, part: ModelPart, *, seed: int) -> None:
        self.check(part.family, part.settings)
        for chunk in part.chunks:
            chunk.requires_grad_(False)
        for target in list(find_targets(part, self.settings.target_modules)):
            rank, size = part.tensor_axis(target.named)
            adapter = Adapter(
                target,
                settings=self.settings,
                heads=part.heads,
                size=size,
                rank=rank,
                sequence=part.layout.sequence,
            )
            modules = {name.split(".")[-2]: part.family.module(name) for name in target.named.parts}
            adapter.initialise(modules, seed)
            self._place(target, adapter)

    @staticmethod
    def _place(target: Target, adapter: Adapter) -> None:
        if target.index is None:
            target.linear.adapter = adapter
        else:
            if target.index == 0:
                target.linear.adapter = GroupedAdapter()
            target.linear.adapter.append(adapter)
        if target.index in (None, 0):
            target.linear.register_forward_hook(_add)

    @contextmanager
    def reference(self, part: ModelPart) -> Iterator[None]:
        """Switches the adapters off: their linears give their own output, unchanged."""
        adapters = [module for chunk in part.chunks for module in chunk.modules() if isinstance(module, Adapter)]
        for adapter in adapters:
            adapter.off = True
        try:
            yield
        finally:
            for adapter in adapters:
                adapter.off = False

    def exported(self, part: ModelPart) -> Iterator[NamedParameter]:
        for target in find_targets(part, self.settings.target_modules):
            found = target.linear.adapter
            adapter = found if target.index is None else found[target.index]
            for name, template in zip(adapter.names, target.named.rule.parts, strict=True):
                if name in adapter.down:
                    module = part.family.module(template)
                    yield _factor(target.named, adapter.down[name], module, "A", ROW if adapter.row else REPLICATED)
                    pack = target.named.rule.pack.linear
                    up = REPLICATED if adapter.row else pack if isinstance(pack, Fused) else COLUMN
                    yield _factor(target.named, adapter.up[name], module, "B", up)

    def adapter_config(self, part: ModelPart, base: str) -> dict[str, Any] | None:
        chosen = self.settings.target_modules
        names = linear_names(part.family, part.settings) if ALL in chosen else list(chosen)
        return {
            "peft_type": self.peft_type,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.settings.rank,
            "lora_alpha": self.settings.alpha,
            "lora_dropout": self.settings.dropout,
            "use_rslora": self.settings.rslora,
            "target_modules": sorted(names),
            "bias": "none",
            "fan_in_fan_out": bool(part.family.transposed_weights),
            "inference_mode": True,
            "init_lora_weights": True,
            "use_dora": False,
            "modules_to_save": None,
        }


def _factor(base: NamedParameter, parameter: nn.Parameter, module: str, letter: str, pack: Pack) -> NamedParameter:
    """An adapter factor as an exported tensor: under PEFT's name, sharded like its linear."""
    hf = f"base_model.model.{module}.lora_{letter}.weight"
    leaf = module.split(".")[-1]
    name = base.name.removesuffix("weight") + f"adapter.{'down' if letter == 'A' else 'up'}.{leaf}"
    return NamedParameter(name, parameter, Rule(name, (hf,), pack), base.numbers, False)


TUNER = Lora
