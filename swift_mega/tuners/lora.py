"""LoRA at Megatron's linears (Hu et al. 2021, arXiv:2106.09685), equal to PEFT's on the unfused ones.

Every Hugging Face linear inside a fused Megatron linear has factors of its own, `down` [rank, in] and `up` [out, rank]. The
family's Pack, which lays out the weight, lays out the `up` factors too: joined and shifted to their own columns they are one
[out, parts * rank] matrix, so a fused linear costs two small products and no shuffling of activations. Only tensors
of width `rank` cross ranks.
"""

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor, nn

from swift_mega.config import schema
from swift_mega.models.build import Held, ModelPart
from swift_mega.models.family import Rule
from swift_mega.models.packs import COLUMN, REPLICATED, ROW, Heads, Pack
from swift_mega.tuners.targets import ALL, Target, check_targets, find_targets, linear_names


class _ExpertDown(torch.autograd.Function):
    """x @ down.T where expert-tensor ranks see the same tokens and each has part of the gradient.

    The dispatcher sums the gradient of x over those ranks, so x gets this rank's part, and `down` the sum.
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
    """a @ up.T where each expert-tensor rank has a part of `a` and the dispatcher sums the results."""

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
    """The adapter of one Megatron linear (of one expert, where it is one); its output is added to the linear's."""

    def __init__(self, target: Target, *, settings: schema.Tuner, heads: Heads, size: int, rank: int, sequence: bool) -> None:
        """size, rank: of the axis that cuts the linear; sequence: its activations are cut by tokens."""
        super().__init__()
        weight, self.pack, self.heads = target.held.parameter, target.held.rule.pack, heads
        self.row, self.expert = self.pack.axis == 1, target.held.expert
        self.size, self.rank, self.sequence = size, rank, sequence and not self.expert
        self.lora_rank = settings.rank
        self.scale = settings.alpha / (math.sqrt(settings.rank) if settings.rslora else settings.rank)
        self.dropout = settings.dropout
        self.outs = [part.shape[0] for part in self.pack.split(torch.empty(weight.shape, device="meta"), heads)]
        self.names = [name.split(".")[-2] for name in target.held.parts]
        self.chosen = target.parts
        make = {"dtype": weight.dtype, "device": weight.device}
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, out, chosen in zip(self.names, self.outs, self.chosen, strict=True):
            if chosen:
                self.down[name] = nn.Parameter(torch.empty(settings.rank, weight.shape[1], **make))
                self.up[name] = nn.Parameter(torch.zeros(out, settings.rank, **make))
                self._mark(self.down[name], weight, cut=self.row)
                self._mark(self.up[name], weight, cut=not self.row)

    def _mark(self, parameter: nn.Parameter, weight: nn.Parameter, *, cut: bool) -> None:
        """What Megatron reads off parameters: who reduces the gradient, and who counts it in the norm."""
        first = parallel_state.get_expert_tensor_parallel_rank() == 0 if self.expert else False
        parameter.tensor_model_parallel = cut or first  # type: ignore[attr-defined]
        parameter.partition_dim, parameter.partition_stride = int(self.row), 1  # type: ignore[attr-defined]
        parameter.allreduce = getattr(weight, "allreduce", True)  # type: ignore[attr-defined]
        # Cut by tokens, a factor that every rank holds whole gets a part of its gradient from each.
        parameter.sequence_parallel = self.sequence and not cut  # type: ignore[attr-defined]

    @torch.no_grad()
    def initialise(self, modules: dict[str, str], seed: int) -> None:
        """Kaiming-uniform `down` and zero `up`, as PEFT has them; values follow from seed and Hugging Face module name only."""
        for name, parameter in self.down.items():
            columns = parameter.shape[1] * (self.size if self.row else 1)
            key = hashlib.sha256(f"{seed} {modules[name]}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
            whole = torch.rand(parameter.shape[0], columns, generator=generator).mul_(2).sub_(1).div_(math.sqrt(columns))
            parameter.copy_(whole.chunk(self.size, 1)[self.rank] if self.row else whole)

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """x: the linear's input, [tokens, 1, in] or [tokens, in]; out: its output. Returns out + the adapter's part."""
        if self.dropout and self.training:
            x = self._drop(x)
        down, up = torch.cat(tuple(self.down.values())), self._joined_up()
        if self.expert and self.size > 1:
            group = parallel_state.get_expert_tensor_parallel_group()
            if self.row:
                return out + _ExpertUp.apply(F.linear(x, down), up, group)
            return out + F.linear(_ExpertDown.apply(x, down, group), up)
        return out + F.linear(self._across(F.linear(x, down)), up)

    def _across(self, a: Tensor) -> Tensor:
        """The narrow activation [tokens, 1, parts * rank] where the next product needs it."""
        if self.size == 1 or self.expert:
            return a
        if self.row:
            if self.sequence:
                return tensor_parallel.reduce_scatter_to_sequence_parallel_region(a)
            return tensor_parallel.reduce_from_tensor_model_parallel_region(a)
        if self.sequence:
            return tensor_parallel.gather_from_sequence_parallel_region(a)
        return tensor_parallel.copy_to_tensor_model_parallel_region(a)

    def _joined_up(self) -> Tensor:
        """[out, parts * rank]: each part's scaled factor in its own columns, in the rows that the Pack gives it."""
        if len(self.names) == 1:
            return self.up[self.names[0]] * self.scale
        width, before, blocks = len(self.up) * self.lora_rank, 0, []
        for name, out, chosen in zip(self.names, self.outs, self.chosen, strict=True):
            if not chosen:
                blocks.append(next(iter(self.up.values())).new_zeros(out, width))
                continue
            blocks.append(F.pad(self.up[name], (before, width - before - self.lora_rank)))
            before += self.lora_rank
        return self.pack.join(blocks, self.heads) * self.scale

    def _drop(self, x: Tensor) -> Tensor:
        """Dropout that is the same on ranks that see the same input, and different on ranks that see different ones."""
        if self.size > 1 and (self.row or self.sequence):
            with tensor_parallel.get_cuda_rng_tracker().fork():
                return F.dropout(x, self.dropout)
        return F.dropout(x, self.dropout)


class GroupedAdapter(nn.ModuleList):
    """The adapters of a grouped linear: Transformer Engine's one module for all experts of a rank."""

    def forward(self, x: Tensor, out: Tensor, splits: list[int]) -> Tensor:
        """x [tokens, in] and out [tokens, out], sorted by expert; splits: tokens of each."""
        pieces = zip(self, x.split(splits), out.split(splits), strict=True)
        return torch.cat([adapter(piece, result) for adapter, piece, result in pieces])


def _add(linear: nn.Module, given: tuple[Any, ...], result: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    """Forward hook of a Megatron linear, which returns (output, bias)."""
    return (linear.adapter(given[0], result[0], *given[1:2] if isinstance(linear.adapter, GroupedAdapter) else ()), result[1])


def _let_gradients_in(module: nn.Module, given: tuple[Any, ...], result: Tensor) -> Tensor:
    """Forward hook of a frozen embedding. Recomputation and pipeline stages pass gradients only into inputs that ask for them."""
    return result.requires_grad_() if torch.is_grad_enabled() else result


class Lora:
    """Freezes the model and adds adapters to the chosen linears."""

    adapters = True

    def __init__(self, settings: schema.Tuner) -> None:
        self.settings = settings

    def attach(self, part: ModelPart, *, seed: int) -> None:
        check_targets(part.family, part.settings, self.settings.target_modules)
        for chunk in part.chunks:
            chunk.requires_grad_(False)
            if chunk.pre_process and (part.config.recompute_granularity or part.layout.pipeline > 1):
                chunk.embedding.register_forward_hook(_let_gradients_in)
        for target in list(find_targets(part, self.settings.target_modules)):
            rank, size = part.tensor_axis(target.held)
            adapter = Adapter(
                target, settings=self.settings, heads=part.settings.heads, size=size, rank=rank, sequence=part.layout.sequence
            )
            modules = {name.split(".")[-2]: name.removesuffix(".weight") for name in target.held.parts}
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

    def held(self, part: ModelPart) -> Iterator[Held]:
        for target in find_targets(part, self.settings.target_modules):
            found = target.linear.adapter
            adapter = found if target.index is None else found[target.index]
            for name, template in zip(adapter.names, target.held.rule.parts, strict=True):
                if name in adapter.down:
                    yield _factor(target.held, adapter.down[name], template, "A", ROW if adapter.row else REPLICATED)
                    yield _factor(target.held, adapter.up[name], template, "B", REPLICATED if adapter.row else COLUMN)

    def adapter_config(self, part: ModelPart, base: str) -> dict[str, Any] | None:
        chosen = self.settings.target_modules
        names = linear_names(part.family, part.settings) if ALL in chosen else list(chosen)
        return {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": self.settings.rank,
            "lora_alpha": self.settings.alpha, "lora_dropout": self.settings.dropout, "use_rslora": self.settings.rslora,
            "target_modules": sorted(names), "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
            "init_lora_weights": True, "use_dora": False, "modules_to_save": None,
        }  # fmt: skip


def _factor(base: Held, parameter: nn.Parameter, template: str, letter: str, pack: Pack) -> Held:
    """An adapter factor as an exported tensor: PEFT's name, cut the way its linear is."""
    hf = "base_model.model." + template.removesuffix(".weight") + f".lora_{letter}.weight"
    leaf = template.split(".")[-2]
    name = base.name.removesuffix("weight") + f"adapter.{'down' if letter == 'A' else 'up'}.{leaf}"
    return Held(name, parameter, Rule(name, (hf,), pack), base.numbers, False)


TUNER = Lora
