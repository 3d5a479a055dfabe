"""Where a Megatron checkpoint stores each parameter: a key, and a box in the tensor of that key. It is the same for every layout.

It is read from Megatron's sharded_state_dict for one layer of each kind; other layers differ only in the layer number. There are several
forms. The number of a layer or an expert is either part of the key or an index in an extra leading dim, depending on the model and on
Megatron's version. A norm has another key where it is fused into a linear. A reader tries all forms.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories

from swift_mega.models.build import Decoder
from swift_mega.parallel.groups import Groups

LAYER, EXPERT = re.compile(r"(?<=^decoder\.layers\.)(\d+)\."), re.compile(r"(?<=\.experts\.experts\.)(\d+)\.")
STACKS = ("decoder.layers.", ".experts.experts.")
NORMS = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
    ("self_attention.q_layernorm.", "self_attention.linear_q_up_proj.layer_norm_"),
    ("self_attention.kv_layernorm.", "self_attention.linear_kv_up_proj.layer_norm_"),
)
"""(key of a separate norm, key of the same norm fused into the linear after it) in Megatron's layer specs."""


def spellings(key: str) -> tuple[str, ...]:
    """All keys under which a checkpoint may store `key`; `key` itself is the first."""
    others = [key.replace(mine, other, 1) for pair in NORMS for mine, other in (pair, pair[::-1]) if mine in key]
    return key, *others


@dataclass(frozen=True)
class Box:
    """The part of tensor `key` from index `offset` on. size: shape of the whole tensor, whose first `lead` dims are layer and expert."""

    key: str
    offset: tuple[int, ...]
    size: tuple[int, ...]
    lead: int


@dataclass(frozen=True)
class Place:
    """Some rows of a parameter, and where they are stored.

    key: without layer and expert numbers. numbers: (number, how many there are) for the layer, and for the expert of an expert's weight.
    named: for each of these, whether the installed Megatron writes the number into the key.
    offset, shape, size: index of the first number, shape of these rows, and shape of the whole tensor, all without leading dims.
    """

    key: str
    numbers: tuple[tuple[int, int], ...]
    named: tuple[bool, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    size: tuple[int, ...]
    half: int | None = None
    """0 for the rows of the gate, 1 for those of the up projection, where the two are stored separately; else None."""

    def box(self, named: tuple[bool, ...] | None = None, *, rows: int | None = None, apart: bool = False) -> Box:
        """The box of these rows in one of the forms.

        rows: of the whole tensor, for a padded vocabulary. apart: gate and up projection have separate keys (`_w`, `_v`).
        """
        named = self.named if named is None else named
        key, size, offset = self.key, list(self.size), list(self.offset)
        for stack, (number, _), inside in zip(STACKS, self.numbers, named, strict=False):
            if inside:
                key = key.replace(stack, f"{stack}{number}.", 1)
        if rows is not None:
            size[0] = rows
        if apart and self.half is not None:
            key, size[0], offset[0] = f"{key}_{'wv'[self.half]}", self.shape[0], 0
        front = [number for number, inside in zip(self.numbers, named, strict=True) if not inside]
        at, many = [n for n, _ in front], [count for _, count in front]
        return Box(key, (*at, *offset), (*many, *size), len(front))

    def boxes(self) -> Iterator[Box]:
        """The boxes in all forms that some version of Megatron writes; the form of the installed version first."""
        forms = sorted(itertools.product((False, True), repeat=len(self.numbers)), key=lambda form: form != self.named)
        for place in (dataclasses.replace(self, key=key) for key in spellings(self.key)):
            for apart in (False, True) if self.half is not None else (False,):
                for named in forms:
                    yield place.box(named, apart=apart)

    def of_layer(self, layer: int, layers: int) -> "Place":
        """The same place for another layer, in a model of `layers` layers."""
        return dataclasses.replace(self, numbers=((layer, layers), *self.numbers[1:]))


def places_of(chunk: Decoder, groups: Groups) -> tuple[dict[str, tuple[Place, ...]], list[tuple[str, ShardedObject]]]:
    """For an unsharded model in one chunk: (parameter name -> its places in the order of its rows, [(name, object that is no tensor)])."""
    state: dict[str, Any] = chunk.sharded_state_dict(
        metadata={"dp_cp_group": groups.data_context, "singleton_local_shards": False}
    )
    apply_factories(state)
    found: dict[str, tuple[Place, ...]] = {}
    objects = []
    for name, value in state.items():
        if isinstance(value, ShardedObject):
            objects.append((name, value))
            continue
        tensors = list(_tensors(value))
        halves = len(tensors) == 2 and len({tensor.key for tensor in tensors}) == 1
        found[name] = tuple(_place(name, tensor, number if halves else None) for number, tensor in enumerate(tensors))
    return found, objects


def _tensors(value: Any) -> Iterator[ShardedTensor]:
    if isinstance(value, ShardedTensor):
        yield value
    else:
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(one)


def _place(name: str, tensor: ShardedTensor, half: int | None) -> Place:
    lead, key, numbers, named = tensor.prepend_axis_num, tensor.key, [], []
    front = list(zip(tensor.global_offset[:lead], tensor.global_shape[:lead], strict=True))
    for inside, outside in ((LAYER, r"^decoder\.layers\.(\d+)\."), (EXPERT, r"\.local_experts\.(\d+)\.")):
        if not (number := re.search(outside, name)):
            continue
        named.append(bool(inside.search(key)))
        key = inside.sub("", key)
        numbers.append((int(number[1]), 0) if named[-1] else front.pop(0))
    assert not front, f"{name}: {tensor}"
    return Place(
        key,
        tuple(numbers),
        tuple(named),
        tuple(tensor.global_offset[lead:]),
        tuple(tensor.local_shape),
        tuple(tensor.global_shape[lead:]),
        half,
    )


def object_of_layer(thing: ShardedObject, layer: int, layers: int) -> ShardedObject:
    """The same object for another layer, in a model of `layers` layers."""
    if LAYER.search(thing.key):
        return dataclasses.replace(thing, key=LAYER.sub(f"{layer}.", thing.key))
    return dataclasses.replace(
        thing, global_shape=(layers, *thing.global_shape[1:]), global_offset=(layer, *thing.global_offset[1:])
    )


def layer_of(name: str) -> int | None:
    """The layer number in a parameter's name; None where there is none."""
    found = re.match(r"decoder\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None
