"""The checkpoint of a run: PEFT's two files where an adapter was trained, else a complete Hugging Face directory."""

import json
from pathlib import Path

import torch

from swift_mega.config.parse import parse_size
from swift_mega.convert.files.hf_write import edit_config
from swift_mega.convert.save import save, write_directory
from swift_mega.export.companions import UNCHANGED, Trained
from swift_mega.models.build import ModelPart
from swift_mega.parallel.groups import Groups
from swift_mega.tuners.tuner import Tuner


def save_checkpoint(
    tuner: Tuner,
    part: ModelPart,
    groups: Groups,
    directory: str | Path,
    *,
    source: str | Path,
    max_shard_size: str,
    dtype: torch.dtype,
    trained: Trained = UNCHANGED,
) -> None:
    """Writes what `tuner` trained to `directory`, which appears complete or not at all. Collective.

    source: the Hugging Face directory that training started from; an adapter names it as its base. trained: changes to that directory's
    chat template and stop tokens.
    """
    config = tuner.adapter_config(part, str(Path(source).resolve()))
    if config is None:

        def edit(staging: Path) -> None:
            trained.write(staging)
            edit_config(staging, tuner.config_edits())

        save(
            part,
            groups,
            directory,
            source=source,
            dtypes=dtype,
            max_shard_bytes=parse_size(max_shard_size),
            overwrite=True,
            edit=edit,
        )
        return

    def companions(staging: Path) -> None:
        (staging / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        trained.write_beside_adapter(staging, source)

    # One file, since PEFT reads only one. An adapter is small.
    write_directory(
        part,
        groups,
        Path(directory),
        list(tuner.exported(part)),
        dtypes=dtype,
        max_shard_bytes=1 << 62,
        companions=companions,
        overwrite=True,
        stem="adapter_model",
    )
