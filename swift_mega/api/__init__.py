"""swift_mega as Python functions; the command line calls the same functions.

A function starts its ranks itself, or joins the ranks that torchrun started, so a notebook needs no code for torch.distributed.
Everything that can be checked before ranks start is checked before.

This import is quick and changes nothing in torch. The first call sets this process's device up and then imports Megatron (`ready.py`).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from swift_mega.api.candidate import Candidate
from swift_mega.config.load import Resolved, load
from swift_mega.config.schema import Model, Parallel, Run

if TYPE_CHECKING:
    from swift_mega.api.answers import Answerer
    from swift_mega.api.proof import Report
    from swift_mega.convert.blueprint_report import ConversionReport
    from swift_mega.memory.report import MemoryEstimate
    from swift_mega.train.loop import TrainResult
    from swift_mega.verify.distance import Comparison

__all__ = [
    "Answerer", "Candidate", "Comparison", "Parallel", "Report", "TrainResult", "compare", "convert", "export", "infer", "load_recipe",
    "plan", "plan_memory", "quantize", "train", "verify",
]  # fmt: skip
RESULTS = ("Answerer", "Comparison", "Report", "TrainResult")


def __getattr__(name: str) -> Any:
    """The classes of results, which are in modules that import Megatron."""
    if name not in RESULTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from swift_mega.api import answers, proof, ready  # noqa: F401
    from swift_mega.train import loop
    from swift_mega.verify import distance

    return next(getattr(module, name) for module in (answers, proof, loop, distance) if hasattr(module, name))


def load_recipe(path: str | None = None, overrides: Sequence[str] = (), flags: Sequence[str] = ()) -> Resolved:
    """Settings from a YAML recipe, `key=value` overrides and SWIFT-style flags; `.run` of the result is the argument of `train`."""
    return load(path, overrides, flags)


def train(run: Run, *, nproc: int | None = None, sources: Mapping[str, str] | None = None) -> "TrainResult":
    """Trains with the settings of `run`, on `nproc` ranks of this machine (default: NPROC_PER_NODE or 1) or on the ranks of torchrun.

    Raises UserError before ranks start where settings, model, data and layout do not fit together. Ranks of torchrun connect first, so
    an error on one of them (a file that its machine does not have) ends all.
    sources: where each setting comes from (`Resolved.sources`). When a run continues an adapter, tuner settings that the user did not set
    are taken from the adapter.
    """
    from swift_mega.api import training

    return training.train(run, nproc=nproc, sources=sources)


def convert(
    *,
    source: str,
    to: str,
    output: str,
    model: str | None = None,
    parallel: Parallel | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    dequantize: bool = False,
    rows: Model | None = None,
) -> None:
    """Converts to="mcore": a Hugging Face directory to a Megatron checkpoint in a layout; to="hf": either kind to a Hugging Face directory.

    model: directory with config and tokenizer, for a Megatron checkpoint that another program wrote. dtype: of the result; the default is
    the dtype of each source tensor, so a round trip is bit-exact. dequantize: read a quantised source as plain weights, in `dtype` or the
    dtype of its config.json. rows: settings that enlarge the vocabulary (resize_vocab, new_special_tokens, new_rows); only for a Hugging
    Face source. One process converts for all ranks of the layout; where torchrun or the caller started ranks, each does its part.

    Raises UserError, and leaves no output, where a tensor is missing, not used, or has a wrong shape; also where the output exists and
    `overwrite` is not set.
    """
    from swift_mega.api import conversion

    conversion.convert(
        source=source,
        to=to,
        output=output,
        model=model,
        parallel=parallel,
        dtype=dtype,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        dequantize=dequantize,
        rows=rows,
    )


def plan(
    *, source: str, parallel: Parallel | None = None, dtype: str | None = None, dequantize: bool = False
) -> "ConversionReport":
    """What `convert(to="mcore")` would do with a Hugging Face directory, or with its config.json alone. No weight is read or written.

    Raises the UserError that `convert` would raise.
    """
    from swift_mega.api import conversion

    return conversion.plan(source=source, parallel=parallel, dtype=dtype, dequantize=dequantize)


def export(
    *,
    model: str,
    adapters: str,
    output: str,
    merge: bool = True,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    dequantize: bool = False,
) -> None:
    """Writes `model` with the PEFT adapter merged into its weights: computed in float32, stored in the model's dtypes.

    dequantize: `model` is quantised; the output is plain.
    """
    from swift_mega.api import conversion

    conversion.export(
        model=model,
        adapters=adapters,
        output=output,
        merge=merge,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        dequantize=dequantize,
    )


def quantize(
    *,
    model: str,
    output: str,
    block: tuple[int, int] = (128, 128),
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    dequantize: bool = False,
) -> None:
    """Writes `model` with the linear layers of attention and MLP in FP8, one scale per block: the format of DeepSeek's and Qwen's files.

    block: rows and columns of a block. dequantize: `model` is quantised itself; FP8 weights with the same blocks are copied unchanged.
    """
    from swift_mega.api import conversion

    conversion.quantize(
        model=model,
        output=output,
        block=block,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        dequantize=dequantize,
    )


def plan_memory(run: Run, *, ranks: int, gpu_bytes: int, host_bytes: int | None = None) -> "MemoryEstimate":
    """Memory by part of the rank that needs the most, and the longest packed row that fits. Reads only config.json of the model.

    gpu_bytes: memory of one GPU. host_bytes: host memory of one rank; None: no limit. Raises the UserErrors that training would raise.
    """
    from swift_mega.api import memory

    return memory.plan_memory(run, ranks=ranks, gpu_bytes=gpu_bytes, host_bytes=host_bytes)


def verify(
    model: str,
    layouts: Sequence[str] | None = None,
    *,
    tolerance: float = 1e-4,
    prompts: str | None = None,
    tuner: str = "full",
    target_modules: Sequence[str] = ("all-linear",),
    adapters: str | None = None,
    dtype: str = "float64",
    dequantize: bool = False,
) -> "Report":
    """Compares logits, loss and gradients of every layout with Hugging Face's, on fixed sentences or on `prompts`.

    prompts: a text file with one prompt a line, or a .jsonl data set, read as for training.
    tuner: "full" compares the gradients of all parameters. "lora" compares those of an adapter with PEFT's: the adapter in `adapters`,
    or a random one on `target_modules`. dtype: of both sides. In float32 both sides round, and deep models with large activations can
    differ by more than the tolerance although both are right; float64 shows differences between the programs.
    dequantize: `model` is quantised; each layout dequantises its slices, and Hugging Face gets the whole model as plain float32 files.
    """
    from swift_mega.api import proof

    return proof.verify(
        model,
        layouts,
        tolerance=tolerance,
        prompts=prompts,
        tuner=tuner,
        target_modules=target_modules,
        adapters=adapters,
        dtype=dtype,
        dequantize=dequantize,
    )


def compare(
    a: Candidate | str,
    b: Candidate | str,
    *,
    prompts: str | None = None,
    tokenizer: str | None = None,
    dtype: str = "float32",
    tolerance: float | None = None,
    top_k: int = 5,
    dequantize: bool = False,
    scratch: str | None = None,
    json: str | None = None,
    plot: str | None = None,
) -> "Comparison":
    """Runs `a`, then `b`, on fixed sentences or on `prompts`; compares the outputs of each layer and of the final norm, and the logits.

    prompts: a text file with one prompt a line, or a .jsonl data set, read as for training.
    dtype: of both models: float32, float64 or bfloat16. tolerance: largest relative difference; default: by dtype (verify/distance.py).
    top_k: number of the most likely tokens that are compared. dequantize: read quantised checkpoints as plain weights. scratch: an
    existing folder that keeps the states of `a` during the run; on several machines, all must see it. json, plot: files to write.
    Joins the ranks of torchrun if there are any. A layout with fewer ranks is then run several times in parallel, as data ranks.
    """
    from swift_mega.api import comparison

    return comparison.compare(
        a,
        b,
        prompts=prompts,
        tokenizer=tokenizer,
        dtype=dtype,
        tolerance=tolerance,
        top_k=top_k,
        dequantize=dequantize,
        scratch=scratch,
        json=json,
        plot=plot,
    )


def infer(
    *, model: str, adapters: str | None = None, chat_template: str | None = None, dequantize: bool = False
) -> "Answerer":
    """Opens a model; `.answer(messages)` generates a reply.

    chat_template: a .jinja file that replaces the model's template. dequantize: read a quantised model as plain weights, in the dtype
    of its config.json.
    """
    from swift_mega.api import answers

    return answers.Answerer(model, adapters, chat_template, dequantize)
