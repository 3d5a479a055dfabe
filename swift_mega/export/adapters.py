"""Starts the adapter of a run from a PEFT directory: each rank reads its slices of every factor, or an error is raised."""

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch

from swift_mega.config import schema
from swift_mega.convert.files.hf_files import some
from swift_mega.convert.load import fill, not_finite, slices_of
from swift_mega.errors import UserError
from swift_mega.models.build import ModelPart, NamedParameter
from swift_mega.models.family import Family
from swift_mega.models.linears import modules_of
from swift_mega.models.settings import Settings
from swift_mega.parallel.agree import gather, on_every_rank
from swift_mega.tuners.lora_files import read_adapter


def load_adapter(
    directory: str | Path, exported: Sequence[NamedParameter], part: ModelPart, config: Mapping[str, Any] | None
) -> None:
    """Fills this rank's adapter factors from a PEFT directory. Collective; UserError where directory and run do not fit.

    exported: the `exported` of the run's tuner. config: its `adapter_config`.
    """
    adapter = on_every_rank(lambda: read_adapter(directory))
    if config is None:
        raise UserError(
            f"model.adapters={directory} with a tuner that trains the whole model; merge the adapter first (swift-mega export)"
        )
    for key in ("r", "lora_alpha", "use_rslora"):
        if adapter.config.get(key, False) != config[key]:
            raise UserError(
                f"{directory} has {key}={adapter.config.get(key)!r}, the run {config[key]!r}; set the tuner's settings "
                "to the adapter's"
            )
    if adapter.copies:
        raise UserError(
            f"{directory} has whole weights beside its factors ({some(sorted(adapter.copies.values()))}), which training does not start "
            "from; merge it into the model first (swift-mega export --merge_lora true)"
        )
    wanted, entries = _gather_shapes(part, exported), adapter.checkpoint.entries
    if odd := sorted(wanted.keys() ^ entries.keys()):
        targets = tuner_of(directory, part.family, part.settings).target_modules
        raise UserError(
            f"{directory} and tuner.target_modules differ in {len(odd)} factors: {some(odd)}; set target_modules to the adapter's: "
            f"{' '.join(targets[:20])}{' …' if len(targets) > 20 else ''}, or remove tuner.target_modules"
        )
    for name, shape in wanted.items():
        if entries[name].shape != shape:
            raise UserError(
                f"{directory}: {name} is {list(entries[name].shape)} for a factor of {list(shape)}; give an adapter of this model"
            )

    def read() -> None:
        with torch.no_grad():
            for named in exported:
                pieces = slices_of(part, adapter.checkpoint, named)
                fill(named.parameter.data, adapter.checkpoint, named.rule, pieces, part.heads)
                if said := not_finite(named.parameter, adapter.checkpoint, pieces):
                    raise UserError(said)

    on_every_rank(read)


def tuner_of(directory: str | Path, family: Family, settings: Settings) -> schema.Lora:
    """The tuner settings that fit a PEFT directory: rank, scale and targets.

    The targets are taken from the tensor names, since adapter_config.json may give a pattern, a list of layers, or nothing.
    """
    adapter, linears = read_adapter(directory), modules_of(family, settings)
    config: dict[str, Any] = dict(adapter.config)
    said = config.get("target_modules")
    if not (
        said is None or isinstance(said, str) or (isinstance(said, list) and all(isinstance(one, str) for one in said))
    ):
        raise UserError(
            f"{directory}: target_modules={said!r} is neither a name nor a list of names; copy the adapter again"
        )
    if strange := sorted(adapter.modules - linears):
        raise UserError(
            f"{directory} has factors for {some(strange)}, which {'is' if len(strange) == 1 else 'are'} no linear of attention or MLP of "
            "this model; give the model that it was trained on, or merge the adapter first (swift-mega export --merge_lora true) and "
            "give what is merged"
        )
    return schema.Lora(
        rank=int(config["r"]),
        alpha=float(config["lora_alpha"]),
        rslora=bool(config.get("use_rslora")),
        target_modules=_targets(adapter.modules, linears),
    )


def _targets(modules: Set[str], linears: Set[str]) -> tuple[str, ...]:
    """target_modules that select exactly `modules` among `linears`: last parts of names where these suffice, else full names."""
    last = {module.rsplit(".", 1)[-1] for module in modules}
    if all(module in modules for module in linears if module.rsplit(".", 1)[-1] in last):
        return tuple(sorted(last))
    return tuple(sorted(modules))


def _gather_shapes(part: ModelPart, exported: Sequence[NamedParameter]) -> dict[str, tuple[int, ...]]:
    """Unsharded shapes of the factors of all ranks, so that every rank checks the same shapes and raises the same error. Collective."""
    mine = {name: shape for named in exported for name, shape in zip(named.parts, part.part_shapes(named), strict=True)}
    return {name: shape for shapes in gather(mine) for name, shape in shapes.items()}
