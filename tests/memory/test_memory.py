"""The memory formula against the bytes of live tensors in real training steps, on one rank and on several."""

from pathlib import Path

import numpy as np
import pytest

import tiny
from swift_mega.config import schema
from swift_mega.errors import UserError
from swift_mega.memory.choices import Choices, choices_of
from swift_mega.memory.memory import Memory, bytes_per_token, longest, memory
from swift_mega.memory.weights import stage_numbers
from swift_mega.models.translate import load_settings
from swift_mega.parallel.layout import Layout, parse_layout, plan_layout

TOKENS, EXAMPLE = 512, 256
SIZES = dict(
    hidden_size=128, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, head_dim=16, intermediate_size=384,
    max_position_embeddings=4096, tie_word_embeddings=False,
)  # fmt: skip
FULL = {"recompute": "full"}
TILED = {**FULL, "tile_mlp": True, "loss_chunk_size": 128}
CASES = {
    "nothing": ("single", {}, "full", 512),
    "logits at once": ("single", {**FULL, "loss_chunk_size": TOKENS}, "full", 8192),
    "chunked loss": ("single", {**FULL, "loss_chunk_size": 128}, "full", 8192),
    "recomputed": ("single", FULL, "full", 512),
    "two layers a block": ("single", {**FULL, "recompute_layers": 2}, "full", 512),
    "two layers of four": ("single", {**FULL, "recompute_method": "block", "recompute_layers": 2}, "full", 512),
    "tiled": ("single", TILED, "full", 512),
    "offloaded": ("single", {**TILED, "offload_activations": True}, "full", 512),
    "lora": ("single", {}, "lora", 512),
    "lora, tiled": ("single", TILED, "lora", 512),
    "ulysses": ("cp2-ulysses", TILED, "full", 512),
    # One example in the row. Examples that are short compared with a rank's share stay whole, send no keys, and need less than the formula
    # says.
    "ring": ("cp2-ring", TILED, "full", 512, TOKENS),
    "mesh": ("cp4-ulysses2", TILED, "full", 512, TOKENS),
    "allgather": ("cp2-allgather", TILED, "full", 512, TOKENS),
    "ring, not tiled": ("cp2-ring", FULL, "full", 512, TOKENS),
    "tensor": ("tp2", FULL, "full", 512),
    "sequence": ("tp2-sp", FULL, "full", 512),
    "pipeline": ("pp2", FULL, "full", 512),
}


def model(folder: Path, vocab: int, **changes: object) -> Path:
    return tiny.make(folder / "model", "llama", vocab_size=vocab, **{**SIZES, **changes})


def run_of(directory: Path, train: dict[str, object], tuner: str) -> schema.Run:
    return schema.Run(
        model=schema.Model(path=str(directory), dtype="float32"),
        tuner=schema.Lora(rank=4) if tuner == "lora" else schema.Full(),
        train=schema.Train(**train),
    )


def live_peak(
    directory: Path, train: dict[str, object], tuner: str, layout: Layout, microbatches: int, example: int
) -> list[int]:
    """The peak of live bytes on each rank, in a step after the first one."""
    import torch.distributed as dist

    from swift_mega.data.pack import Example, collate
    from swift_mega.device import device as devices
    from swift_mega.memory.live import LiveBytes
    from swift_mega.parallel import groups
    from swift_mega.train.step import train_step
    from swift_mega.train.wire import build_training

    with LiveBytes() as live:
        training = build_training(run_of(directory, train, tuner), devices.setup(), groups.init(layout), steps=10)
        draw = np.random.default_rng(0)
        examples = [
            Example(
                tokens=draw.integers(0, training.part.settings.shape.vocab, example, dtype=np.int32),
                trained=np.ones(example, bool),
            )
            for _ in range(TOKENS // example)
        ]
        batch = [collate(examples) for _ in range(microbatches)]
        train_step(training, batch)
        live.peak = 0
        train_step(training, batch)
    found: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(found, live.peak)
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_formula_is_what_is_alive(ranks, tmp_path, case):
    """Within 5%, for the fullest rank of every pipeline stage."""
    name, train, tuner, vocab, *given = CASES[case]
    example = given[0] if given else EXAMPLE
    directory = model(tmp_path, vocab)
    settings = load_settings(directory)
    parallel, world = parse_layout(name)
    layout = plan_layout(parallel, settings.shape, world)
    microbatches = 2 * layout.pipeline
    peaks = ranks(layout.world, live_peak, directory, train, tuner, layout, microbatches, example)
    choices = choices_of(
        run_of(directory, train, tuner), hidden=128, device="cpu", microbatches=microbatches, longest=example
    )
    for stage in range(layout.pipeline):
        measured = max(peak for rank, peak in enumerate(peaks) if layout.coordinate(rank).pipeline == stage)
        found = memory(settings, layout, choices, TOKENS, stage)
        assert found.total + found.host == pytest.approx(measured, rel=0.05), (stage, found, measured)


def test_weights_are_those_of_the_published_model():
    """Llama 3.1 8B has 8,030,261,248 parameters (its model card says 8B; the number is the sum over its safetensors)."""
    assert stage_numbers(llama8b(), single(), 0) == (8_030_261_248, list(range(32)))


def llama8b():
    from swift_mega.memory.published import llama_3_1_8b

    return llama_3_1_8b()


def single() -> Layout:
    return plan_layout(schema.Parallel(), llama8b().shape, 1)


def test_the_longest_row_fits_and_the_next_does_not():
    settings, layout, given = llama8b(), single(), 79 << 30
    choices = Choices(recompute="full", offload_fraction=1.0)
    found = longest(settings, layout, choices, device_bytes=given)
    assert memory(settings, layout, choices, found).total <= given < memory(settings, layout, choices, found + 1).total
    assert longest(settings, layout, choices, device_bytes=10 << 30) == 0
    host = memory(settings, layout, choices, found).host
    assert longest(settings, layout, choices, device_bytes=given, host_bytes=host - 1) == 0


def test_every_technique_makes_tokens_cheaper():
    settings, layout = llama8b(), single()
    steps = [
        Choices(),
        Choices(recompute="full"),
        Choices(recompute="full", tile=4096),
        Choices(recompute="full", tile=4096, offload_activations=True),
    ]
    costs = [bytes_per_token(settings, layout, each) for each in steps]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == len(costs), costs


def test_parts_sum_up():
    found = Memory(weights=1, gradients=2, optimizer=4, row=8, inputs=16, layer=32, loss=64, host=128)
    assert found.total == 127 and sum(found.parts.values()) == 255


def test_models_without_a_formula_are_refused(tmp_path):
    directory = tiny.make(tmp_path / "model", "qwen3_moe")
    settings = load_settings(directory)
    with pytest.raises(UserError, match="this model has a mixture of experts; measure a small run instead"):
        memory(settings, plan_layout(schema.Parallel(), settings.shape, 1), Choices(), 1024)
    with pytest.raises(UserError, match=r"train\.recompute=selective has no memory formula"):
        choices_of(schema.Run(train=schema.Train(recompute="selective")), hidden=32)
    with pytest.raises(UserError, match=r"parallel\.cp=te:p2p has no memory formula, which is for our own"):
        choices_of(schema.Run(parallel=schema.Parallel(context=2, cp="te:p2p")), hidden=32)
