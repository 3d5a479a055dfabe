"""A Hugging Face config in Megatron's terms: Megatron's own fields, and what a family needs that Megatron has no field for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from swift_mega.models.packs import Heads
from swift_mega.parallel.layout import ModelShape


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (RoPE) of a layer.

    inverse_frequencies: [rotary_dim / 2]; scale: factor on cosine and sine.
    longest: most tokens of an example for which the frequencies are right; None: no limit.
    interleaved: features 2i and 2i + 1 are rotated as a pair (GPT-J), not i and i + rotary_dim / 2 (GPT-NeoX).
    long: the frequencies for every token of an example that has more than `long_beyond` tokens (LongRoPE, arXiv:2402.13753).
    """

    inverse_frequencies: tuple[float, ...]
    scale: float = 1.0
    longest: int | None = None
    interleaved: bool = False
    long: tuple[float, ...] | None = None
    long_beyond: int = 0


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


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How a token's experts are chosen and weighted, where that is not Megatron's softmax over the logits.

    bias: each expert has a constant in the checkpoint, without a gradient. It is added to the scores for the choice, not for the weights.
    normalise: the weights are divided by max(their sum + `added`, `smallest`). All weights are then multiplied by `scale`.
    groups: the experts form this many equal groups. They are chosen from `chosen_groups` of them only: those with the largest sum of their
    `group_best` best scores.
    """

    score: Literal["softmax", "sigmoid"]
    bias: bool = True
    normalise: bool = True
    added: float = 0.0
    smallest: float = 0.0
    scale: float = 1.0
    groups: int = 1
    chosen_groups: int = 1
    group_best: int = 2
    """2 in DeepSeek-V3's report (arXiv:2412.19437, section 2.1.2), 1 in DeepSeek-V2's (arXiv:2405.04434, section 2.1.2)."""
    balanced_score: Literal["softmax", "sigmoid"] | None = None
    """The score that the balancing loss uses; None: `score`."""


@dataclass(frozen=True, kw_only=True)
class DeltaNet:
    """Sizes of a gated delta net (models/modules/gated_delta.py). A key head serves value_heads / key_heads value heads."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int
    """Width of the convolution in tokens: each token and the taps - 1 before it."""

    @property
    def channels(self) -> tuple[int, int, int]:
        """Query, key and value channels of one key head."""
        return self.key_dim, self.key_dim, self.value_heads // self.key_heads * self.value_dim


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
    routing: Routing | None = None
    """None: Megatron's own router chooses."""
    predict_layers: int = 0
    """Layers of multi-token prediction that a checkpoint has after the last layer. They are kept, not computed."""
    predict_prefix: str | None = None
    """Prefix of the names of their tensors, where they are not numbered as layers after the last one."""
    delta: DeltaNet | None = None
    delta_layers: tuple[bool, ...] = ()
    """Per layer: whether a gated delta net replaces attention. Empty: no layer has one."""
    positions: int | None = None
    """Number of learned positions, whose vectors are added to the token embedding. None: no learned positions."""
    alibi: tuple[float, ...] | None = None
    """Per head: its slope. A score grows by the slope times the position of its key (ops/alibi.py). None: no ALiBi."""
    pad_row: int | None = None
    """The row of the embedding matrix (the padding token's) that gets no gradient from lookups. None: every row gets one."""
    embedding_norm: bool = False
    """The output of the embedding is normalised."""
    whole_qk_norm: bool = False
    """Queries and keys are normalised over all heads together, not per head."""
    head_qk_norm: bool = False
    """The LayerNorms of queries and keys have a weight for every head, not one that all heads share."""
    late_qk_norm: bool = False
    """Queries and keys are normalised after the rotation. These norms are inside Megatron's core attention."""

    activation: Callable[[Any], Any] | None = None
    """Builds the activation module of every MLP from Megatron's config. None: Megatron's activation_func, without parameters."""
    notes: tuple[str, ...] = ()
    """What config.json says and training does not do, one line each; a run prints each once."""
    sinks: bool = False
    """Each head has a learned logit that takes part in its softmax (ops/sinks.py)."""

    @property
    def layer_kinds(self) -> tuple[tuple[bool, bool], ...]:
        """Per layer: whether its MLP is a mixture of experts, and whether a gated delta net replaces attention."""
        return tuple(zip(self.moe_layers, self.delta_layers or (False,) * len(self.moe_layers), strict=True))

    @property
    def longest(self) -> int | None:
        """Most tokens that an example may have; None: no limit."""
        bounds = [rope.longest for rope in self.ropes if rope and rope.longest]
        return min([*bounds, *([self.positions] if self.positions else [])], default=None)

    @property
    def not_engine(self) -> str | None:
        """Why Transformer Engine's attention over context ranks cannot compute this model ("has …"); None: it can (modules/engine.py)."""
        reasons = {
            "has attention sinks, which only some of its kernels support": self.sinks,
            "has soft-capped scores, which Megatron does not pass to it": self.scales.attention_softcap is not None,
            "has latent attention, whose values are not as wide as its keys": self.megatron.get(
                "multi_latent_attention"
            ),
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
