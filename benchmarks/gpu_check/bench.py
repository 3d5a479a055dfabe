"""Code that stages share: device, random models, packed rows, the training of one rank, and timing."""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from swift_mega.config import schema
from swift_mega.data.pack import Example, Microbatch, collate
from swift_mega.device.device import Device
from swift_mega.parallel import groups
from swift_mega.train.build import layout_of
from swift_mega.train.header import header
from swift_mega.train.wire import Training, build_training

DtypeName = Literal["bfloat16", "float32", "float64"]
SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(
        hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, vocab_size=512
    ),
    "smol": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, vocab_size=49152
    ),
    "1b": dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256
    ),
}  # fmt: skip
"""Llama models: a tiny one for the CPU, the shape of SmolLM2-135M, the shape of Llama 3.2 1B."""
# In the first steps Adam's update is g / (|g| + eps). With a tiny eps, a gradient that is only rounding error would give a full update.
OPTIM = schema.Optim(lr=1e-3, eps=1e-4, weight_decay=0.1, schedule="constant", clip_grad=0.5)


@dataclass(frozen=True)
class Bench:
    """The device and sizes with which stages run."""

    device: Device
    small: bool
    """Use tiny models and short rows, which take seconds on a CPU."""
    folder: Path

    @property
    def on_gpu(self) -> bool:
        return self.device.kind == "cuda"

    @property
    def dtype(self) -> DtypeName:
        """The default dtype of training on this device."""
        return "bfloat16" if self.on_gpu else "float32"

    def size(self, full: str) -> str:
        return "tiny" if self.small else full

    def model(self, size: str) -> Path:
        """The directory of a random Llama, made at first use. Its weights are large, so that attention is far from uniform."""
        folder = self.folder / size
        if not folder.exists():
            from transformers import AutoModelForCausalLM, LlamaConfig
            from transformers.utils.logging import disable_progress_bar

            config: Any = LlamaConfig(
                **SIZES[size],
                max_position_embeddings=65536,
                tie_word_embeddings=True,
                initializer_range=SIZES[size]["hidden_size"] ** -0.5,
            )
            dtype = torch.bfloat16 if size == "1b" else torch.float32
            disable_progress_bar()
            torch.manual_seed(0)
            with self.device.device:
                AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
            self.free()
        return folder

    def vocab(self, size: str) -> int:
        return SIZES[size]["vocab_size"]

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Frees memory that nothing refers to any more."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def seconds(self, call: Callable[[], object], *, times: int = 5, warm: int = 2) -> float:
        """Median seconds of `times` calls, after `warm` calls that are not timed."""
        for _ in range(warm):
            call()
        took = []
        for _ in range(times):
            self.synchronize()
            begin = time.perf_counter()
            call()
            self.synchronize()
            took.append(time.perf_counter() - begin)
        return statistics.median(took)

    @contextlib.contextmanager
    def training(self, run: schema.Run) -> Iterator[Training]:
        """The training of one rank; its memory is freed at the end. torch.distributed has to be initialised with one rank."""
        self.free()
        try:
            yield build_training(run, self.device, groups.init(layout_of(run, 1), seed=run.train.seed), steps=10**6)
        finally:
            groups.close()
            self.free()


def run_of(
    model: Path, dtype: DtypeName, tuner: str, *, adapter: Path | None = None, optim: schema.Optim = OPTIM, **train: Any
) -> schema.Run:
    """Settings of a run; the optimizer is not distributed, so gradients are not sharded."""
    return schema.Run(
        model=schema.Model(path=str(model), dtype=dtype, adapters=(str(adapter),) if adapter else ()),
        optim=optim,
        tuner=schema.Lora(rank=8, alpha=16) if tuner == "lora" else schema.Full(),
        train=schema.Train(**train),
        parallel=schema.Parallel(distributed_optimizer=False),
    )


def computed_by(training: Training) -> str:
    """Backends of layers and optimizer, and the form of every op, from the header of a run."""
    by, kernels = (line.partition(" ")[2].removeprefix("by").strip() for line in header(training)[:2])
    return f"{by}; {kernels}"


def packed(lengths: Sequence[int], vocab: int, seed: int = 0) -> Microbatch:
    """One packed row of random examples with these lengths; every token is trained."""
    draw = np.random.default_rng(seed)
    return collate(
        [Example(tokens=draw.integers(0, vocab, n, dtype=np.int32), trained=np.ones(n, bool)) for n in lengths]
    )


def examples(row: Microbatch) -> list[Tensor]:
    """The tokens of each example in a packed row."""
    bounds = row.cu_seqlens.tolist()
    return [row.tokens[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]


def relative(found: Tensor, exact: Tensor) -> float:
    """‖found - exact‖ / ‖exact‖, Euclidean norms over all elements."""
    return float((found.double() - exact).norm() / exact.norm())


def network(
    bench: Bench, model: Path, dtype: torch.dtype, adapter: Path | None = None, *, trainable: bool = False
) -> Any:
    """transformers' model with SDPA attention, with PEFT where there is an adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    found: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa").to(
        bench.device.device
    )
    if adapter is not None:
        found = PeftModel.from_pretrained(found, str(adapter), is_trainable=trainable)
    return found


def summed_loss(net: Any, tokens: Tensor) -> Tensor:
    """Cross-entropy of one example [n], summed over its n - 1 targets. Logits are converted to at least float32."""
    logits = net(input_ids=tokens[None], use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), tokens[1:], reduction="sum"
    )
