"""Comparison of two checkpoints: the first point where their hidden states differ, and how well their logits agree."""

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from swift_mega.api.candidate import Backend, Candidate
from swift_mega.api.proof import SENTENCES, say_of_unused_gpus
from swift_mega.api.ready import DEVICE, on_device
from swift_mega.convert.files.which_files import unread
from swift_mega.convert.megatron.mcore import companions_of, is_mcore, iteration_directory
from swift_mega.convert.megatron.padding import check_padding
from swift_mega.convert.source import Source
from swift_mega.data.chat import load_tokenizer
from swift_mega.data.prompts import line_rows, prompt_rows
from swift_mega.data.vocabulary import check_tokens
from swift_mega.errors import UserError
from swift_mega.launch.torchrun import is_first_rank, joined, run_ranks, world_size
from swift_mega.models.modules.te_attention import check_te_runs
from swift_mega.models.quantization import FLAG, quantization_of
from swift_mega.parallel.agree import agree, gather
from swift_mega.parallel.layout import parse_layout, plan_layout
from swift_mega.tuners.lora_files import read_adapter
from swift_mega.verify import distance as comparing
from swift_mega.verify import parity
from swift_mega.verify.distance import Comparison
from swift_mega.verify.states import Rows, Side

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def compare(
    a: Candidate | str,
    b: Candidate | str,
    *,
    prompts: str | None,
    tokenizer: str | None,
    dtype: str,
    tolerance: float | None,
    top_k: int,
    dequantize: bool,
    scratch: str | None,
    json: str | None,
    plot: str | None,
) -> Comparison:
    """Does what `api.compare` says."""
    say_of_unused_gpus()
    one, other = (Candidate(checkpoint=c) if isinstance(c, str) else c for c in (a, b))
    if dtype not in comparing.TOLERANCES:
        raise UserError(f"dtype={dtype!r} is not one that models are compared in: {', '.join(comparing.TOLERANCES)}")
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise UserError(f"--tolerance={tolerance}: expected a number of at least 0")
    for path, ending in ((json, None), (plot, ".png")):
        _check_file(path, ending)
    if scratch is not None and not Path(scratch).is_dir():
        raise UserError(f"--scratch={scratch}: no such directory; create it first")
    notes: list[str] = []
    sides = _side(one, "a", dequantize, notes), _side(other, "b", dequantize, notes)
    for layout in (side.layout for side in sides if side.layout is not None):
        check_te_runs(layout.mesh, DEVICE, getattr(torch, dtype))
    if dequantize and not any(side.dequantize for side in sides):
        raise UserError("--dequantize: neither side states a quantization_config, both are plain; remove it")
    _check_shapes(*sides)
    vocab = sides[0].vocab
    if not 1 <= top_k <= vocab:
        raise UserError(f"--top_k={top_k}: expected 1 to {vocab}, the number of tokens in the vocabulary")
    reader = _tokenizer(sides, tokenizer, prompts)
    rows = _rows(reader, prompts, vocab)
    worlds = [_world(side) for side in sides]
    kind, limit = getattr(torch, dtype), comparing.TOLERANCES[dtype] if tolerance is None else tolerance
    if joined():
        distances, agreement = run_ranks(worlds[0], _both, sides, worlds, rows, kind, top_k, scratch)
    else:
        distances, agreement = _both(sides, worlds, rows, kind, top_k, scratch)
    if reader is not None:
        agreement.first = comparing.texts(agreement, reader.decode)
    found = Comparison(
        sides[0].name, sides[1].name, dtype, limit, len(rows), distances, agreement, tuple(dict.fromkeys(notes))
    )
    if is_first_rank():
        if json is not None:
            found.write_json(Path(json))
        if plot is not None:
            found.plot(Path(plot))
    return found


def _both(
    sides: Sequence[Side], worlds: Sequence[int], rows: Rows, dtype: torch.dtype, top_k: int, scratch: str | None
) -> Any:
    """Runs one side after the other: each with its own ranks, or both with the ranks that torchrun started."""
    with _folder(scratch) as folder:
        run_ranks(worlds[0], on_device, comparing.record, sides[0], rows, dtype, folder)
        return run_ranks(worlds[1], on_device, comparing.measure, sides[1], rows, dtype, folder, top_k)


@contextmanager
def _folder(parent: str | None) -> Iterator[Path]:
    """A temporary folder, the same one on all ranks; rank 0 removes it."""
    import torch.distributed as dist

    if not dist.is_initialized():
        with tempfile.TemporaryDirectory(prefix="swift-mega-compare-", dir=parent) as made:
            yield Path(made)
        return
    with tempfile.TemporaryDirectory(prefix="swift-mega-compare-", dir=parent) as made:
        yield Path(gather(made)[0])
        # All ranks wait here, so rank 0 does not remove the folder too early.
        agree(None)


# ------------------------------------------------------------------------------------------------ what is compared


def _side(given: Candidate, letter: str, dequantize: bool, notes: list[str]) -> Side:
    path = Path(given.checkpoint)
    if not path.is_dir():
        raise UserError(f"--{letter}={path}: no such directory; give a Hugging Face directory or a Megatron checkpoint")
    files = is_mcore(path)
    if files:
        iteration_directory(path)
        config = _config_of(path, given.model, letter)
    elif given.model is not None:
        raise UserError(
            f"--{letter}_model={given.model} is the config of a Megatron checkpoint, and {path} is not one; remove it"
        )
    else:
        config = path
    source = Source(config)
    known = source.is_known
    quantised = quantization_of(config) is not None
    if not files and (said := unread(path)):
        notes.append(said)
    backend: Backend = given.backend or ("mcore" if known or files else "hf")
    if backend not in ("mcore", "hf"):
        raise UserError(f"--{letter}_backend={backend}: expected mcore | hf")
    if backend == "hf":
        _check_transformers(given, letter, files)
        if given.backend is None:
            notes.append(
                f"model_type {source.config['model_type']} of {path} is not supported by swift_mega: transformers runs it"
            )
    if given.adapter is not None:
        read_adapter(given.adapter)
    # The weights of a Megatron checkpoint are plain, also where the original model is quantised.
    dequantize = dequantize or files
    if quantised and not dequantize:
        raise UserError(f"{config} is quantised; pass {FLAG} to read its weights dequantised")
    layout = None
    if backend == "mcore":
        shape = Source(config, dequantize=dequantize and quantised).settings.shape
        layers, hidden, vocab = shape.layers, shape.hidden, shape.vocab
        if files and (said := check_padding(path, config, vocab)):
            notes.append(said)
        parallel, world = parse_layout(given.layout or "single")
        layout = plan_layout(parallel, shape, world_size() if joined() else world, training=False)
    else:
        layers, hidden, vocab = _sizes(config)
    return Side(
        checkpoint=path,
        config=config,
        model=given.model,
        backend=backend,
        mcore_files=files,
        layout=layout,
        layers=layers,
        hidden=hidden,
        vocab=vocab,
        adapter=None if given.adapter is None else Path(given.adapter),
        dequantize=dequantize and quantised,
    )


def _config_of(path: Path, model: str | None, letter: str) -> Path:
    try:
        folder, _ = companions_of(path, model)
    except UserError as error:
        raise UserError(str(error).replace("--model DIR", f"--{letter}_model DIR")) from None
    return folder


def _check_transformers(given: Candidate, letter: str, files: bool) -> None:
    if files:
        raise UserError(
            f"--{letter}_backend=hf: transformers cannot read the Megatron checkpoint {given.checkpoint}; remove it, or convert that "
            "to Hugging Face files first"
        )
    if given.layout not in (None, "single"):
        raise UserError(
            f"--{letter}_layout={given.layout} splits a model over Megatron's ranks, and transformers runs {given.checkpoint} on one; "
            "remove it"
        )


def _sizes(config: Path) -> tuple[int, int, int]:
    """(layers, hidden size, vocabulary size) of a model; from transformers' config where the model_type is not known here."""
    from transformers import AutoConfig

    source = Source(config, dequantize=True)
    if source.is_known:
        shape = source.settings.shape
        return shape.layers, shape.hidden, shape.vocab
    try:
        found = AutoConfig.from_pretrained(config, trust_remote_code=False).get_text_config()
        return found.num_hidden_layers, found.hidden_size, found.vocab_size
    except (ValueError, KeyError, AttributeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"transformers has no decoder for {config}/config.json: {reason}") from None


def _check_shapes(a: Side, b: Side) -> None:
    fields = {
        "num_hidden_layers": (a.layers, b.layers),
        "hidden_size": (a.hidden, b.hidden),
        "vocab_size": (a.vocab, b.vocab),
    }
    differ = [f"{name} {one} and {other}" for name, (one, other) in fields.items() if one != other]
    if differ:
        raise UserError(
            f"{a.checkpoint} and {b.checkpoint} are models of different shape: {', '.join(differ)}; compare two of one shape"
        )


def _world(side: Side) -> int:
    if joined():
        return world_size()
    return 1 if side.layout is None else side.layout.world


# ------------------------------------------------------------------------------------------------ on what


def _tokenizer(sides: Sequence[Side], given: str | None, prompts: str | None) -> Any:
    """The tokenizer for both sides; None where neither side has one and random tokens can be used."""
    if given is not None:
        return load_tokenizer(given)
    homes = [side.config for side in sides if any((side.config / name).is_file() for name in TOKENIZER_FILES)]
    if not homes:
        if prompts is not None:
            raise UserError(f"neither side has a tokenizer for {prompts}; give --tokenizer DIR, or remove --prompts")
        return None
    first, *rest = (load_tokenizer(home) for home in dict.fromkeys(homes))
    for other in rest:
        if first.get_vocab() != other.get_vocab() or any(
            first(s)["input_ids"] != other(s)["input_ids"] for s in SENTENCES
        ):
            raise UserError(
                f"the tokenizers of {homes[0]} and {homes[1]} differ; give --tokenizer DIR, which is used for both"
            )
    return first


def _rows(tokenizer: Any, prompts: str | None, vocab: int) -> list[list[int]]:
    """Token ids of every prompt; random token ids without a tokenizer."""
    if tokenizer is None:
        return parity.example_rows(vocab)
    rows = []
    for where, row in line_rows(SENTENCES, tokenizer) if prompts is None else prompt_rows(prompts, tokenizer):
        check_tokens(row, vocab, tokenizer, where=where, remedy="give their own tokenizer with --tokenizer DIR")
        if row:
            rows.append(row)
    if not rows:
        raise UserError(f"--prompts={prompts}: no prompt has a token; give a text file with one prompt a line")
    return rows


def _check_file(path: str | None, ending: str | None) -> None:
    """UserError, before the models run, where a result file could not be written."""
    if path is None:
        return
    if ending is not None and not path.lower().endswith(ending):
        raise UserError(f"--plot={path}: plots are PNG files; give a name that ends in {ending}")
    if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
        raise UserError(f"{path}: a file cannot be written there; give a file name in a directory that exists")
