"""What a model family is, and how the one for a Hugging Face directory is found.

A family is a table: which config fields it understands, what they mean to Megatron, and which Hugging Face tensors fill which
Megatron parameter. The registry is this folder: every module with a `FAMILY` is one.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import swift_mega.models as folder
from swift_mega.discover import scan
from swift_mega.errors import UserError
from swift_mega.models.packs import Heads, Pack, Turned
from swift_mega.models.quantization import FLAG, KEYS, quantization_of
from swift_mega.parallel.layout import ModelShape


@dataclass(frozen=True)
class Rule:
    """`megatron` is one parameter name, `parts` the Hugging Face tensors in it; {i} is the layer, {e} the expert."""

    megatron: str
    parts: tuple[str, ...]
    pack: Pack


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


@dataclass(frozen=True, kw_only=True)
class DeltaNet:
    """Sizes of a gated delta net (models/gated_delta.py). A key head serves value_heads / key_heads value heads."""

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
    def rope(self) -> Rope | None:
        """The rotation of the first layer that has one."""
        return next((rope for rope in self.ropes if rope), None)

    @property
    def distinct_ropes(self) -> tuple[Rope, ...]:
        """The different rotations, in order of first use."""
        return tuple(dict.fromkeys(rope for rope in self.ropes if rope))


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: `translate` reads a transformers config, `rules` name the tensors."""

    hf_types: tuple[str, ...]
    translate: Callable[[Any], Settings]
    rules: tuple[Rule, ...]
    reads: frozenset[str]
    """Fields of config.json that `translate` understands; any other one that is not neutral stops the run."""
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Fields that are understood for these values only; any other value stops the run."""
    by_layer: frozenset[str] = frozenset()
    """Sizes for which config.json may list a number for each layer; `translate` checks them."""
    absent: tuple[str, ...] = ()
    """Regular expressions of tensors that a checkpoint may hold and that no parameter reads (derived buffers)."""
    prefix: str = ""
    """What the names of a checkpoint lack where the bare model was saved, without its head."""
    bare: bool = False
    """Whether the rules are those of such a checkpoint (`named_like`)."""
    variant: Callable[[Mapping[str, Any]], "Family"] | None = None
    """The same family with the rules that a config.json asks for, where tensors have other names or layouts by its fields."""
    read_as: Mapping[str, str] = field(default_factory=dict)
    """Of `hf_types`, those that transformers has no model for, and its name for the same one."""

    @functools.cached_property
    def patterns(self) -> tuple[tuple[re.Pattern[str], Rule], ...]:
        """The rules as regular expressions over Megatron's names."""
        return tuple((_pattern(rule.megatron), rule) for rule in self.rules)

    def named_like(self, names: Iterable[str]) -> "Family":
        """This family, with rules for a checkpoint of tensors with such names: with the prefix or without."""
        if not self.prefix or any(name.startswith(self.prefix) for name in names):
            return self
        rules = tuple(
            dataclasses.replace(rule, parts=tuple(part.removeprefix(self.prefix) for part in rule.parts))
            for rule in self.rules
        )
        return dataclasses.replace(self, rules=rules, bare=True)

    def module(self, tensor: str) -> str:
        """What transformers and PEFT call the module whose weight is `tensor` of a checkpoint."""
        name = tensor.removesuffix(".weight")
        return self.prefix + name if self.bare and tensor != self.head else name

    def on_disk(self, name: str) -> str:
        """What the checkpoint calls a tensor that is `name` in transformers' model."""
        return name.removeprefix(self.prefix) if self.bare else name

    def derived(self, tensor: str) -> bool:
        """Whether `tensor` follows from the config: checkpoints may hold it, and nothing reads it."""
        return any(re.fullmatch(pattern, tensor) for pattern in self.absent)

    def turned(self, tensor: str) -> bool:
        """Whether `tensor` is a linear's weight that is stored [in, out]."""
        return any(pattern.fullmatch(tensor) for pattern in self.turned_weights)

    @functools.cached_property
    def turned_weights(self) -> tuple[re.Pattern[str], ...]:
        """Names of the weights that are stored [in, out]."""
        return tuple(_pattern(part) for rule in self.rules if isinstance(rule.pack, Turned) for part in rule.parts)

    @functools.cached_property
    def embedding(self) -> str:
        """Hugging Face name of the embedding of tokens."""
        return self._alone("embedding.word_embeddings.weight")

    @functools.cached_property
    def head(self) -> str:
        """Hugging Face name of the output layer's weight, which a tied model may hold or not."""
        return self._alone("output_layer.weight")

    def _alone(self, megatron: str) -> str:
        ((name,),) = (rule.parts for rule in self.rules if rule.megatron == megatron)
        return name

    def match(self, name: str) -> tuple[Rule, dict[str, int]]:
        """The rule that covers Megatron's parameter `name` (global layer and expert numbers), and those numbers."""
        for pattern, rule in self.patterns:
            if found := pattern.fullmatch(name):
                return rule, {key: int(value) for key, value in found.groupdict().items()}
        raise UserError(
            f"no rule of family {'/'.join(self.hf_types)} covers Megatron's parameter {name}; this combination of config fields "
            f"builds a parameter that the family does not know: set model.megatron back, or add a rule to the family's file"
        )


def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{e\}", r"(?P<e>\d+)")
    return re.compile(escaped)


@functools.cache
def families() -> dict[str, Family]:
    """Every family, by Hugging Face model_type."""
    found: dict[str, Family] = {}
    for family in scan(folder, "FAMILY").values():
        for hf_type in family.hf_types:
            assert hf_type not in found, f"two families claim {hf_type}"
            found[hf_type] = family
    return found


def read_config(directory: str | Path) -> dict[str, Any]:
    """config.json of a Hugging Face directory; UserError where it is missing or not one."""
    path = Path(directory) / "config.json"
    if not Path(directory).is_dir():
        raise UserError(
            f"model directory {directory} does not exist; give the path of a Hugging Face checkpoint directory"
        )
    if not path.is_file():
        raise UserError(
            f"{directory} has no config.json, so it is not a Hugging Face model; give the directory that holds it"
        )
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); copy it from the original checkpoint again") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(f"{path} has no model_type; copy it from the original checkpoint again")
    return config


def family_of(directory: str | Path) -> Family:
    """The family of a Hugging Face directory; UserError with the supported types where there is none."""
    raw = read_config(directory)
    hf_type = raw["model_type"]
    if hf_type not in families():
        raise UserError(
            f"model_type {hf_type!r} of {directory} is not supported; supported: {', '.join(sorted(families()))}"
        )
    family = families()[hf_type]
    return family if family.variant is None else family.variant(raw)


def load_settings(directory: str | Path, *, dequantize: bool = False) -> Settings:
    """Config of a Hugging Face directory in Megatron's terms; a field that nobody understands stops the run.

    dequantize: the weights will be read dequantised, so a quantisation changes nothing of the model.
    """
    family, raw = family_of(directory), read_config(directory)
    if (quantization := quantization_of(directory)) is not None and not dequantize:
        raise UserError(
            f"{directory} is quantised: quantization_config={quantization!r}; pass {FLAG} to read its weights dequantised"
        )
    raw = {key: value for key, value in raw.items() if key not in KEYS}
    fixed = {**FIXED, **family.fixed}
    for key, allowed in fixed.items():
        if key in raw and raw[key] not in allowed:
            raise UserError(
                f"{directory}/config.json: {key}={raw[key]!r} is not supported for family {'/'.join(family.hf_types)}; "
                f"supported: {', '.join(map(repr, allowed))}"
            )
    known = family.reads | NEUTRAL | fixed.keys()
    unknown = sorted(key for key in raw if key not in known and not key.startswith("_"))
    if unknown:
        listed = ", ".join(f"{key}={raw[key]!r}" for key in unknown)
        raise UserError(
            f"{directory}/config.json has fields that family {'/'.join(family.hf_types)} does not know: {listed}; they "
            "may change what the model computes. Remove them if they don't, or add them to the family's file"
        )
    _check_sizes(directory, {key: value for key, value in raw.items() if key not in family.by_layer})
    from huggingface_hub.errors import StrictDataclassError

    try:
        config = hf_config(directory)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"transformers cannot read {directory}/config.json: {reason}; correct the field it names"
        ) from None
    settings = family.translate(config)
    _check_fit(directory, settings)
    return dataclasses.replace(settings, notes=_notes(raw, fixed))


def _notes(raw: Mapping[str, Any], fixed: Mapping[str, Any]) -> tuple[str, ...]:
    """Dropout is a setting of pretraining that a family may let config.json name; nothing here but an adapter has any."""
    rates = [f"{key}={raw[key]}" for key in sorted(fixed) if key.endswith(("dropout", "pdrop")) and raw.get(key)]
    return (
        (f"config.json names {', '.join(rates)}; training here uses no dropout but an adapter's own",) if rates else ()
    )


def hf_config(directory: str | Path) -> Any:
    """The transformers config of a Hugging Face directory, of a type that transformers has a model for."""
    from transformers import AutoConfig  # 2 s: only when a model is really read

    fields, family = read_config(directory), family_of(directory)
    known = family.read_as.get(fields.pop("model_type"))
    if known is None:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    return AutoConfig.for_model(known, **fields)


def _check_sizes(directory: str | Path, raw: Mapping[str, Any]) -> None:
    """Sizes are counts; transformers lets most of them be anything, and Megatron would fail far from the cause."""
    for key in SIZES & raw.keys():
        value = raw[key]
        unset = value is None and key in MAY_BE_NONE
        if not unset and (type(value) is not int or value < 1):
            raise UserError(f"{directory}/config.json: {key}={value!r} is not a whole number of at least 1; correct it")


def _check_fit(directory: str | Path, settings: Settings) -> None:
    shape, per_token = settings.shape, settings.megatron.get("moe_router_topk", 0)
    if shape.heads % shape.kv_heads:
        raise UserError(
            f"{directory}/config.json: num_key_value_heads={shape.kv_heads} does not divide "
            f"num_attention_heads={shape.heads}; correct it"
        )
    if shape.experts is not None and per_token > shape.experts:
        raise UserError(
            f"{directory}/config.json: num_experts_per_tok={per_token} is more than the {shape.experts} experts there "
            "are; correct it"
        )


MAY_BE_NONE = frozenset("num_key_value_heads head_dim num_kv_heads ffn_hidden_size n_inner n_group topk_group".split())
SIZES = MAY_BE_NONE | frozenset(
    "hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads vocab_size "
    "max_position_embeddings query_pre_attn_scalar n_embd n_head n_layer n_positions "
    "n_embed d_model n_heads n_layers max_seq_len "
    "num_experts num_local_experts num_experts_per_tok decoder_sparse_step "
    "n_routed_experts n_shared_experts n_group topk_group moe_num_experts moe_k moe_layer_interval "
    "linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads "
    "full_attention_interval".split()
)
"""Fields of config.json that count something; those that may be null have a default that follows from others."""

NEUTRAL = frozenset(
    "architectures model_type torch_dtype dtype transformers_version use_cache bos_token_id eos_token_id pad_token_id "
    "sep_token_id unk_token_id cls_token_id mask_token_id decoder_start_token_id suppress_tokens "
    "begin_suppress_tokens initializer_range output_router_logits router_aux_loss_coef auto_map name_or_path "
    "is_llama_config unsloth_version unsloth_fixed return_dict output_attentions output_hidden_states id2label "
    "label2id problem_type finetuning_task task_specific_params tokenizer_class prefix chunk_size_feed_forward "
    "is_encoder_decoder is_decoder add_cross_attention "
    "transformers.js_config attn_implementation attention_implementation max_length "
    "max_sequence_length pretraining_tp cache_implementation".split()
)
"""Fields of config.json that change nothing that a decoder computes."""

FIXED: Mapping[str, tuple[Any, ...]] = {
    "rope_interleaved": (False, None),
    "use_mrope": (False, None),
    "attention_dropout": (0.0, None),
    "hidden_act": ("silu", "swish"),
}
"""Fields that every family here understands for these values only."""
