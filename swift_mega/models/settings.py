"""A Hugging Face config in Megatron's terms: Megatron's own fields, and what a family needs that Megatron has no field for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from swift_mega.models.edits import Edit
from swift_mega.models.packs import Heads
from swift_mega.parallel.layout import ModelShape


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (RoPE) of a layer.

    inverse_frequencies: [rotary_dim / 2]; scale: factor on cosine and sine.
    longest: most tokens of an example for which the frequencies are right; None: no limit.
    interleaved: features 2i and 2i + 1 are rotated as a pair (GPT-J), not i and i + rotary_dim / 2 (GPT-NeoX).
    long: the frequencies for every token of an example that has more than `long_beyond` tokens (LongRoPE, arXiv:2402.13753).
    sections: how many of the rotated pairs take their position from each axis, for tokens with positions on several axes (M-RoPE of
    Qwen2-VL, arXiv:2409.12191); None: tokens have one position. sections_interleaved: pairs of the axes alternate (Qwen3-VL).
    """

    inverse_frequencies: tuple[float, ...]
    scale: float = 1.0
    longest: int | None = None
    interleaved: bool = False
    long: tuple[float, ...] | None = None
    long_beyond: int = 0
    sections: tuple[int, ...] | None = None
    sections_interleaved: bool = False

    @property
    def axes(self) -> tuple[int, ...]:
        """[rotary_dim / 2]: the axis of each rotated pair; empty without sections."""
        sections = self.sections or ()
        if not self.sections_interleaved:
            return tuple(axis for axis, pairs in enumerate(sections) for _ in range(pairs))
        axes = [0] * sum(sections)
        for axis, pairs in enumerate(sections[1:], start=1):
            for number in range(pairs):
                axes[axis + number * len(sections)] = axis
        return tuple(axes)


@dataclass(frozen=True, kw_only=True)
class NormKind:
    """The norms before (and after) attention and MLP. one_plus: the weight is stored minus one (Gemma)."""

    kind: Literal["rms", "layer"] = "rms"
    one_plus: bool = False
    weight: bool = True
    bias: bool = False


LAYER_NORM = NormKind(kind="layer", bias=True)


@dataclass(frozen=True, kw_only=True)
class Block:
    """How attention and MLP are connected to the residual stream; the default is Megatron's own pre-norm layer.

    parallel: attention and MLP read the same input, and both outputs are added; shared_norm: they read it through one norm, not one each.
    pre_norms: the input of attention and of MLP is normalised; post_norms: their output is, before it is added.
    residual_multiplier: factor on each output when it is added.
    """

    parallel: bool = False
    shared_norm: bool = True
    pre_norms: bool = True
    post_norms: bool = False
    residual_multiplier: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Biases:
    """Which linears other than query, key and value projections have a bias (for those: Megatron's add_qkv_bias).

    head: the output layer has a bias [vocab], which is added to the logits.
    """

    attention_output: bool = False
    mlp: bool = False
    head: bool = False


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Constant factors and limits in a family's arithmetic.

    embedding: factor on the embedding's output; logits: factor on logits. clip: queries, keys and values are clamped to [-clip, clip].
    """

    embedding: float = 1.0
    logits: float = 1.0
    clip: float | None = None
    attention_by_layer: bool = False
    """Attention scores are divided by the layer's number, counted from 1."""
    attention_softcap: float | None = None
    """Attention scores s become c tanh(s / c)."""
    logit_softcap: float | None = None
    """The same for logits."""
    query_growth: tuple[float, int] | None = None
    """(b, n): queries at position p are multiplied by 1 + b log(1 + floor(p / n))."""


class LayerKind(NamedTuple):
    """Which modules a layer has. moe: its MLP is a mixture of experts. edits: its own, in their order."""

    moe: bool
    edits: tuple[Edit, ...]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A Hugging Face config in Megatron's terms."""

    megatron: dict[str, Any]
    """Fields of Megatron's TransformerConfig."""
    shape: ModelShape
    heads: Heads
    tied: bool
    ropes: tuple[Rope | None, ...]
    """Per layer: the rotation of queries and keys; None: no rotation."""
    windows: tuple[int | None, ...]
    """Per layer: how many tokens a token attends to, itself included; None: all."""
    moe_layers: tuple[bool, ...]
    """Per layer: whether its MLP is a mixture of experts."""
    norm: NormKind = NormKind()
    block: Block = Block()
    biases: Biases = Biases()
    scales: Scales = Scales()
    edits: tuple[Edit, ...] = ()
    """What the family changes in Megatron's layers beyond the fields here, in this order."""
    predict_layers: int = 0
    """Layers of multi-token prediction that a checkpoint has after the last layer. They are kept, not computed."""
    predict_prefix: str | None = None
    """Prefix of the names of their tensors, where they are not numbered as layers after the last one."""
    positions: int | None = None
    """Number of learned positions, whose vectors are added to the token embedding. None: no learned positions."""
    pad_row: int | None = None
    """The row of the embedding matrix (the padding token's) that gets no gradient from lookups. None: every row gets one."""
    activation: Callable[[Any], Any] | None = None
    """Builds the activation module of every MLP from Megatron's config. None: Megatron's activation_func, without parameters."""
    notes: tuple[str, ...] = ()
    """What config.json says and training does not do, one line each; a run prints each once."""

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Per layer: which modules it has. Layers of one kind have the same parameters."""
        return tuple(
            LayerKind(moe, tuple(edit for edit in self.edits if edit.is_in(layer)))
            for layer, moe in enumerate(self.moe_layers)
        )

    @property
    def longest(self) -> int | None:
        """Most tokens that an example may have; None: no limit."""
        bounds = [rope.longest for rope in self.ropes if rope and rope.longest]
        return min([*bounds, *([self.positions] if self.positions else [])], default=None)

    @property
    def no_te_context(self) -> str | None:
        """Why Transformer Engine's attention over context ranks cannot compute this model ("has …"); None: it can."""
        reasons = {
            "has soft-capped scores, which Megatron does not pass to it": self.scales.attention_softcap is not None,
            "rotates tokens by the length of their example, to which it would add padding": any(
                rope is not None and rope.long is not None for rope in self.ropes
            ),
        }
        return next((reason for reason, is_so in reasons.items() if is_so), None)

    @property
    def rope(self) -> Rope | None:
        """The rotation of the first layer that has one."""
        return next((rope for rope in self.ropes if rope), None)

    @property
    def distinct_ropes(self) -> tuple[Rope, ...]:
        """The different rotations, in order of first use."""
        return tuple(dict.fromkeys(rope for rope in self.ropes if rope))


def padded_vocabulary(vocab: int, divisible_by: int, tensor: int) -> int:
    """Rows of the embedding matrix: `vocab` rounded up to a multiple of divisible_by * tensor, as in Megatron-LM."""
    unit = divisible_by * tensor
    return -(-vocab // unit) * unit
