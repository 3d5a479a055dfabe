"""This rank's part of a model, built by Megatron-core from a family's settings and a layout.

`canonical` gives a parameter the one name that the rules use, for Transformer Engine's modules and Megatron's local ones alike.
"""

import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from swift_mega.device.device import Device
from swift_mega.models.family import Family, Rule
from swift_mega.models.kernels import te_layers
from swift_mega.models.modules.activation import replace_activations
from swift_mega.models.modules.attention import segments
from swift_mega.models.packs import Heads
from swift_mega.models.settings import Settings, padded_vocabulary
from swift_mega.models.specs import layer_specs, norm_class
from swift_mega.ops.kernels import AUTO, Kernels
from swift_mega.parallel.context import Context
from swift_mega.parallel.layout import Coordinate, Layout


class Decoder(GPTModel):
    """A chunk of the model: Megatron's GPTModel on packed rows of tokens with their positions.

    The last chunk returns hidden states, not logits, so that [tokens, vocab] need not exist at once (parallel/vocab.py).
    A model of more than text overrides `embed`, and gives its class to `build`.
    """

    def __init__(self, *, settings: Settings, norm: Any, **given: Any) -> None:
        kind: Any = "none" if settings.positions is None else "learned_absolute"
        super().__init__(position_embedding_type=kind, parallel_output=True, **given)
        if self.pre_process and settings.positions is not None:
            self.embedding.position_embeddings.to(self.config.params_dtype)  # Megatron makes them in float32
        self.settings = settings
        if self.post_process and settings.biases.head:
            rows, dtype = self.output_layer.output_size_per_partition, self.config.params_dtype
            self.output_layer.bias = torch.nn.Parameter(torch.empty(rows, dtype=dtype))
        if settings.activation is not None:
            replace_activations(self.decoder.layers, settings.activation)
        if self.pre_process and settings.pad_row is not None:
            hook = functools.partial(_no_gradient_of, settings.pad_row)
            self.embedding.word_embeddings.register_forward_hook(hook)
        if self.pre_process and settings.scales.embedding != 1.0:
            self.embedding.register_forward_hook(functools.partial(_scale, settings.scales.embedding))
        for edit in settings.edits:
            edit.built(self, norm)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        context: Context | None = None,
        padding: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        """tokens: [tokens] int64, positions: [tokens] or [axes, tokens] int64, of this context rank; cu_seqlens: [examples + 1] int32 on
        the host, of the whole row.
        context: the ranks that share the row; None: this rank has all of it.
        padding: [tokens] bool, True for tokens that a router's losses leave out; None: there are none.
        more: what an `embed` needs beside tokens and positions.

        Returns [tokens / s, 1, hidden], s the tensor size with sequence parallelism and 1 without it.
        """
        ranks = 1 if context is None else context.mesh.size
        assert len(tokens) * ranks == int(cu_seqlens[-1]), "the tokens are not those of cu_seqlens"
        row = segments(self.settings, positions, cu_seqlens, self.config.params_dtype, context)
        if padding is not None:
            # Megatron scatters it only where it computes the embedding itself.
            padding = self.own_tokens(padding)[None]
        embedded = self.embed(tokens, positions, **more) if self.pre_process else None
        return super().forward(
            tokens[None], positions[None], None, decoder_input=embedded, packed_seq_params=row, padding_mask=padding
        )

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The input of the first layer, [tokens / s, 1, hidden]. tokens, positions, s: as in `forward`. Called in the first stage only.

        An override may take more arguments, which `forward` passes on. It gets here the embedding of every token, with the family's
        factor and norm, and without a gradient for the padding token's row. With `own_tokens` it finds the tokens of this tensor rank
        among all, and puts other features in their place.
        """
        return self.embedding(input_ids=tokens[None], position_ids=positions[None])  # type: ignore[no-any-return]

    def own_tokens(self, x: Tensor) -> Tensor:
        """[tokens, ...] -> [tokens / s, ...]: with sequence parallelism, the tokens whose residual stream this tensor rank has."""
        return scatter_to_sequence_parallel_region(x.contiguous()) if self.config.sequence_parallel else x

    def _postprocess(self, hidden_states: Tensor, *args: Any, **given: Any) -> Tensor:
        """Megatron's method for logits and loss. Every supported version of Megatron passes hidden_states by name."""
        return hidden_states

    def head_input(self, hidden: Tensor) -> Tensor:
        """[tokens / s, 1, hidden] -> every token's [tokens, hidden] on every tensor rank.

        The backward pass does not sum the gradient over tensor ranks: the vocabulary's backward already does (parallel/vocab.py).
        """
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        factor = self.settings.scales.logits
        return hidden[:, 0] if factor == 1.0 else hidden[:, 0] * factor


def _no_gradient_of(row: int, module: torch.nn.Module, given: tuple[Tensor], result: Tensor) -> None:
    """Forward hook of Megatron's token embedding that does what torch's padding_idx does, for this rank's tokens.

    given: tokens [1, tokens]. result: [1, tokens, hidden], or [tokens / s, 1, hidden] where the embedding scatters it over ranks.
    The head of a tied model still adds its own gradient to the row, as in transformers.
    """
    if not result.requires_grad:
        return
    hit = (given[0] == row)[..., None]
    if module.reduce_scatter_embeddings:
        group: Any = module.tp_group
        hit = hit.transpose(0, 1).chunk(group.size())[group.rank()]
    result.register_hook(lambda grad: grad.masked_fill(hit, 0))


def _scale(factor: float, module: torch.nn.Module, given: tuple[Any, ...], result: Tensor) -> Tensor:
    """Forward hook of an embedding: multiplies its output by `factor` in the embedding's dtype, as Hugging Face does."""
    return result * torch.tensor(factor, dtype=result.dtype)


@dataclass(frozen=True)
class NamedParameter:
    """One parameter of this rank's part, with its canonical name and the rule that fills it."""

    name: str
    parameter: torch.nn.Parameter
    """Or a buffer that checkpoints contain, which has no gradient."""
    rule: Rule
    numbers: Mapping[str, int]
    copy: bool
    """A tied output layer on a later stage than the embedding: filled like the embedding, but not written."""

    @property
    def expert(self) -> bool:
        """Whether it is part of a routed expert: sharded over the expert-tensor axis, and different on every expert rank."""
        return "e" in self.numbers

    @property
    def parts(self) -> tuple[str, ...]:
        """Hugging Face names of the tensors that fill it."""
        return tuple(part.format(**self.numbers) for part in self.rule.parts)


@dataclass
class ModelPart:
    """The part of a model on one rank: its chunks in virtual-stage order."""

    family: Family
    settings: Settings
    config: TransformerConfig
    layout: Layout
    coordinate: Coordinate
    chunks: list[Decoder]
    kernels: Kernels = AUTO

    def named_parameters(self) -> Iterator[NamedParameter]:
        """Every base parameter (not the tuner's adapters), in a fixed order."""
        for virtual, chunk in enumerate(self.chunks):
            yield from self._named(chunk, self.layout.layers_of(self.coordinate.pipeline, virtual).start)

    def _named(self, chunk: Decoder, first_layer: int) -> Iterator[NamedParameter]:
        experts = (self.settings.shape.experts or 0) // self.layout.expert
        buffers = ((name, buffer) for name, buffer in chunk.named_buffers() if name.endswith(BUFFERS))
        for name, parameter in itertools.chain(chunk.named_parameters(), buffers):
            if ".adapter." in name:
                continue
            full = canonical(name, first_layer=first_layer, first_expert=self.coordinate.expert * experts)
            copy = self.settings.tied and full == "output_layer.weight"
            rule, numbers = self.family.match("embedding.word_embeddings.weight" if copy else full)
            yield NamedParameter(full, parameter, rule, numbers, copy)

    def tensor_axis(self, named: NamedParameter) -> tuple[int, int]:
        """(rank, size) of the axis that shards this parameter."""
        if named.expert:
            return self.coordinate.expert_tensor, self.layout.expert_tensor
        return self.coordinate.tensor, self.layout.tensor

    @property
    def heads(self) -> Heads:
        """Layout of this rank's attention projections."""
        return self.settings.heads.on(self.coordinate.tensor, self.layout.tensor)

    def part_shapes(self, named: NamedParameter) -> list[tuple[int, ...]]:
        """Whole shapes of the Hugging Face tensors that fill a parameter."""
        (_, size), pack, shape = self.tensor_axis(named), named.rule.pack, list(named.parameter.shape)
        if pack.padded:
            shape[0] = self.settings.shape.vocab
        elif pack.axis is not None:
            shape[pack.shard_dim or 0] *= size
        parts = pack.split(torch.empty(shape, device="meta"), self.settings.heads)
        return [tuple(tensor.shape) for tensor in pack.fuse(parts)]

    @property
    def head_weight(self) -> Tensor | None:
        """[vocab / tensor, hidden] on the last stage, None elsewhere."""
        chunk = self.chunks[-1]
        if not chunk.post_process:
            return None
        return chunk.shared_embedding_or_output_weight() if self.settings.tied else chunk.output_layer.weight

    @property
    def head_bias(self) -> Tensor | None:
        """[vocab / tensor] on the last stage, where the head has a bias; else None."""
        chunk = self.chunks[-1]
        return chunk.output_layer.bias if chunk.post_process else None


BUFFERS = (".router.expert_bias", ".activation_func.beta", ".activation_func.eps")
"""The buffers that are read from checkpoints and written to them; other buffers are counters or derived."""


_TE_NAMES = (
    (re.compile(r"self_attention\.linear_qkv\.layer_norm_weight$"), "input_layernorm.weight"),
    (re.compile(r"mlp\.linear_fc1\.layer_norm_weight$"), "pre_mlp_layernorm.weight"),
    (re.compile(r"mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$"), r"mlp.experts.local_experts.\3.\1.\2"),
)


def canonical(name: str, *, first_layer: int, first_expert: int) -> str:
    """The name that rules use: with global layer and expert numbers, as in Megatron's local modules.

    name: a parameter of one chunk; first_layer, first_expert: global numbers of the chunk's first layer and of the rank's first expert.
    """
    for pattern, plain in _TE_NAMES:
        name = pattern.sub(plain, name)
    name = re.sub(r"^decoder\.layers\.(\d+)\.", lambda m: f"decoder.layers.{int(m[1]) + first_layer}.", name)
    return re.sub(r"local_experts\.(\d+)\.", lambda m: f"local_experts.{int(m[1]) + first_expert}.", name)


def build(
    family: Family,
    settings: Settings,
    layout: Layout,
    coordinate: Coordinate,
    *,
    device: Device,
    config: TransformerConfig,
    vocab_divisible_by: int = 128,
    reads_inputs: bool = False,
    tile: int | None = None,
    decoder: type[Decoder] = Decoder,
    kernels: Kernels = AUTO,
) -> ModelPart:
    """This rank's chunks. Their parameters have no values yet: convert/load.py fills every one. tile: of models/modules/tiles.py.

    decoder: the class of a chunk, for a model that embeds more than tokens. kernels: which form of each op runs.
    """
    recompute = config.recompute_modules if config.recompute_granularity == "selective" else ()
    te = te_layers(device, config.params_dtype, kernels)
    specs = layer_specs(settings, te=te, reads_inputs=reads_inputs, tile=tile, recompute=recompute, kernels=kernels)
    norm = norm_class(settings, te=te, tile=tile, kernels=kernels)
    chunks = []
    for virtual in range(layout.virtual):
        layers = layout.layers_of(coordinate.pipeline, virtual)
        stage = virtual if layout.virtual > 1 else None
        index = virtual * layout.pipeline + coordinate.pipeline
        chunk = decoder(
            settings=settings,
            norm=norm,
            config=config,
            vp_stage=stage,
            max_sequence_length=settings.longest or 2**31,
            transformer_layer_spec=TransformerBlockSubmodules(layer_specs=_of(specs, layers), layer_norm=norm),
            vocab_size=padded_vocabulary(settings.shape.vocab, vocab_divisible_by, layout.tensor),
            pre_process=index == 0,
            post_process=index == layout.pipeline * layout.virtual - 1,
            share_embeddings_and_output_weights=settings.tied,
        )
        chunks.append(chunk.to(device.device))
    part = ModelPart(family, settings, config, layout, coordinate, chunks, kernels)
    _mark_sharded(part)
    return part


def _mark_sharded(part: ModelPart) -> None:
    """Marks the parameters that are sharded over tensor ranks, for the gradient's norm.

    Megatron sets this mark while it initialises values, which is off here because every value is read. Without the mark the norm silently
    counts a sharded parameter on the first tensor rank only, and clipping is wrong.
    """
    for named in part.named_parameters():
        sharded = named.rule.pack.axis is not None
        # Tensor ranks may have different experts, so an expert's whole parameter counts on its first expert-tensor rank.
        whole_counts = named.expert and part.coordinate.expert_tensor == 0
        named.parameter.tensor_model_parallel = sharded or whole_counts  # type: ignore[attr-defined]
        if named.expert and part.layout.expert_tensor != part.layout.tensor:
            # False: the gradient is summed over the ranks with the same experts. Megatron 0.16 sets it only with several expert ranks.
            # Without it, the gradient of an expert that is not sharded over tensor ranks silently stayed each rank's own.
            named.parameter.allreduce = False  # type: ignore[attr-defined]
        named.parameter.partition_dim, named.parameter.partition_stride = named.rule.pack.shard_dim or 0, 1  # type: ignore[attr-defined]


def _of(specs: Sequence[ModuleSpec], layers: range) -> list[ModuleSpec]:
    return [specs[layer] for layer in layers]
