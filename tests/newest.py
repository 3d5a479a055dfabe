"""The tests whose result may depend on the version of Megatron-core, torch or Python: `make test-newest` runs what this program prints.

The other tests (files, data, settings, packs, transformers' configs) run the same code on the same transformers and PEFT in both
environments. A name that does not exist is an error, so that a renamed test is not lost.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN = (
    "tests/device", "tests/test_ranks.py", "tests/test_api.py",
    "tests/launch/test_torchrun.py",  # forks, signals, gloo
    "tests/config/test_load.py",  # fields of TransformerConfig
    "tests/ops", "tests/parallel", "tests/memory", "tests/tuners", "tests/export",
    "tests/models/test_te_attention.py", "tests/models/test_te_attention_on_te.py", "tests/models/test_te_spec.py",
    "tests/models/test_megatron_config.py", "tests/models/test_router.py", "tests/models/test_families.py",
    "tests/models/test_fusions.py", "tests/models/test_grouped_experts.py", "tests/models/test_positions_of_axes.py",
    "tests/convert/megatron/test_mcore.py", "tests/convert/megatron/test_mcore_names.py", "tests/convert/megatron/test_megatron_lm.py",
    "tests/convert/megatron/test_torch_dist.py", "tests/convert/test_whole.py", "tests/convert/test_save.py",
    "tests/train", "tests/gpu",
)  # fmt: skip
LEFT_OUT = {
    "tests/train/test_monitor.py": "files that a run writes about itself",
    "tests/train/test_run_directory.py": "folders",
    "tests/train/test_epochs.py": "which rows a step gets",
    "tests/train/test_trained_form.py": "templates and generation_config.json",
    "tests/train/test_vocabulary.py": "token ids against config.json",
    "tests/train/test_dequantised.py": "how files are read",
    "tests/memory/test_longest.py": "arithmetic",
    "tests/parallel/test_mesh.py": "arithmetic",
    "tests/parallel/test_sequence.py": "arithmetic",
    "tests/export/test_companions.py": "files that are copied",
}
"""Tests of the folders above that are not run, and why."""


def arguments() -> list[str]:
    """Arguments for pytest; exits with a message where a name does not exist."""
    if missing := [name for name in (*RUN, *LEFT_OUT) if not (ROOT / name).exists()]:
        raise SystemExit(f"tests/newest.py names {', '.join(missing)}, which is not there; say where it went")
    return [*RUN, *(f"--ignore={name}" for name in LEFT_OUT)]


if __name__ == "__main__":
    sys.stdout.write(" ".join(arguments()) + "\n")
