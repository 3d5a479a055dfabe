"""A Hugging Face config in Megatron's terms, and what beyond Megatron's own fields a family may ask for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from swift_mega.models.packs import Heads
from swift_mega.parallel.layout import ModelShape


@dataclass(frozen=True)
class Rope:
    """Rotary frequencies [rotary_dim / 2], the factor on cosine and sine, and the longest position they are right for.

    interleaved: features 2i and 2i + 1 are turned together (GPT-J), not i and i + rotary_dim / 2 (GPT-NeoX).
    long: the frequencies of every token of an example that has more than `long_beyond` tokens (LongRoPE, arXiv:2402.13753).
    """

    inverse_frequencies: tuple[float, ...]
    scale: float = 1.0
    longest: int | None = None
    interleaved: bool = False
    long: tuple[float, ...] | None = None
    long_beyond: int = 0


@dataclass(frozen=True, kw_only=True)
class NormKind:
    """What stands before (and after) attention and MLP. one_plus: the weight is stored minus one (Gemma)."""

    kind: Literal["rms", "layer"] = "rms"
    one_plus: bool = False
    weight: bool = True
    bias: bool = False


LAYER_NORM = NormKind(kind="layer", bias=True)


@dataclass(frozen=True, kw_only=True)
class Block:
    """How attention and MLP are joined to the residual stream; the default is Megatron's own pre-norm layer.

    parallel: both read the same input and are added together; shared_norm: through one norm, not one each.
    pre_norms: the input of each is normalised; post_norms: its output is, before it is added.
    residual_multiplier: of each output, as it is added.
    """

    parallel: bool = False
    shared_norm: bool = True
    pre_norms: bool = True
    post_norms: bool = False
    residual_multiplier: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Biases:
    """Which linears after attention's inputs have a bias (query, key and value: Megatron's add_qkv_bias).

    head: one number for each word of the vocabulary, added to its logit.
    """

    attention_output: bool = False
    mlp: bool = False
    head: bool = False


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Constant factors and limits of a family's arithmetic.

    embedding: on looked-up embeddings; logits: on logits. clip: queries, keys and values are clamped to [-clip, clip].
    """

    embedding: float = 1.0
    logits: float = 1.0
    clip: float | None = None
    attention_by_layer: bool = False
    """Attention scores are divided by the layer's number, counted from 1."""
    attention_softcap: float | None = None
    """Attention scores s become c tanh(s / c)."""
    logit_softcap: float | None = None
    """Logits, likewise."""
    query_growth: tuple[float, int] | None = None
    """(b, n): queries at position p are multiplied by 1 + b log(1 + floor(p / n))."""


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How a token's experts are chosen and weighed, where it is otherwise than Megatron's softmax over the logits.

    bias: a constant of each expert, a tensor of the checkpoint that no gradient reaches, joins in the choice but not in the weights.
    normalise: the weights are divided by their sum, to which `added` is added and which is at least `smallest`; then times `scale`.
    groups: experts are chosen from `chosen_groups` of that many groups only, those with the largest sum of their `group_best` best.
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
    """Two in DeepSeek-V3's report (arXiv:2412.19437, section 2.1.2), one in DeepSeek-V2's (arXiv:2405.04434, section 2.1.2)."""
    balanced_score: Literal["softmax", "sigmoid"] | None = None
    """The score that the balancing loss is of, where it is another than the choice's."""


@dataclass(frozen=True, kw_only=True)
class DeltaNet:
    """Sizes of a gated delta net (models/modules/gated_delta.py). A key head serves value_heads / key_heads value heads."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int
    """Tokens that the convolution sees, the last one its own."""

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
    """Per layer, how queries and keys are rotated; None: not."""
    windows: tuple[int | None, ...]
    """Per layer, tokens that a token sees, itself included; None: all."""
    moe_layers: tuple[bool, ...]
    """Per layer, whether its MLP is a mixture of experts."""
    norm: NormKind = NormKind()
    block: Block = Block()
    biases: Biases = Biases()
    scales: Scales = Scales()
    routing: Routing | None = None
    """None: Megatron's own router does it."""
    predict_layers: int = 0
    """Layers of multi-token prediction that a checkpoint holds after the last layer; not computed, but kept."""
    predict_prefix: str | None = None
    """What the names of such layers' tensors start with, where they are no layers beyond the last one."""
    delta: DeltaNet | None = None
    delta_layers: tuple[bool, ...] = ()
    """Per layer, whether a gated delta net is in attention's place; none is where there is no `delta`."""
    positions: int | None = None
    """Learned positions, added to the embedding of tokens: how many there are. None: there are none."""
    alibi: tuple[float, ...] | None = None
    """Per head, what a score gains for each position of its key (ops/alibi.py). None: nothing."""
    pad_row: int | None = None
    """The row of the embedding that gets no gradient where it is looked up (that of the padding token); None: every row gets its own."""
    embedding_norm: bool = False
    """What comes out of the embedding is normalised."""
    whole_qk_norm: bool = False
    """Queries and keys are normalised over all heads together, not each head alone."""
    head_qk_norm: bool = False
    """The LayerNorms of queries and keys have a weight for every head, not one that all share."""
    late_qk_norm: bool = False
    """Queries and keys are rotated first and normalised then; the norms lie in Megatron's core attention."""

    activation: Callable[[Any], Any] | None = None
    """Makes, of Megatron's config, the module that is every MLP's activation; None: Megatron's activation_func, which has no parameters."""
    notes: tuple[str, ...] = ()
    """What config.json says and training does not do, a line each; a run says it once."""
    sinks: bool = False
    """Each head has a learned logit that joins its softmax (ops/sinks.py)."""

    @property
    def layer_kinds(self) -> tuple[tuple[bool, bool], ...]:
        """Per layer, whether its MLP is a mixture of experts, and whether a gated delta net is in attention's place."""
        return tuple(zip(self.moe_layers, self.delta_layers or (False,) * len(self.moe_layers), strict=True))

    @property
    def longest(self) -> int | None:
        """Most tokens an example may have."""
        bounds = [rope.longest for rope in self.ropes if rope and rope.longest]
        return min([*bounds, *([self.positions] if self.positions else [])], default=None)

    @property
    def not_engine(self) -> str | None:
        """Why Transformer Engine's attention over context ranks cannot be this model's ("has …"); None: it can (modules/engine.py)."""
        reasons = {
            "has attention sinks, which it takes in some of its kernels only": self.sinks,
            "has soft-capped scores, which Megatron does not hand to it": self.scales.attention_softcap is not None,
            "has latent attention, whose values are not as wide as its keys": self.megatron.get(
                "multi_latent_attention"
            ),
            "turns tokens by the length of their example, to which it would add padding": any(
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
    """Rows of the embedding: `vocab` rounded up to a multiple of divisible_by * tensor, like Megatron-LM."""
    unit = divisible_by * tensor
    return -(-vocab // unit) * unit
