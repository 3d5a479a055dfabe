"""The stages in the order of their run, cheap and important ones first. Each is a module of this folder with `run(bench, stage)`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class About:
    """The text of docs/gpu.md about a stage."""

    proves: str
    limit: str
    seconds: int
    """Estimated time on one H200."""


STAGES = {
    "facts": About(
        "Which hardware and which versions the numbers belong to; the ceilings: bf16 matmul, copy, pinned copies both ways", "none", 10
    ),
    "attention": About(
        "Packed attention, output and all gradients, against its definition in float64: GQA, window, soft-cap, sinks, ALiBi, latent "
        "attention 192/128, head sizes 80 and 256; bf16 and float32. Rate and memory of rows of 8k and 32k tokens",
        "relative error 1e-2 (bf16), 3e-5 (float32)", 40,
    ),
    "blocks": About(
        "Ring attention of 2 and 4 ranks, all of them in this process: merged softmax and gradients against float64",
        "relative error 1e-2 (bf16)", 10,
    ),
    "parity": About(
        "A SmolLM2-135M-shaped model with random weights on packed rows: logits, loss and every gradient against transformers in float64",
        "1.5 times the error of transformers in the same dtype", 45,
    ),
    "lora": About(
        "Three LoRA steps against PEFT and torch's AdamW; eight steps lower the loss; the exported adapter under PEFT and the merged "
        "model under transformers give our loss",
        "update 1e-3 relative, losses 1e-4 (float32)", 40,
    ),
    "cli": About(
        "`swift-mega verify` on one rank, in fresh interpreters: float64, float32, LoRA; `swift-mega sft --deterministic true` twice",
        "status 0, so 1e-4 (float64), 1e-3 (float32); the same bytes", 90,
    ),
    "offload": About(
        "Layer inputs and AdamW's state in host memory, and MLPs by tiles: the same loss and gradients as without, with real streams",
        "loss 1e-6 (tiles 1e-4), gradients relative 1e-2 (bf16) or 1e-5 (float32)", 30,
    ),
    "memory": About("Peak of allocated memory against `swift-mega plan`: LoRA and full, 8k and 32k tokens", "5 %", 45),
    "speed": About(
        "Tokens/s and MFU of LoRA on a 1.2B Llama against transformers + PEFT (SDPA, fused AdamW) on the same GPU, for equal and packed "
        "lengths; how often a step waits for the GPU, by file and line; which kernels take the time",
        "loss 1e-2, gradient norm 5e-2 relative (bf16); our seconds at most theirs", 100,
    ),
    "tests": About("`pytest -m gpu`", "status 0", 60),
}  # fmt: skip
