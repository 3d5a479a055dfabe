"""Makes docs/models.md from the model families: `python scripts/models_page.py` writes it, `--check` only compares."""

import argparse
import importlib
from pathlib import Path

from swift_mega.device import device

device.setup()

import swift_mega.models.families as folder  # noqa: E402
from swift_mega.discover import scan  # noqa: E402

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
HEAD = """# Models

Made by `python scripts/models_page.py` from the files in `swift_mega/models/families/`, one per
family; the text is the family's own first lines.

For each family, tiny random models made by transformers are compared in `make test`: logits, loss and every gradient on one rank (all
parameters, and LoRA on all linears beside PEFT) and on TP2 with sequence parallelism (with EP2 for experts); on PP2 two families of every
kind there, the others in `make test-full`. All of that is in float64; further layouts and tuners are compared in float32. And every tensor
comes back bit for bit from every layout. A field of config.json that a family does not know stops the run.

On CUDA a model in bfloat16 or float16 has Transformer Engine's modules where that is installed, and Megatron's local ones where not. One in
float32 or float64 always has the latter: Transformer Engine multiplies float32 in TF32, with 10 bits of mantissa in place of 23, and it has
no float64. Transformer Engine's modules are constructed, covered and filled at TP1 and TP2 (and TP2 with EP2 for experts), full
and with LoRA, for every family, and compared with Megatron's local modules parameter by parameter; Megatron checkpoints of either kind
fill the other (`make test-newest`, where nvcc is). Its kernels are not run. All linears are Transformer Engine's, experts in groups.
Its norms lie inside the linears after them where a layer is joined as Megatron joins it and has RMSNorms, and stand alone in other layers
and beside adapters; they are ours where it has no such norm: a LayerNorm without weight or bias, a norm over all heads together or with a
weight for each head, one after the rotation. Attention, with all that families vary in it, and gated delta nets but for linears are ours.

| model_type | what it is |
|---|---|
"""


LEFT_OUT = """
## Left out, and why

| model_type | |
|---|---|
| `bailing_moe` (Ling 1 and 2) | transformers has no model of this type to be equal to. |
| `bailing_hybrid` (Ling 2.5 and Ring) | Most layers are Kimi delta attention, which neither Megatron-core nor this project has. |
| `falcon` with `alibi`, `mpt` with fields of its experiments | Refused by the field's name. |
"""


def page() -> str:
    """The text of the page."""
    rows = []
    for name, family in scan(folder, "FAMILY").items():
        text = (importlib.import_module(f"{folder.__name__}.{name}").__doc__ or "").strip()
        rows += [(kind, " ".join(text.split("\n\n")[0].split())) for kind in family.hf_types]
    return HEAD + "".join(f"| `{kind}` | {text} |\n" for kind, text in sorted(rows)) + LEFT_OUT


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--check", action="store_true", help="exit with 1 where the page is not up to date")
    if options.parse_args().check:
        return 0 if PAGE.is_file() and PAGE.read_text() == page() else 1
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
