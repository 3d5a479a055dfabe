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

Made by `python scripts/models_page.py` from the files in `swift_mega/models/families/`, one for each family. The text beside a model type
is the first paragraph of its file.

## What is tested

For each family, tiny random models are compared with transformers in float64: logits, loss and every gradient.

- One rank: all parameters, and LoRA on all linears with PEFT as the reference.
- TP2 with sequence parallelism, and EP2 where the model has experts.
- PP2: two families of every kind in `make test`, the others in `make test-full`.

Further layouts and tuners are compared in float32. Every tensor comes back bit for bit from every layout. A field of config.json that a
family does not know stops the run.

## Modules on CUDA

A model in bfloat16 or float16 uses Transformer Engine's modules where Transformer Engine is installed, and Megatron's local modules
elsewhere. A model in float32 or float64 always uses the local modules: Transformer Engine multiplies float32 in TF32, which has 10 bits
of mantissa in place of 23, and it has no float64.

- Linears: all are Transformer Engine's, and those of experts are its grouped linears.
- Norms: fused into the linear that follows, if the layer has Megatron's structure and RMSNorms. In other layers, and beside adapters,
  they are Transformer Engine's separate norms. Norms that it does not have are ours: a LayerNorm without weight or bias, a norm over all
  heads together or with a weight for each head, and a norm after the rotation.
- Attention, in all its variants, is ours. So are gated delta nets, except their linears.

`make test-newest`, where nvcc is installed, tests this for every family, at TP1 and TP2 (with EP2 for experts), for full training and
LoRA. It constructs Transformer Engine's modules, checks that rules cover every parameter, fills them, and compares each parameter with
that of the local modules. Megatron checkpoints of either kind are loaded into the other. Transformer Engine's kernels are not run there.

## Supported model types

| model_type | what it is |
|---|---|
"""


LEFT_OUT = """
## Not supported, and why

| model_type | |
|---|---|
| `bailing_moe` (Ling 1 and 2) | transformers has no model of this type to compare with. |
| `bailing_hybrid` (Ling 2.5 and Ring) | Most layers are Kimi delta attention, which neither Megatron-core nor this project has. |
| `falcon` with `alibi`, `mpt` with fields of its experiments | Refused with the name of the field. |
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
