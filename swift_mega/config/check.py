"""Checks settings: the range of each value, contradictions between them, and whether the files they name exist.

A setting that could not take effect is an error here; it is never skipped silently. `parallel.layout` checks whether a layout fits the
model and the ranks.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swift_mega.config.parse import size_in_bytes
from swift_mega.config.schema import ABOVE_0, AT_LEAST_1, NOT_NEGATIVE, PROBABILITY, Limit, Run
from swift_mega.config.tree import Setting, settings
from swift_mega.errors import UserError

SHARE: Limit = ("between 0 and 1", lambda v: 0 <= v <= 1)
ABOVE_0_TO_1: Limit = ("above 0 and at most 1", lambda v: 0 < v <= 1)
EPOCHS: Limit = ("above 0 and at most 1,000,000", lambda v: 0 < v <= 1e6)
SIZE: Limit = ("a size such as 500MB, 5GB or 512MiB", lambda v: size_in_bytes(v) is not None)
NOT_EMPTY: Limit = ("text that is not empty", lambda v: v.strip() != "")

# Limits that differ from those of the type: whole numbers are at least 1, other numbers are not negative.
LIMITS: dict[str, Limit] = {
    "data.split_dataset_ratio": PROBABILITY,
    "data.seed": NOT_NEGATIVE,
    "tuner.type": NOT_EMPTY,
    "optim.warmup_fraction": SHARE,
    "optim.warmup_steps": NOT_NEGATIVE,
    "optim.beta1": PROBABILITY,
    "optim.beta2": PROBABILITY,
    "optim.eps": ABOVE_0,
    "optim.offload_fraction": ABOVE_0_TO_1,
    "objective.name": NOT_EMPTY,
    "train.output_dir": NOT_EMPTY,
    "train.epochs": EPOCHS,
    "train.seed": NOT_NEGATIVE,
    "export.max_shard_size": SIZE,
}

OF_ADAPTERS = ("model.adapters", "export.merge_lora")


def check_range(setting: Setting, value: Any, *, where: str) -> None:
    """Raises UserError where one value alone is impossible."""
    if value is None or setting.table:
        return
    if setting.many:
        if any(not item.strip() for item in value):
            raise UserError(f"{where}: a value is empty text")
        return
    limit = setting.limit or LIMITS.get(setting.key) or {int: AT_LEAST_1, float: NOT_NEGATIVE}.get(setting.hint)
    if limit is not None and not limit[1](value):
        raise UserError(f"{where}={value}: expected {limit[0]}")


def check_together(run: Run, sources: Mapping[str, str]) -> None:
    """Raises UserError where two settings contradict, or one cannot take effect because of another."""
    for broken, message in _contradictions(run):
        if broken:
            raise UserError(message)
    if not run.tuner.makes_adapter:
        _refuse_changed(run, sources, OF_ADAPTERS, because=f"tuner.type={run.tuner.type} has no adapter")
    if not run.model.resize_vocab and not run.model.new_special_tokens:
        because = "no rows are added; set model.resize_vocab=true"
        _refuse_changed(run, sources, ("model.new_rows",), because=because)
    if run.train.recompute != "full":
        keys = ("train.recompute_method", "train.recompute_layers")
        _refuse_changed(run, sources, keys, because=f"train.recompute={run.train.recompute}; set it to full")
    if not run.train.tile_mlp:
        _refuse_changed(run, sources, ("train.mlp_tile_size",), because="train.tile_mlp=false; set it to true")
    if run.train.kernels_by_op.get("cross_entropy", run.train.kernels) == "reference":
        because = "the reference form of the loss has all logits at once (train.kernels); set it to auto"
        _refuse_changed(run, sources, ("train.loss_chunk_size",), because=because)
    if not run.optim.cpu_offload:
        because = "optim.cpu_offload=false; set it to true"
        _refuse_changed(run, sources, ("optim.offload_fraction",), because=because)
    if "wandb" not in run.monitor.report_to:
        keys = ("monitor.wandb_project", "monitor.wandb_run_name")
        _refuse_changed(run, sources, keys, because="monitor.report_to does not name wandb; add it")
    if not run.data.val_dataset and not run.data.split_dataset_ratio:
        because = "there is no validation data; set data.val_dataset or data.split_dataset_ratio"
        _refuse_changed(run, sources, ("train.eval_steps", "train.eval_batches"), because=because)


def _contradictions(run: Run) -> list[tuple[bool, str]]:
    parallel, optim, train, data = run.parallel, run.optim, run.train, run.data
    return [
        (
            parallel.overlap_param_gather and not parallel.distributed_optimizer,
            "parallel.overlap_param_gather=true gathers the parameters that the distributed optimizer shards, but "
            "parallel.distributed_optimizer=false: set parallel.distributed_optimizer=true, or parallel.overlap_param_gather=false",
        ),
        (
            parallel.overlap_param_gather and not parallel.overlap_grad_reduce,
            "parallel.overlap_param_gather=true needs parallel.overlap_grad_reduce=true (one set of buckets serves both)",
        ),
        (
            parallel.ddp_bucket_size is not None and not parallel.overlap_grad_reduce,
            f"parallel.ddp_bucket_size={parallel.ddp_bucket_size} has no effect without parallel.overlap_grad_reduce=true: "
            "remove it, or set parallel.overlap_grad_reduce=true",
        ),
        (
            optim.min_lr > optim.lr,
            f"optim.min_lr={optim.min_lr} is above optim.lr={optim.lr}: the learning rate decays from lr to min_lr",
        ),
        (
            optim.warmup_steps > 0 and optim.warmup_fraction > 0,
            f"optim.warmup_steps={optim.warmup_steps} and optim.warmup_fraction={optim.warmup_fraction} both say how long to "
            "warm up: remove one",
        ),
        (
            optim.schedule == "constant" and optim.min_lr > 0,
            f"optim.min_lr={optim.min_lr} has no effect with optim.schedule=constant: "
            "remove it, or use cosine or linear",
        ),
        (
            optim.cpu_offload and run.model.dtype == "float64",
            "optim.cpu_offload=true steps in float32, but model.dtype=float64: set optim.cpu_offload=false or model.dtype=float32",
        ),
        (
            optim.cpu_offload and run.model.dtype != "float32" and not parallel.distributed_optimizer,
            f"optim.cpu_offload=true with parallel.distributed_optimizer=false and model.dtype={run.model.dtype}: Megatron keeps the "
            "float32 copies of bfloat16 weights on the device then; set parallel.distributed_optimizer=true, or "
            "model.dtype=float32",
        ),
        (
            train.offload_activations and train.recompute != "full",
            f"train.offload_activations=true with train.recompute={train.recompute}: everything that a layer saves would go to the host, "
            "and copying it takes longer than computing it again; set train.recompute=full, which saves a layer's input only",
        ),
        (
            train.offload_activations and train.recompute_method == "block",
            "train.offload_activations=true with train.recompute_method=block, which computes some layers of a stage again and lets "
            "the others save everything; set train.recompute_method=uniform",
        ),
        (
            train.steps is not None and train.epochs is not None,
            f"train.steps={train.steps} and train.epochs={train.epochs} both say how long to train: remove one",
        ),
        (
            bool(data.val_dataset) and data.split_dataset_ratio > 0,
            f"data.val_dataset and data.split_dataset_ratio={data.split_dataset_ratio} both say what to validate on: "
            "remove one",
        ),
        (
            train.global_batch_size % train.micro_batch_size != 0,
            f"train.global_batch_size={train.global_batch_size} is not a multiple of "
            f"train.micro_batch_size={train.micro_batch_size}",
        ),
    ]


def _refuse_changed(run: Run, sources: Mapping[str, str], keys: tuple[str, ...], *, because: str) -> None:
    for key in keys:
        value = value_of(run, key)
        if value != settings()[key].default:
            source = sources.get(key, "default")
            raise UserError(f"{key}={_shown(value)} ({source}) has no effect, since {because}")


def check_inputs(run: Run, *, command: str) -> None:
    """For a training run: UserError unless it names a model and data, and every file that it names exists."""
    if run.model.path is None:
        raise UserError(f"{command}: no model; give --model DIR, a Hugging Face directory")
    check_model_directory(run.model.path, what="model.path (--model)")
    check_one_adapter(run, command=command)
    for adapter in run.model.adapters:
        check_model_directory(adapter, what="model.adapters (--adapters)", file="adapter_config.json")
    if not run.data.dataset:
        raise UserError(f"{command}: no training data; give --dataset FILE.jsonl")
    for key, path in (("data.dataset_info", run.data.dataset_info), ("data.chat_template", run.data.chat_template)):
        if path is not None and not Path(path).is_file():
            raise UserError(f"{key}={path}: no such file")
    for key in ("data.dataset", "data.val_dataset"):
        for entry in value_of(run, key):
            _check_dataset(key, entry, named=run.data.dataset_info is not None)


def check_one_adapter(run: Run, *, command: str) -> None:
    """UserError where several adapters are named. Their sum has a larger rank than each of them, so one adapter file could not hold it."""
    if len(adapters := run.model.adapters) > 1:
        first, rest = adapters[0], " ".join(adapters[1:])
        raise UserError(
            f"{command}: --adapters names {len(adapters)} directories ({', '.join(adapters)}), and one adapter goes on a model: merge "
            f"the first one (swift-mega export --adapters {first} --merge_lora true --output MERGED), then give --model MERGED "
            f"--adapters {rest}"
        )


def check_model_directory(path: str, *, what: str, file: str = "config.json") -> None:
    """Raises UserError unless `path` is a directory that holds `file`."""
    if not Path(path).exists():
        raise UserError(f"{what}={path}: no such directory; models are read from disk, so download it first")
    if not Path(path).is_dir():
        raise UserError(f"{what}={path}: not a directory")
    if not (Path(path) / file).is_file():
        raise UserError(
            f"{what}={path}: holds no {file}, so it is no directory of a Hugging Face model or PEFT adapter"
        )


def _check_dataset(key: str, entry: str, *, named: bool) -> None:
    path, mark, rows = entry.rpartition("#")
    if mark and (not rows.isdecimal() or len(rows) > 18 or int(rows) < 1) and not Path(entry).exists():
        raise UserError(f"{key}={entry}: after # comes the number of rows to take, at least 1, not {rows!r}")
    file = Path(path if mark and rows.isdecimal() else entry)
    if not file.exists() and not named:
        raise UserError(f"{key}={entry}: no such file {file}; data is JSONL on disk, or a name from data.dataset_info")
    if file.is_dir():
        raise UserError(f"{key}={entry}: a directory; name its .jsonl files")


def value_of(run: Run, key: str) -> Any:
    """The value at a dotted key."""
    section, name = key.split(".")
    return getattr(getattr(run, section), name)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, tuple) else str(value)
