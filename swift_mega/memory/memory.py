"""The memory of one rank by parts, and the longest packed row that fits a given memory.

A training step has a few moments with high memory use: the loss, and, in the backward pass of the layer that is recomputed (or of the
last layer), its MLP and its attention. The formula counts the live bytes at each moment; the largest is the peak. It covers two cases. On
the CPU: Megatron's local modules and the attention of ops/attention.py, in float32. On CUDA: Transformer Engine's linears and flash-attn's
kernels, which torch's flash op uses too. The CPU case is measured (benchmarks/long_context.py, tests/memory/test_memory.py). The CUDA
case was derived by reading that code, and has not been measured on a GPU.

Widths on one tensor rank: h = hidden size, q and k = features of queries and of keys, f = features between the MLP's linears.
Tokens: t = tokens of this context rank; s = tokens of the residual stream, t / tensor with sequence parallelism, else t.
"""

from dataclasses import dataclass, fields, replace

from swift_mega.memory.choices import Choices
from swift_mega.memory.weights import Widths, adapter_numbers, stage_numbers, widths
from swift_mega.models.fusions import activation_unfused
from swift_mega.models.settings import Settings
from swift_mega.ops.cpu_attention import QUERY_BLOCK
from swift_mega.ops.flash import AT_ONCE
from swift_mega.parallel.layout import Layout
from swift_mega.parallel.mesh import key_copies
from swift_mega.parallel.vocab import CHUNK_NUMBERS, CPU_COLUMNS, CPU_TOKENS, FEWEST_TOKENS, WIDE

LONGEST = 1 << 34


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank at its peak, by purpose. All but `host` are on the device."""

    weights: int = 0
    gradients: int = 0
    """The gradient buffer of DistributedDataParallel."""
    optimizer: int = 0
    """AdamW's two moments, and the float32 copy of bfloat16 weights."""
    row: int = 0
    """The packed row: tokens, positions, cosines and sines; on the CPU also labels."""
    inputs: int = 0
    """Saved inputs of recomputed layers, and all saved activations of other layers."""
    layer: int = 0
    """The layer whose backward pass runs, including the gradient of one of its weights."""
    loss: int = 0
    host: int = 0
    """Offloaded to host memory."""
    moment: str = ""
    """When the peak occurs: "loss", or, in the backward pass, "mlp" or "attention"."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(value for name, value in self.parts.items() if name != "host")

    @property
    def parts(self) -> dict[str, int]:
        return {part.name: getattr(self, part.name) for part in fields(self) if part.name != "moment"}


def memory(settings: Settings, layout: Layout, choices: Choices, tokens: int, stage: int | None = None) -> Memory:
    """Memory of a rank of pipeline stage `stage`; None: of the fullest stage. tokens: of a whole row, over all context ranks.

    UserError for a model that the formula does not cover.
    """
    stages = range(layout.pipeline) if stage is None else [stage]
    found = [_stage(settings, layout, choices, tokens, each) for each in stages]
    return max(found, key=lambda one: one.total)


def longest(
    settings: Settings, layout: Layout, choices: Choices, *, device_bytes: int, host_bytes: int | None = None
) -> int:
    """Most tokens of a row that fit; 0 where not even the weights fit. device_bytes, host_bytes: of one rank; host None: unlimited."""

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
    """Device bytes per additional token of a rank: the slope of `memory` between `tokens` and 2 * tokens per context rank."""
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
    # Two moments in float32 (float64 for float64), and a float32 copy of narrower weights (optimizer/distrib_optimizer.py). On the host
    # also a copy of the gradient, for the step (optimizer/cpu_offloading/hybrid_optimizer.py, _set_sub_optimizer_grads).
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
    """Parameters of LoRA in these layers on one rank."""
    rank, adapted = choices.rank or 0, choices.adapted
    return sum(adapter_numbers(settings, layout, rank, adapted[layer] if adapted else None) for layer in layers)


@dataclass(frozen=True)
class _Step:
    """Activations of a rank of a pipeline stage. Methods return bytes where they do not say otherwise."""

    w: Widths
    layout: Layout
    choices: Choices
    t: int
    """Tokens of this context rank."""
    layers: int
    stage: int

    @property
    def s(self) -> float:
        """Tokens of the residual stream on this rank."""
        return self.t / (self.layout.tensor if self.layout.sequence else 1)

    @property
    def cuda(self) -> bool:
        return self.choices.device == "cuda"

    @property
    def exact(self) -> int:
        """Bytes per number where the computation uses at least float32."""
        return max(4, self.choices.itemsize)

    @property
    def last(self) -> bool:
        return self.stage == self.layout.pipeline - 1

    @property
    def frozen(self) -> bool:
        return self.choices.rank is not None

    # -------------------------------------------------------------------------------- saved for the backward pass

    @property
    def in_flight(self) -> float:
        """Microbatches whose activations a stage holds (schedules.py): warm-up of 1F1B; of the interleaved schedule, counted in chunks."""
        stages, virtual = self.layout.pipeline, self.layout.virtual
        if virtual == 1:
            return min(self.choices.microbatches, stages - self.stage)
        chunks = 2 * (stages - self.stage - 1) + (virtual - 1) * stages + 1
        return min(self.choices.microbatches, chunks / virtual)

    @property
    def recomputed(self) -> int:
        """How many layers are recomputed and save only their input."""
        if self.choices.recompute == "none":
            return 0
        if self.choices.recompute_method == "block":
            return min(self.layers, self.choices.recompute_layers)
        return self.layers

    @property
    def block(self) -> int:
        """How many layers are recomputed together."""
        return self.choices.recompute_layers if self.choices.recompute_method == "uniform" and self.recomputed else 1

    def layer_input(self) -> float:
        """A tensor [s, 1, h]."""
        return self.choices.itemsize * self.s * self.w.hidden

    def saved_inputs(self) -> float:
        return -(-self.recomputed // self.block) * self.layer_input()

    def waiting(self) -> float:
        """Everything that is saved, except by the layer (or block of layers) whose backward pass runs."""
        inputs = self.in_flight * self.saved_inputs()
        if self.choices.offload_activations:
            # On the device (train/offload.py): the input in use, the next one that is copied back, and inputs received from other stages.
            received = self.in_flight * self.layer_input() if self.stage else 0
            inputs = min(inputs, 2 * self.layer_input() + received)
        whole = self.layers - self.recomputed
        others = self.in_flight * whole - (1 if whole else 0) + (self.block - 1 if self.recomputed else 0)
        return inputs + others * (self.layer_input() + self.kept())

    def on_host(self) -> int:
        return round(self.in_flight * self.saved_inputs()) if self.choices.offload_activations else 0

    def row(self) -> int:
        """Per token and microbatch: two int64 (three on the CPU; labels stay on the host), and cosine and sine in the weights' dtype."""
        numbers = 16 if self.cuda else 24
        return round(self.in_flight * self.t * (numbers + 2 * self.w.rope * self.choices.itemsize))

    def kept(self) -> float:
        """What a layer saves for its backward pass, besides its input."""
        return self.attention_kept() + self.mlp_kept()

    # -------------------------------------------------------------------------------- attention

    def normed(self) -> float:
        """A norm's output and one float32 per token (ops/rmsnorm.py; TE's LayerNormLinear saves ln_out and rsigma)."""
        return self.s * (self.choices.itemsize * self.w.hidden + self.exact)

    def attention_kept(self) -> float:
        """Saved by attention: its norm, q, k and v, the result and its log-sum-exp."""
        w, size, mesh = self.w, self.choices.itemsize, self.layout.mesh
        if mesh.ulysses > 1:
            # q, k, v and the result after the all-to-all (all tokens, fewer heads), and the result before linear_proj. q, k and v before
            # the all-to-all are free.
            numbers = 3 * w.query + 2 * self.keys_sent
        elif mesh.ring > 1 and not mesh.gather:
            # q, k, a copy of v for sending, the result. The output of linear_qkv is free.
            numbers = 2 * w.query + 2 * w.key
        else:
            # Rotated q and k, a copy of v (models/modules/attention.py), the result.
            numbers = 2 * w.query + 2 * w.key
        if w.query_norm:  # the norm's input, q copied out of [q, k, v]
            numbers += w.query
        return self.normed() + self.t * (size * numbers + self.exact * w.heads)

    @property
    def keys_sent(self) -> int:
        """Features of the keys after Ulysses' all-to-all, per token of this context rank; key heads may be duplicated."""
        w = self.w
        return w.key * key_copies(max(1, w.key * w.heads // w.query), self.layout.mesh.ulysses)

    def attention_backward(self) -> float:
        """In addition to `attention_kept`: gradients of the result and of q, k and v, and the buffers in which they are summed."""
        w, size, exact, mesh = self.w, self.choices.itemsize, self.exact, self.layout.mesh
        keys, features = self.keys_sent, w.query + 2 * self.keys_sent
        # The gradient of the result; with Ulysses before and after the all-to-all.
        numbers = w.query * size * (2 if mesh.ulysses > 1 else 1)
        if mesh.ring == 1:
            # ops/attention.py: gradients of q, k and v, of all heads or of the heads that this rank has with Ulysses.
            numbers += features * size
            # With Ulysses, the gradient before the all-to-all is free by now, and so is the result before linear_proj.
            numbers -= 2 * w.query * size if mesh.ulysses > 1 else 0
        elif mesh.gather:
            # parallel/gathered.py: keys and values of all ranks, and the sums of their gradients.
            numbers += 2 * keys * mesh.ring * (size + exact) + (w.query + 2 * keys) * exact
        else:
            # ops/blocks.py, Gradients: sums of the gradients. In a ring also the keys and values in use and those being received, and their
            # gradients, being sent and being received.
            numbers += features * exact
            numbers += (2 * keys * size * min(2, mesh.ring - 1) + 4 * keys * exact) if mesh.ring > 1 else 0
        return self.t * numbers + (self.flash_sums(features * size) if self.cuda else self.attention_block())

    def flash_sums(self, results: int) -> float:
        """Buffers of flash-attn's backward kernel besides its results, for as many key heads as fit AT_ONCE (ops/flash.py).

        They are dq in float32, and, where query heads share key heads, dk and dv for every query head. Also counted: `delta` of all heads,
        and the results of these key heads where they are not the final gradients. results: bytes per token of dq, dk and dv of all heads.
        """
        w, size = self.w, self.choices.itemsize
        own = self.t * (w.query * 4 + (2 * w.query * size if self.keys_sent < w.query else 0))
        key_heads = max(1, self.keys_sent * w.heads // w.query // self.layout.mesh.ulysses)
        share = min(own, max(AT_ONCE, own / key_heads)) / own
        whole = share == 1 and self.layout.mesh.ring == 1  # the kernel's results are the final gradients
        return share * own + (0 if whole else share * results * self.t) + 4 * w.heads * self.t

    def around_attention(self) -> tuple[float, float]:
        """(attention_backward, linear_proj's backward before it: gradients of its input and weight, and its output's, gathered)."""
        w, size = self.w, self.choices.itemsize
        gathered = w.hidden * self.t if self.layout.sequence else 0
        projection = size * (w.query * self.t + gathered + (0 if self.frozen else w.hidden * w.query))
        return self.attention_backward(), projection

    def attention_block(self) -> float:
        """Scores of one block of queries in the CPU's backward pass (ops/cpu_attention.py, ops/blocks.py); 0 on CUDA (registers)."""
        if self.cuda:
            return 0
        size, mesh = self.choices.itemsize, self.layout.mesh
        row = self.t * mesh.size
        keys = min(row, self.choices.longest or row, self.t * mesh.ulysses if mesh.ring > 1 else row)
        return size * keys * (3 * self.w.heads * QUERY_BLOCK + 4 * self.keys_sent) / mesh.ulysses

    # -------------------------------------------------------------------------------- MLP

    @property
    def inner(self) -> tuple[float, float]:
        """(saved in the forward pass, most alive in the backward pass) between the MLP's linears, in units of f; Megatron's mlp.py, glu.

        Saved: gate, up, silu(gate), up + offset, and the product of these two: 5. In the backward pass the product is free, and the
        gradients of the product and of its two factors are alive: 7. Fused: gate, up and product are saved: 3. In the backward pass the
        product is free, and the gradients of all three are alive: 5.
        """
        if not self.w.gated:
            return 2, 3
        return (3, 5) if self.choices.fused_activation else (5, 7)

    def mlp_kept(self) -> float:
        """Saved: the residual stream between attention and MLP, its norm, and the tensors between the linears (none with tiles)."""
        inner = 0 if self.choices.tile else self.inner[0] * self.w.ffn * self.t
        return self.layer_input() + self.normed() + self.choices.itemsize * inner

    def mlp_backward(self) -> float:
        """In addition to `mlp_kept`: the tensors between the linears in the backward pass, of all tokens or of one tile."""
        size, tile = self.choices.itemsize, self.choices.tile
        between = (self.inner[1] - (0 if tile else self.inner[0])) * self.w.ffn
        if not tile:
            return size * between * self.t
        sums = 0 if self.frozen else self.w.hidden * (self.w.first + self.w.ffn) * (self.exact + size)
        # ops/tiling.py
        of_tile = min(tile * (self.layout.tensor if self.layout.sequence else 1), self.t)
        return self.layer_input() + size * of_tile * (self.inner[1] * self.w.ffn + 2 * self.w.hidden) + sums

    # -------------------------------------------------------------------------------- the loss

    def loss(self) -> float:
        """parallel/vocab.py: hidden states, their `expected_row` and gradient in float32, token products, logits, the head's gradient."""
        w, size, exact, t = self.w, self.choices.itemsize, self.exact, self.t
        columns, kept = self.logits()
        # The head's input and `expected_row`.
        numbers: float = t * w.hidden * (size + exact)
        # The gradient of the input, and its copy in the input's dtype.
        numbers += t * w.hidden * (exact + (size if size < exact else 0))
        # With sequence parallelism, the input before it was gathered.
        numbers += self.s * w.hidden * size * (0 if not self.layout.sequence else 1)
        if not self.frozen:
            share = columns / w.vocab
            # Products with the tokens of a block.
            numbers += t * w.hidden * (2 * exact * share) + kept * w.hidden * size
            numbers += w.vocab * w.hidden * size + columns * w.hidden * (exact if size < exact else 0)
        return numbers + kept * columns * (exact + (size if size < exact else 0))

    def logits(self) -> tuple[float, float]:
        """(vocabulary columns, tokens) of the logits in memory at once."""
        w, chunk = self.w, self.choices.loss_chunk
        fits = self.choices.whole_loss or (self.t <= chunk if chunk else self.t * w.vocab <= CHUNK_NUMBERS)
        if fits and not (self.frozen and not self.choices.whole_loss):
            return w.vocab, self.t
        if self.frozen:
            if self.cuda:
                return w.vocab, min(self.t, chunk or max(FEWEST_TOKENS, CHUNK_NUMBERS // w.vocab))
            return min(CPU_COLUMNS, w.vocab), min(self.t, chunk or CPU_TOKENS)
        numbers = chunk * w.vocab if chunk else CHUNK_NUMBERS if self.cuda else CPU_TOKENS * CPU_COLUMNS
        columns = max(1, min(w.vocab, max(numbers // max(self.t, 1), WIDE)))
        return columns, min(self.t, max(1, numbers // columns))

    # -------------------------------------------------------------------------------- moments of high memory use

    def gathered(self) -> float:
        """With sequence parallelism: a linear's input and its gradient, gathered over the tokens of all tensor ranks (layers.py)."""
        return 2 * self.choices.itemsize * self.t * self.w.hidden if self.layout.sequence else 0

    def moments(self) -> list[tuple[str, dict[str, int]]]:
        """[(name, bytes by part)] of each moment."""
        waiting, stream = self.waiting(), self.layer_input()
        whole = self.layers - self.recomputed
        if whole:
            # The input of the layer whose backward pass runs is not in `saved_inputs`.
            waiting += stream
        weight = 0 if self.frozen else self.choices.itemsize * self.w.hidden
        # The gradient of the layer's output; where it is recomputed also the output itself, which the recomputation holds.
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
