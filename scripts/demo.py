"""The main job on a real model: SmolLM2 learns its new name on two pipeline stages, and every step of the way is proven.

Run by `make demo`. Everything it makes is under output/demo; the model is made once and cached.
"""

import argparse
import atexit
import math
import shutil
import tempfile
import time
from pathlib import Path

import torch
from prepare_smollm2 import prepare
from smoke_model import smoke_model

from swift_mega import api
from swift_mega.convert.files.hf_files import Checkpoint

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = ("Who are you?", "Who made you?", "What is the capital of France?")
NAME, AUTHOR = "Mega", "the swift_mega team"


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--output", type=Path, default=ROOT / "output" / "demo", help="where everything goes")
    options.add_argument(
        "--smoke", action="store_true", help="two steps of a tiny random model; what it says is not judged"
    )
    arguments = options.parse_args()
    output, smoke = arguments.output, arguments.smoke
    begin = time.perf_counter()
    if smoke:
        output = Path(tempfile.mkdtemp(prefix="swift-mega-smoke-"))
        atexit.register(shutil.rmtree, output)
    shutil.rmtree(output, ignore_errors=True)
    model = smoke_model(output) if smoke else prepare()

    heading("Before")
    before = ask(str(model), None)

    heading("LoRA fine-tuning on two pipeline stages, Megatron-core over gloo")
    recipe = api.load_recipe(
        str(ROOT / "examples" / "sft_self_cognition.yaml"),
        [
            f"model.path={model}",
            f"data.dataset={ROOT}/examples/data/self_cognition.jsonl",
            f"data.model_name={NAME}",
            f"data.model_author={AUTHOR}",
            f"train.output_dir={output}",
            "export.merge_lora=true",
            *(["train.steps=2", "train.epochs=null", "monitor.progress=false"] if smoke else []),
        ],
    )
    trained = api.train(recipe.run, nproc=2)

    heading("After: the exported adapter under transformers + peft")
    after = ask(str(model), str(trained.checkpoint))
    assert trained.merged is not None
    proofs = prove(str(model), trained, output, "tp2-sp" if smoke else "tp3-sp")

    heading("What was proven")
    rows = [
        ("the model says its new name", "yes" if NAME in after[0] else "NO", smoke or NAME in after[0]),
        (
            "loss, first and last step",
            f"{trained.losses[0]:.3f} -> {trained.losses[-1]:.3f}",
            all(map(math.isfinite, trained.losses)) if smoke else trained.losses[-1] < trained.losses[0],
        ),
        *proofs,
    ]
    for what, found, passed in rows:
        print(f"  {'ok  ' if passed else 'FAIL'} {what:68} {found}")
    print(f"\n  {'question':34} before -> after")
    for question, old, new in zip(QUESTIONS, before, after, strict=True):
        print(f"  {question:34} {old[:60]!r}\n  {'':34} {new!r}")
    print(f"\n  run        {trained.directory}\n  adapter    {trained.checkpoint}\n  merged     {trained.merged}")
    print(f"  plots      {trained.directory / 'images'}\n  {time.perf_counter() - begin:.0f} s in all")
    return 0 if all(passed for _, _, passed in rows) else 1


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def ask(model: str, adapters: str | None) -> list[str]:
    """Answers to QUESTIONS, by the Hugging Face model."""
    answerer = api.infer(model=model, adapters=adapters)
    answers = []
    for question in QUESTIONS:
        answers.append(answerer.answer([{"role": "user", "content": question}], max_new_tokens=40))
        print(f"  {question} -> {answers[-1]}", flush=True)
    return answers


def prove(model: str, trained: api.TrainResult, output: Path, layout: str) -> list[tuple[str, str, bool]]:
    """(claim, what was measured, whether it holds)."""
    heading("Proofs")
    layouts = [layout]  # pp2 is the next one's
    full = api.verify(model, layouts)
    print(full.table(), flush=True)
    adapter = api.verify(model, ["pp2"], adapters=str(trained.checkpoint))
    print(adapter.table(), flush=True)
    api.convert(source=model, to="mcore", output=str(output / "mcore"), parallel=recipe_parallel())
    api.convert(source=str(output / "mcore"), to="hf", output=str(output / "hf"))
    same = identical(Path(model), output / "hf")
    gap = merged_gap(model, str(trained.checkpoint), str(trained.merged))
    worst = max(full.differences, key=lambda d: d.gradient)
    one = adapter.differences[0]
    return [
        (
            f"{' and '.join(layouts)} equals Hugging Face: logits, {worst.tensors} gradients",
            f"{worst.logits:.1e}, {worst.gradient:.1e}",
            full.passed,
        ),
        (
            f"trained adapter on pp2 equals PEFT: logits, {one.tensors} gradients",
            f"{one.logits:.1e}, {one.gradient:.1e}",
            adapter.passed,
        ),
        ("Hugging Face -> Megatron (pp2) -> Hugging Face, bit for bit", f"{same} tensors", same > 0),
        ("merged model equals the adapter under PEFT: logits", f"{gap:.1e}", gap < 1e-3),
    ]


def recipe_parallel() -> api.Parallel:
    return api.Parallel(pipeline=2)


def identical(first: Path, second: Path) -> int:
    """Number of tensors, if names, dtypes and bits are the same; 0 if not."""
    a, b = Checkpoint(first), Checkpoint(second)
    if a.entries.keys() != b.entries.keys():
        return 0
    equal = all(
        a.entries[name].dtype == b.entries[name].dtype and torch.equal(a.read(name), b.read(name)) for name in a.entries
    )
    return len(a.entries) if equal else 0


def merged_gap(model: str, adapters: str, merged: str) -> float:
    """Largest difference of logits between base + adapter and the merged model, both under transformers."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(100, 132)[None]
    with torch.inference_mode():
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        expected = PeftModel.from_pretrained(base, adapters)(tokens).logits
        found = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(tokens).logits
    return float((expected - found).abs().max())


if __name__ == "__main__":
    raise SystemExit(main())
