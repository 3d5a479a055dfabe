"""What swift_mega does, as functions: the same ones that the command line calls.

They start their ranks themselves, or join those that torchrun started; a notebook needs to know nothing of torch.distributed.
Everything that can be checked before a rank starts is checked before.
"""

import dataclasses
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift_mega import device as devices

DEVICE = devices.setup()  # before Megatron is imported by anything below

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from swift_mega.config import schema  # noqa: E402
from swift_mega.config.check import check_inputs  # noqa: E402
from swift_mega.config.load import Resolved, load  # noqa: E402
from swift_mega.convert import plan_report, stream  # noqa: E402
from swift_mega.convert.hf_files import Checkpoint  # noqa: E402
from swift_mega.convert.hf_write import parse_size  # noqa: E402
from swift_mega.convert.mcore import companions_of, is_mcore, iteration_directory, load_mcore, save_mcore, widest  # noqa: E402
from swift_mega.convert.plan import draw  # noqa: E402
from swift_mega.convert.plan_report import Plan  # noqa: E402
from swift_mega.convert.quantised import open_checkpoint  # noqa: E402
from swift_mega.convert.save import save  # noqa: E402
from swift_mega.data.chat import load_tokenizer  # noqa: E402
from swift_mega.data.loader import Prepared, prepare  # noqa: E402
from swift_mega.errors import UserError  # noqa: E402
from swift_mega.export import merged, quantized  # noqa: E402
from swift_mega.launch.torchrun import is_first_rank, run_ranks, world_size  # noqa: E402
from swift_mega.models.build import build, transformer_config  # noqa: E402
from swift_mega.models.family import families, family_of, hf_config, load_settings, read_config  # noqa: E402
from swift_mega.models.quantization import stored_dtype  # noqa: E402
from swift_mega.objectives.objective import find_objective  # noqa: E402
from swift_mega.parallel import groups as parallel_groups  # noqa: E402
from swift_mega.parallel.layout import Layout, parse_layout, plan_layout  # noqa: E402
from swift_mega.train import validate  # noqa: E402
from swift_mega.train.build import build_part, dequantised_dtype, warmup_steps  # noqa: E402
from swift_mega.train.loop import TrainResult, check_training, make_batches, total_steps, train_rank  # noqa: E402

__all__ = [
    "Answerer", "Report", "convert", "export", "infer", "load_recipe", "plan", "quantize", "train", "verify",
]  # fmt: skip


def load_recipe(path: str | None = None, overrides: Sequence[str] = (), flags: Sequence[str] = ()) -> Resolved:
    """Settings from a YAML recipe, `key=value` overrides and SWIFT-style flags; `.run` is what `train` takes."""
    return load(path, overrides, flags)


def train(run: schema.Run, *, nproc: int | None = None) -> TrainResult:
    """Trains as `run` says, on `nproc` ranks of this machine (default: NPROC_PER_NODE or 1), or on torchrun's.

    Raises UserError before any rank starts where settings, model, data and layout do not fit together.
    """
    check_inputs(run, command="train")
    assert run.model.path is not None
    settings = load_settings(run.model.path, dequantize=run.model.dequantize)
    layout = plan_layout(run.parallel, settings.shape, world_size(nproc))
    check_training(run, family_of(run.model.path), settings)
    if run.model.dequantize:
        open_checkpoint(run.model.path, torch.float32)  # what is wrong with it is found before ranks start
    find_objective(run.objective)
    tokenizer = load_tokenizer(run.model.path)
    prepared = _prepare(run, tokenizer)
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    batches, _ = make_batches(run, layout, 0, prepared, pad)
    warmup_steps(run.optim, total_steps(run.train, batches))
    return run_ranks(layout.world, train_rank, run, DEVICE, layout, prepared, pad)


def _prepare(run: schema.Run, tokenizer: Any) -> Prepared:
    """Tokenised examples; the first rank shows progress and what became of the rows."""
    with tqdm(desc="tokenising", unit="rows", disable=not (is_first_rank() and run.monitor.progress)) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        prepared = prepare(run.data, tokenizer, progress=progress)
    if is_first_rank():
        print(prepared.report, flush=True)
    return prepared


# ------------------------------------------------------------------------------------------------ convert, export


def convert(
    *, source: str, to: str, output: str, model: str | None = None, parallel: schema.Parallel | None = None,
    dtype: str | None = None, max_shard_size: str = "5GB", overwrite: bool = False, dequantize: bool = False,
) -> None:  # fmt: skip
    """Hugging Face directory -> Megatron checkpoint (`to="mcore"`) in a layout; either of them -> Hugging Face (`to="hf"`).

    model: config and tokenizer for a Megatron checkpoint that something else wrote. dtype: of the result; default: that of every
    source tensor, so that there and back is bit-exact. Raises UserError, and leaves no output, where a tensor is missing, unread,
    or of the wrong shape. An output that is there already is an error, unless `overwrite` says otherwise.
    dequantize: read a quantised source as plain weights, of `dtype` or of the dtype that its config.json names.
    """
    run = schema.Run(model=schema.Model(dequantize=dequantize), parallel=parallel or schema.Parallel())
    kind = getattr(torch, dtype) if dtype else None
    if to == "mcore":
        checkpoint = _opened(run, source, kind)
        layout = _layout_for(run, source)
        wide = kind or widest(checkpoint, family_of(source))
        run_ranks(layout.world, _to_mcore, run, layout, wide, source, output, checkpoint, overwrite)
    elif (Path(source) / "config.json").is_file() and not is_mcore(source):
        checkpoint = _opened(run, source, kind)
        if read_config(source)["model_type"] in families():
            plan(source=source, dtype=dtype, dequantize=dequantize)
        else:
            print(
                f"model_type {read_config(source)['model_type']} is not known: tensors are copied, not checked against it"
            )
        stream.restream(checkpoint, output, dtype=kind, max_shard_bytes=parse_size(max_shard_size), overwrite=overwrite)
    else:
        iteration_directory(source)
        folder, kinds = companions_of(source, model)
        if kinds is None and kind is None:
            raise UserError(f"the dtypes of {source} are unknown, since {folder} has no weights; give --torch_dtype")
        layout = _layout_for(run, str(folder))
        wide = _promoted(kinds) if kinds else kind
        rest = (source, tuple(kinds or ()), kind or kinds, parse_size(max_shard_size), overwrite)
        run_ranks(layout.world, _to_hf, run, layout, wide, str(folder), output, *rest)


def _opened(run: schema.Run, source: str, kind: torch.dtype | None) -> Checkpoint:
    return open_checkpoint(source, dequantised_dtype(run.model, kind or stored_dtype(source)))


def plan(
    *, source: str, parallel: schema.Parallel | None = None, dtype: str | None = None, dequantize: bool = False
) -> Plan:
    """What `convert(to="mcore")` would do with a Hugging Face directory, or with its config.json alone: nothing is read or written.

    Raises UserError where it could not be done, as `convert` would.
    """
    run = schema.Run(model=schema.Model(dequantize=dequantize), parallel=parallel or schema.Parallel())
    layout, kind = _layout_for(run, source), getattr(torch, dtype) if dtype else None
    checkpoint = _opened(run, source, kind) if any(Path(source).glob("*.safetensors")) else None
    kind = kind or (widest(checkpoint, family_of(source)) if checkpoint else torch.bfloat16)
    blueprint = run_ranks(1, draw, source, tuple(checkpoint.entries) if checkpoint else (), dequantize)
    return plan_report.make(blueprint, layout, dtype=kind, directory=Path(source), checkpoint=checkpoint)


def _layout_for(run: schema.Run, directory: str) -> Layout:
    parallel, settings = run.parallel, load_settings(directory, dequantize=run.model.dequantize)
    world = parallel.pipeline * math.lcm(parallel.tensor, parallel.expert * (parallel.expert_tensor or parallel.tensor))
    return plan_layout(parallel, settings.shape, world, training=False)


def _promoted(kinds: Mapping[str, torch.dtype]) -> torch.dtype:
    wide = next(iter(kinds.values()))
    for kind in kinds.values():
        wide = torch.promote_types(wide, kind)
    return wide


def _to_mcore(
    run: schema.Run,
    layout: Layout,
    kind: torch.dtype,
    directory: str,
    output: str,
    checkpoint: Checkpoint,
    overwrite: bool,
) -> None:
    groups = parallel_groups.init(layout)
    part = build_part(run, DEVICE, groups, dtype=kind, adapters=False, checkpoint=checkpoint)
    save_mcore(part, groups, output, checkpoint, overwrite=overwrite)
    parallel_groups.close()


def _to_hf(
    run: schema.Run, layout: Layout, kind: torch.dtype, directory: str, output: str, source: str, names: Sequence[str],
    dtypes: Any, shard_bytes: int, overwrite: bool,
) -> None:  # fmt: skip
    groups = parallel_groups.init(layout)
    settings = load_settings(directory)
    config = transformer_config(settings, layout, device=DEVICE, dtype=kind, train=run.train, given={})
    family = family_of(directory).named_like(names)
    part = build(family, settings, layout, groups.coordinate, device=DEVICE, config=config)
    load_mcore(part, groups, source)
    save(part, groups, output, source=directory, dtypes=dtypes, max_shard_bytes=shard_bytes, overwrite=overwrite)
    parallel_groups.close()


def export(
    *, model: str, adapters: str, output: str, merge: bool = True, max_shard_size: str = "5GB", overwrite: bool = False,
    dequantize: bool = False,
) -> None:  # fmt: skip
    """Writes `model` with the PEFT adapter merged in, in float32 arithmetic and the model's own dtypes.

    dequantize: `model` is quantised, and what is written is plain.
    """
    if not merge:
        raise UserError("merge=False: an adapter is in PEFT's format already; nothing to export")
    merged.merge(model, adapters, output, max_shard_size=max_shard_size, overwrite=overwrite, dequantize=dequantize)


def quantize(
    *, model: str, output: str, block: tuple[int, int] = (128, 128), max_shard_size: str = "5GB", overwrite: bool = False,
    dequantize: bool = False,
) -> None:  # fmt: skip
    """Writes `model` with the linears of attention and MLP in FP8, a scale for each block, as DeepSeek's and Qwen's FP8 files are.

    dequantize: `model` is quantised itself; FP8 of the same blocks stays as it is.
    """
    quantized.quantize(
        model, output, block=block, max_shard_size=max_shard_size, overwrite=overwrite, dequantize=dequantize
    )


# ------------------------------------------------------------------------------------------------ infer


class Answerer:
    """A Hugging Face model, with an adapter or without, that answers greedily."""

    def __init__(self, model: str, adapters: str | None = None) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        family_of(model)
        self.tokenizer = load_tokenizer(model)
        network: Any = AutoModelForCausalLM.from_pretrained(
            model, config=hf_config(model), dtype="auto", trust_remote_code=False
        )
        if adapters is not None:
            from peft import PeftModel

            merged.read_adapter(adapters)
            network = PeftModel.from_pretrained(network, adapters)
        self.network = network.to(DEVICE.device).eval()

    def answer(self, messages: Sequence[Mapping[str, str]], *, max_new_tokens: int = 256) -> str:
        """The reply to a conversation of {"role", "content"} messages."""
        rendered = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(DEVICE.device)
        with torch.inference_mode():
            made = self.network.generate(
                **rendered, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=self.tokenizer.eos_token_id,
                temperature=None, top_p=None, top_k=None,
            )  # fmt: skip
        return self.tokenizer.decode(made[0, rendered["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def infer(*, model: str, adapters: str | None = None) -> Answerer:
    """Loads a model once; `.answer(messages)` asks it."""
    return Answerer(model, adapters)


# ------------------------------------------------------------------------------------------------ verify

LAYOUTS = (
    *("single", "tp2", "tp3", "tp2-sp", "tp3-sp", "pp2", "pp3", "pp2-vpp2", "tp2-pp2-sp", "tp3-pp2-sp", "dp2", "ep2"),
    "tp2-ep2-etp1-sp",
)
"""Tried by `verify` where no layouts are given, as far as the model can be cut so; with tp2 possible, tp3 is left out."""


SENTENCES = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)",
    "Who are you? I am a language model.",
    "Water boils at one hundred degrees Celsius at sea level.",
    "Once upon a time there was a small village by the sea where nobody had ever seen a ship.",
    "In 1969 two people walked on the Moon for the first time.",
    "SELECT name, age FROM users WHERE age > 30 ORDER BY name;",
    "Twice two is four, twice three is six, twice four is eight.",
)
"""What `verify` compares on where nothing is given: ordinary text, since random tokens drive models where they never go."""


@dataclass(frozen=True)
class Report:
    """What `verify` measured."""

    differences: list[validate.Difference]
    tolerance: float
    dtype: str

    @property
    def passed(self) -> bool:
        """Whether logits (absolute) and gradients (relative) of every layout are within the tolerance."""
        return all(
            d.logits <= self.tolerance and d.gradient <= self.tolerance and d.loss <= self.tolerance
            for d in self.differences
        )

    def table(self) -> str:
        """One line per layout."""
        lines = [f"{'layout':18} {'logits':>9} {'loss':>9} {'gradients':>9}  {'':4} worst gradient"]
        for d in self.differences:
            ok = "ok" if max(d.logits, d.gradient, d.loss) <= self.tolerance else "FAIL"
            lines.append(
                f"{d.layout:18} {d.logits:9.1e} {d.loss:9.1e} {d.gradient:9.1e}  {ok:4} {d.worst} (of {d.tensors})"
            )
        verdict = "every layout equals Hugging Face" if self.passed else "NOT EQUAL"
        return "\n".join(
            [*lines, f"{verdict} within {self.tolerance:g} ({self.dtype}; gradients relative to the tensor's largest)"]
        )


def verify(
    model: str, layouts: Sequence[str] | None = None, *, tolerance: float = 1e-4, prompts: str | None = None, tuner: str = "full",
    target_modules: Sequence[str] = ("all-linear",), adapters: str | None = None, dtype: str = "float64", dequantize: bool = False,
) -> Report:  # fmt: skip
    """Compares logits, loss and gradients of every layout with Hugging Face's, on fixed sentences or those of `prompts`.

    prompts: a text file, one prompt a line. tuner: "full" compares every parameter, "lora" the factors of an adapter with PEFT's:
    the one in `adapters`, or a random one on `target_modules`. dtype: of both sides. In float32 both round, and
    deep models with large activations differ by more than the tolerance without either being wrong; float64 shows the programs.
    dequantize: `model` is quantised; the layouts dequantise their slices, Hugging Face is given the whole as plain float32 files.
    """
    settings = load_settings(model, dequantize=dequantize)
    chosen = [_parsed(name, settings.shape) for name in layouts] if layouts else _fitting(settings.shape)
    microbatches = math.lcm(*(layout.data * layout.pipeline for _, layout in chosen))
    rows = _rows(model, prompts, settings.shape.vocab, 2 * microbatches * max(1, 4 // microbatches))
    run = schema.Run(
        model=schema.Model(path=model, dtype=dtype, dequantize=dequantize),  # type: ignore[arg-type]
        tuner=_verified_tuner(tuner, target_modules, adapters),
    )
    with tempfile.TemporaryDirectory(prefix="swift-mega-verify-") as folder:
        found = Path(folder)
        adapter = Path(adapters) if adapters else None
        if run.tuner.type == "lora" and adapter is None:
            adapter = found / "adapter"
            alone = plan_layout(schema.Parallel(), settings.shape, 1)
            run_ranks(1, validate.random_adapter, _for(run, schema.Parallel()), DEVICE, alone, adapter)
        plain = Path(model)
        if dequantize:
            plain = found / "plain"
            stream.restream(open_checkpoint(model, torch.float32), plain, max_shard_bytes=1 << 62)
        run_ranks(1, validate.reference, plain, adapter, rows, found / "reference", getattr(torch, dtype))
        differences: list[validate.Difference] = []
        for parallel, layout in tqdm(chosen, desc="layouts", unit="layout"):
            mine = _for(run, parallel, (str(adapter),) if adapter else ())
            output = found / f"layout{len(differences)}"
            run_ranks(layout.world, validate.measure, mine, DEVICE, layout, rows, output)
            differences.append(validate.compare(layout.name, found / "reference", output))
            shutil.rmtree(output)
        return Report(differences, tolerance, dtype)


def _verified_tuner(tuner: str, target_modules: Sequence[str], adapters: str | None) -> schema.Tuner:
    """The tuner to verify; a given adapter's own rank, scale and targets."""
    if adapters is None:
        return schema.Tuner(type=tuner, target_modules=tuple(target_modules))
    config: dict[str, Any] = dict(merged.read_adapter(adapters).config)
    return schema.Tuner(
        type="lora", rank=config["r"], alpha=config["lora_alpha"], rslora=bool(config.get("use_rslora")),
        target_modules=tuple(config["target_modules"]),
    )  # fmt: skip


def _for(run: schema.Run, parallel: schema.Parallel, adapters: tuple[str, ...] = ()) -> schema.Run:
    """`run` in a layout; gradients are whole only where the optimizer is not cut over data ranks."""
    return dataclasses.replace(
        run,
        parallel=dataclasses.replace(parallel, distributed_optimizer=False),
        model=dataclasses.replace(run.model, adapters=adapters),
    )


def _parsed(name: str, shape: Any) -> tuple[schema.Parallel, Layout]:
    parallel, world = parse_layout(name)
    return parallel, plan_layout(parallel, shape, world)


def _fitting(shape: Any) -> list[tuple[schema.Parallel, Layout]]:
    fitting, tensors = [], set()
    for name in LAYOUTS:
        try:
            parallel, layout = _parsed(name, shape)
        except UserError:
            continue
        if layout.tensor == 3 and 2 in tensors:
            continue
        tensors.add(layout.tensor)
        fitting.append((parallel, layout))
    return fitting


def _rows(model: str, prompts: str | None, vocab: int, count: int) -> list[list[int]]:
    """`count` rows of tokens, or a multiple of it: sentences where the model has a tokenizer, random tokens where not."""
    if prompts is not None:
        lines = [line for line in Path(prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
    elif (Path(model) / "tokenizer_config.json").is_file() or (Path(model) / "tokenizer.json").is_file():
        lines = list(SENTENCES)
    else:
        return validate.example_rows(vocab, examples=count)
    tokenizer = load_tokenizer(model)
    rows = [row for row in (tokenizer(line)["input_ids"] for line in lines) if len(row) > 1]
    if not rows:
        raise UserError(f"{prompts} has no line of two tokens or more; give a text file with one prompt a line")
    return [rows[number % len(rows)] for number in range(-(-len(rows) // count) * count)]
