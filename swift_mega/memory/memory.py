"""The bytes of one rank, part by part, and the longest row of tokens that given bytes hold.

A training step has a few moments at which much is alive at once: the loss, and in the backward pass of the layer that is recomputed (or
of the last one) its MLP and its attention. What lies there is counted, and the largest moment is the peak. Two paths go through
one formula: on the CPU local modules and the attention of ops/attention.py, in float32; on CUDA Transformer Engine's linears and
flash-attn's kernels, which torch's flash op has too. The first is measured (benchmarks/long_context.py, tests/memory/test_memory.py). The
second follows from reading that code and has not been measured on a GPU.

Widths: h hidden, q and k features of queries and of keys, f of the MLP between its linears, all of one tensor rank. Tokens: t of this
context rank; with sequence parallelism residual streams have t / tensor, s for short.
"""

from dataclasses import dataclass, fields, replace

from swift_mega.memory.choices import Choices
from swift_mega.memory.weights import Widths, adapter_numbers, stage_numbers, widths
from swift_mega.models.fusions import activation_unfused
from swift_mega.models.settings import Settings
from swift_mega.parallel.layout import Layout
from swift_mega.parallel.mesh import key_copies

CHUNK_NUMBERS, CPU_TOKENS, CPU_COLUMNS, WIDE = 1 << 25, 256, 2048, 1024  # of parallel/vocab.py
QUERY_BLOCK = 96  # of ops/cpu_attention.py
AT_ONCE = 2 << 30  # of ops/flash.py
LONGEST = 1 << 34


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank at its peak, by what they are for. All but `host` are on the device."""

    weights: int = 0
    gradients: int = 0
    """The buffer in which DistributedDataParallel sums them."""
    optimizer: int = 0
    """AdamW's two moments, and the float32 copy of bfloat16 weights."""
    row: int = 0
    """Tokens, positions, cosines and sines, and on the CPU labels."""
    inputs: int = 0
    """Of layers that are recomputed, and everything that others keep."""
    layer: int = 0
    """The layer that is differentiated, one gradient of its weights included."""
    loss: int = 0
    host: int = 0
    """What was moved to host memory."""
    moment: str = ""
    """When the peak is: "loss", or in the backward pass "mlp" or "attention"."""

    @property
    def total(self) -> int:
        """On the device."""
        return sum(value for name, value in self.parts.items() if name != "host")

    @property
    def parts(self) -> dict[str, int]:
        return {part.name: getattr(self, part.name) for part in fields(self) if part.name != "moment"}


def memory(settings: Settings, layout: Layout, choices: Choices, tokens: int, stage: int | None = None) -> Memory:
    """Of a rank of pipeline stage `stage`; None: of the fullest stage. tokens: of a whole row, over all context ranks.

    UserError for a model that the formula does not know.
    """
    stages = range(layout.pipeline) if stage is None else [stage]
    found = [_stage(settings, layout, choices, tokens, each) for each in stages]
    return max(found, key=lambda one: one.total)


def longest(
    settings: Settings, layout: Layout, choices: Choices, *, device_bytes: int, host_bytes: int | None = None
) -> int:
    """Most tokens of a row that fit; 0 where not even weights do. host_bytes: of one rank; None: without end."""

    def fits(tokens: int) -> bool:
        found = memory(settings, layout, choices, tokens)
        return found.total <= device_bytes and (host_bytes is None or found.host <= host_bytes)

    step = layout.row_multiple
    low, high = 0, LONGEST // step
    if not fits(step):
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step


def bytes_per_token(settings: Settings, layout: Layout, choices: Choices, tokens: int = 1 << 17) -> float:
    """What one more token of a rank costs on the device, around `tokens` of it."""
    a, b = (memory(settings, layout, choices, n * layout.context).total for n in (tokens, 2 * tokens))
    return (b - a) / tokens


def _stage(settings: Settings, layout: Layout, choices: Choices, tokens: int, stage: int) -> Memory:
    divisible = choices.vocab_divisible_by
    if choices.fused_activation is None:
        fused = choices.device == "cuda" and choices.itemsize < 8 and activation_unfused(settings) is None
        choices = replace(choices, fused_activation=fused)
    w, (numbers, layers) = widths(settings, layout, divisible), stage_numbers(settings, layout, stage, divisible)
    step = _Step(w, layout, choices, -(-tokens // layout.context), len(layers), stage)
    trained = numbers if choices.rank is None else _adapters(settings, layout, choices, layers)
    weights = choices.itemsize * (numbers + (0 if choices.rank is None else trained))
    share = trained / (layout.data * layout.context if choices.distributed_optimizer else 1)
    # Moments in float32 (float64 for float64) and a float32 copy of narrower weights (optimizer/distrib_optimizer.py). On the host also
    # the copy of the gradient that is stepped with (optimizer/cpu_offloading/hybrid_optimizer.py, _set_sub_optimizer_grads).
    state = 2 * max(4, choices.itemsize) + (4 if choices.itemsize < 4 else 0)
    offloaded = choices.offload_fraction
    summed = max(4, choices.itemsize) if choices.gradients_in_float32 else choices.itemsize
    static = Memory(
        weights=weights,
        gradients=summed * trained,
        optimizer=round(share * state * (1 - offloaded)),
        row=step.row(),
        host=round(share * (state + 4) * offloaded) + step.on_host(),
    )
    moments = [replace(static, **parts, moment=name) for name, parts in step.moments()]
    return max(moments, key=lambda one: one.total)


def _adapters(settings: Settings, layout: Layout, choices: Choices, layers: list[int]) -> int:
    """Numbers of LoRA in these layers."""
    rank, adapted = choices.rank or 0, choices.adapted
    return sum(adapter_numbers(settings, layout, rank, adapted[layer] if adapted else None) for layer in layers)


@dataclass(frozen=True)
class _Step:
    """Activations of a stage's rank; every method gives bytes."""

    w: Widths
    layout: Layout
    choices: Choices
    t: int
    """Tokens of this context rank."""
    layers: int
    stage: int

    @property
    def s(self) -> float:
        """Tokens of the residual stream."""
        return self.t / (self.layout.tensor if self.layout.sequence else 1)

    @property
    def cuda(self) -> bool:
        return self.choices.device == "cuda"

    @property
    def exact(self) -> int:
        """Bytes of a number in sums that are kept wide."""
        return max(4, self.choices.itemsize)

    @property
    def last(self) -> bool:
        return self.stage == self.layout.pipeline - 1

    @property
    def frozen(self) -> bool:
        return self.choices.rank is not None

    # -------------------------------------------------------------------------------- what waits for the backward pass

    @property
    def in_flight(self) -> float:
        """Microbatches whose activations a stage holds (schedules.py: warm-up of 1F1B, and of the interleaved schedule in chunks)."""
        stages, virtual = self.layout.pipeline, self.layout.virtual
        if virtual == 1:
            return min(self.choices.microbatches, stages - self.stage)
        chunks = 2 * (stages - self.stage - 1) + (virtual - 1) * stages + 1
        return min(self.choices.microbatches, chunks / virtual)

    @property
    def recomputed(self) -> int:
        """Layers that save their input alone."""
        if self.choices.recompute == "none":
            return 0
        if self.choices.recompute_method == "block":
            return min(self.layers, self.choices.recompute_layers)
        return self.layers

    @property
    def block(self) -> int:
        """Layers that are recomputed together."""
        return self.choices.recompute_layers if self.choices.recompute_method == "uniform" and self.recomputed else 1

    def layer_input(self) -> float:
        """[s, 1, h]"""
        return self.choices.itemsize * self.s * self.w.hidden

    def saved_inputs(self) -> float:
        return -(-self.recomputed // self.block) * self.layer_input()

    def waiting(self) -> float:
        """Everything that is saved, but by the layer (or block) that is differentiated now."""
        inputs = self.in_flight * self.saved_inputs()
        if (
            self.choices.offload_activations
        ):  # train/offload.py: the one that is used, the next on its way, and what a stage received
            received = self.in_flight * self.layer_input() if self.stage else 0
            inputs = min(inputs, 2 * self.layer_input() + received)
        whole = self.layers - self.recomputed
        others = self.in_flight * whole - (1 if whole else 0) + (self.block - 1 if self.recomputed else 0)
        return inputs + others * (self.layer_input() + self.kept())

    def on_host(self) -> int:
        return round(self.in_flight * self.saved_inputs()) if self.choices.offload_activations else 0

    def row(self) -> int:
        """Two int64 of each token (labels stay on the host), and cosine and sine in the dtype of the weights, in every microbatch."""
        numbers = 16 if self.cuda else 24
        return round(self.in_flight * self.t * (numbers + 2 * self.w.rope * self.choices.itemsize))

    def kept(self) -> float:
        """What a layer keeps for its backward pass beside its input."""
        return self.attention_kept() + self.mlp_kept()

    # -------------------------------------------------------------------------------- attention

    def normed(self) -> float:
        """A norm's output and one float32 per token (ops/rmsnorm.py; TE's LayerNormLinear keeps ln_out and rsigma)."""
        return self.s * (self.choices.itemsize * self.w.hidden + self.exact)

    def attention_kept(self) -> float:
        """The norm, q, k and v in their forms, the result and its log-sum-exp."""
        w, size, mesh = self.w, self.choices.itemsize, self.layout.mesh
        if (
            mesh.ulysses > 1
        ):  # q, k and v of all tokens of its heads (the others are free), the result so and as linear_proj reads it
            numbers = 3 * w.query + 2 * self.keys_sent
        elif mesh.ring > 1 and not mesh.gather:  # v is copied, to be sent, and what linear_qkv made is free
            numbers = 2 * w.query + 2 * w.key
        else:  # rotated q and k, a copy of v (models/modules/attention.py); the result
            numbers = 2 * w.query + 2 * w.key
        if w.query_norm:  # its input: q was copied out of [q, k, v]
            numbers += w.query
        return self.normed() + self.t * (size * numbers + self.exact * w.heads)

    @property
    def keys_sent(self) -> int:
        """Features of the keys that this rank has after Ulysses, of its own tokens."""
        w = self.w
        return w.key * key_copies(max(1, w.key * w.heads // w.query), self.layout.mesh.ulysses)

    def attention_backward(self) -> float:
        """Gradients of the result, of q, k and v, and what their sums take; on top of `attention_kept`."""
        w, size, exact, mesh = self.w, self.choices.itemsize, self.exact, self.layout.mesh
        keys, features = self.keys_sent, w.query + 2 * self.keys_sent
        numbers = w.query * size * (2 if mesh.ulysses > 1 else 1)  # of the result; as it came, and as it was sent
        if mesh.ring == 1:  # by ops/attention.py, of all heads or of those that Ulysses leaves
            numbers += features * size
            # The gradient as it came is free by now, and the result as linear_proj read it too.
            numbers -= 2 * w.query * size if mesh.ulysses > 1 else 0
        elif mesh.gather:  # keys of all ranks, and the sums of their gradients (parallel/gathered.py)
            numbers += 2 * keys * mesh.ring * (size + exact) + (w.query + 2 * keys) * exact
        else:  # sums (ops/blocks.py, Towards); around a ring keys here and coming, and the gradients behind them, sent and coming
            numbers += features * exact
            numbers += (2 * keys * size * min(2, mesh.ring - 1) + 4 * keys * exact) if mesh.ring > 1 else 0
        return self.t * numbers + (self.flash_sums(features * size) if self.cuda else self.attention_block())

    def flash_sums(self, results: int) -> float:
        """What flash-attn's backward kernel makes beside its results, of as many key heads as fit AT_ONCE (ops/flash.py).

        That is dq in float32, and dk and dv for every query head where these share keys. results: bytes a token, of as many; delta of all.
        """
        w, size = self.w, self.choices.itemsize
        own = self.t * (w.query * 4 + (2 * w.query * size if self.keys_sent < w.query else 0))
        key_heads = max(1, self.keys_sent * w.heads // w.query // self.layout.mesh.ulysses)
        share = min(own, max(AT_ONCE, own / key_heads)) / own
        whole = share == 1 and self.layout.mesh.ring == 1  # then its results are the gradients
        return share * own + (0 if whole else share * results * self.t) + 4 * w.heads * self.t

    def around_attention(self) -> tuple[float, float]:
        """attention_backward, and linear_proj's before it: one gradient of its weight, and its output's gradient of all tensor ranks."""
        w, size = self.w, self.choices.itemsize
        gathered = w.hidden * self.t if self.layout.sequence else 0
        projection = size * (w.query * self.t + gathered + (0 if self.frozen else w.hidden * w.query))
        return self.attention_backward(), projection

    def attention_block(self) -> float:
        """Scores of a block of queries, in the CPU's backward pass (ops/cpu_attention.py, ops/blocks.py); CUDA's are in registers."""
        if self.cuda:
            return 0
        size, mesh = self.choices.itemsize, self.layout.mesh
        row = self.t * mesh.size
        keys = min(row, self.choices.longest or row, self.t * mesh.ulysses if mesh.ring > 1 else row)
        return size * keys * (3 * self.w.heads * QUERY_BLOCK + 4 * self.keys_sent) / mesh.ulysses

    # -------------------------------------------------------------------------------- MLP

    @property
    def inner(self) -> tuple[float, float]:
        """(kept, alive at most while differentiated) between the MLP's linears, in f; Megatron's mlp.py, glu.

        Kept: gate and up, silu(gate), up + offset, their product. Then the product is free, and its gradient and those of both factors are
        there. Fused: gate and up, and the product; then the gradients of all three.
        """
        if not self.w.gated:
            return 2, 3
        return (3, 5) if self.choices.fused_activation else (5, 7)

    def mlp_kept(self) -> float:
        """The residual stream between attention and MLP, its norm, and what lies between the linears; tiled: nothing of that."""
        inner = 0 if self.choices.tile else self.inner[0] * self.w.ffn * self.t
        return self.layer_input() + self.normed() + self.choices.itemsize * inner

    def mlp_backward(self) -> float:
        """All that lies between the linears, of all tokens or of a tile; on top of what `mlp_kept` says is kept there."""
        size, tile = self.choices.itemsize, self.choices.tile
        between = (self.inner[1] - (0 if tile else self.inner[0])) * self.w.ffn
        if not tile:
            return size * between * self.t
        sums = 0 if self.frozen else self.w.hidden * (self.w.first + self.w.ffn) * (self.exact + size)
        of_tile = min(tile * (self.layout.tensor if self.layout.sequence else 1), self.t)
        return (
            self.layer_input() + size * of_tile * (self.inner[1] * self.w.ffn + 2 * self.w.hidden) + sums
        )  # ops/tiling.py

    # -------------------------------------------------------------------------------- the loss

    def loss(self) -> float:
        """parallel/vocab.py: hidden states, their mean pull and gradient in float32, products with tokens, logits, the head's gradient."""
        w, size, exact, t = self.w, self.choices.itemsize, self.exact, self.t
        columns, kept = self.logits()
        numbers: float = t * w.hidden * (size + exact)  # what the head reads, and pull
        numbers += t * w.hidden * (exact + (size if size < exact else 0))  # their gradient, and it in their dtype
        numbers += self.s * w.hidden * size * (0 if not self.layout.sequence else 1)  # what was gathered
        if not self.frozen:
            share = columns / w.vocab
            numbers += (
                t * w.hidden * (2 * exact * share) + kept * w.hidden * size
            )  # products with the tokens of a block
            numbers += w.vocab * w.hidden * size + columns * w.hidden * (exact if size < exact else 0)
        return numbers + kept * columns * (exact + (size if size < exact else 0))

    def logits(self) -> tuple[float, float]:
        """(columns, tokens) that exist at once."""
        w, chunk = self.w, self.choices.loss_chunk
        fits = self.choices.whole_loss or (self.t <= chunk if chunk else self.t * w.vocab <= CHUNK_NUMBERS)
        if fits and not (self.frozen and not self.choices.whole_loss):
            return w.vocab, self.t
        if self.frozen:
            if self.cuda:
                return w.vocab, min(self.t, chunk or max(64, CHUNK_NUMBERS // w.vocab))
            return min(CPU_COLUMNS, w.vocab), min(self.t, chunk or CPU_TOKENS)
        numbers = chunk * w.vocab if chunk else CHUNK_NUMBERS if self.cuda else CPU_TOKENS * CPU_COLUMNS
        columns = max(1, min(w.vocab, max(numbers // max(self.t, 1), WIDE)))
        return columns, min(self.t, max(1, numbers // columns))

    # -------------------------------------------------------------------------------- moments

    def gathered(self) -> float:
        """With sequence parallelism a linear's input, and its gradient, are there of all tokens of the tensor ranks (layers.py)."""
        return 2 * self.choices.itemsize * self.t * self.w.hidden if self.layout.sequence else 0

    def moments(self) -> list[tuple[str, dict[str, int]]]:
        """(name, its parts) of each."""
        waiting, stream = self.waiting(), self.layer_input()
        whole = self.layers - self.recomputed
        if whole:
            waiting += stream  # the input of the layer that is differentiated first is no saved one
        weight = 0 if self.frozen else self.choices.itemsize * self.w.hidden
        # The gradient of the layer's output, the output itself (what recomputes it holds on to it), and what the layer keeps.
        begun = (1 if whole else 2) * stream
        attended = begun + self.attention_kept()
        gathered = 0 if self.choices.tile else self.gathered()
        product = 0 if self.choices.tile else (self.inner[0] + 1) * self.w.ffn * self.t * self.choices.itemsize
        found: dict[str, tuple[float, float]] = {
            "mlp": (
                max(
                    attended + self.mlp_kept() + self.mlp_backward(),
                    attended + self.layer_input() + self.normed() + product + weight * self.w.ffn,
                )
                + gathered,
                0,
            ),
            "attention": (attended + stream + max(self.around_attention()), 0),
        }
        if self.last:
            found["loss"] = (self.kept() if whole else 0, stream + self.loss())
        return [
            (name, {"inputs": round(waiting), "layer": round(layer), "loss": round(loss)})
            for name, (layer, loss) in found.items()
        ]
