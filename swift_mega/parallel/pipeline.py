"""Which layers each chunk of a pipeline has: evenly, with another number in the first or last stage, or as written out."""

import re

from swift_mega.config.schema import Parallel
from swift_mega.errors import UserError


def chunk_layers(parallel: Parallel, layers: int) -> tuple[int, ...]:
    """Layers of every chunk in model order."""
    stages, virtual = parallel.pipeline, parallel.virtual_pipeline
    if virtual > 1 and stages == 1:
        raise UserError(
            f"parallel.virtual_pipeline={virtual} interleaves chunks of several stages, and parallel.pipeline=1"
        )
    if stages * virtual > layers:
        raise UserError(
            f"parallel.pipeline={stages} x parallel.virtual_pipeline={virtual} = {stages * virtual} chunks are more "
            f"than the model's {layers} layers, and a chunk needs at least one"
        )
    uneven = parallel.first_stage_layers is not None or parallel.last_stage_layers is not None
    if parallel.pipeline_layout is not None:
        if uneven:
            raise UserError(
                "parallel.pipeline_layout already gives what first_stage_layers and last_stage_layers give: set one"
            )
        return _explicit_layers(parallel.pipeline_layout, layers, stages, virtual)
    stage_layers = _uneven_stages(parallel, layers) if uneven else [layers / stages] * stages
    for stage, count in enumerate(stage_layers):
        if count % virtual or count < 1:
            raise UserError(
                f"{layers} layers cannot be spread evenly over parallel.pipeline={stages} x parallel.virtual_pipeline="
                f"{virtual}: stage {stage} would have {count:g} layers in {virtual} chunk{'s' * (virtual > 1)}"
            )
    return tuple(int(count) // virtual for count in stage_layers) * virtual


def _uneven_stages(parallel: Parallel, layers: int) -> list[float]:
    """Layers of every stage where the first or the last is given; the remaining layers are spread over the other stages."""
    stages, first, last = parallel.pipeline, parallel.first_stage_layers, parallel.last_stage_layers
    if stages == 1:
        raise UserError("first_stage_layers and last_stage_layers need several stages, and parallel.pipeline=1")
    given = {0: first, stages - 1: last}
    fixed = {stage: count for stage, count in given.items() if count is not None}
    left, others = layers - sum(fixed.values()), stages - len(fixed)
    wording = f"parallel.first_stage_layers={first} and parallel.last_stage_layers={last}".replace("None", "(even)")
    if min(fixed.values()) < 1 or left < others or (not others and left):
        raise UserError(f"{wording} leave {left} of the model's {layers} layers for the {others} other stages")
    if others and left % others:
        raise UserError(f"{wording} leave {left} layers, which {others} other stages cannot share evenly")
    return [fixed[stage] if stage in fixed else left / others for stage in range(stages)]


def _explicit_layers(text: str, layers: int, stages: int, virtual: int) -> tuple[int, ...]:
    counts = parse_pipeline_layout(text)
    if len(counts) != stages * virtual:
        raise UserError(
            f"parallel.pipeline_layout={text!r} has {len(counts)} chunks, but parallel.pipeline={stages} x "
            f"parallel.virtual_pipeline={virtual} = {stages * virtual}"
        )
    if sum(counts) != layers:
        raise UserError(f"parallel.pipeline_layout={text!r} places {sum(counts)} layers, but the model has {layers}")
    if 0 in counts:
        raise UserError(
            f"parallel.pipeline_layout={text!r} leaves chunk {counts.index(0)} without a layer, and each needs one"
        )
    return counts


def parse_pipeline_layout(text: str) -> tuple[int, ...]:
    """Layers of every chunk in model order, from '7,8,8,7' or from Megatron's form 'Et*7|t*8|(t*8|)*1t*7L'.

    Megatron's letters: E embedding, t layer, L loss, `x*n` and `(x)*n` repeat, commas are cosmetic.
    """
    if re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text):
        return tuple(int(count) for count in text.split(","))
    plain = re.sub(r"[\s,]", "", text)
    # Parentheses are expanded before letters, as in Megatron: pipeline_parallel_layer_layout.py, parse_str_to_list
    for repeat in (r"\(([^()]+)\)\*(\d{1,4})", r"([EtL|])\*(\d{1,4})"):
        plain = re.sub(repeat, lambda match: match.group(1) * int(match.group(2)), plain)
    chunks = plain.split("|")
    form = "parallel.pipeline_layout is like '7,8,8,7' or 'Et*7|t*8|t*8|t*7L'"
    if "m" in plain:
        raise UserError(
            f"parallel.pipeline_layout={text!r} places multi-token prediction layers (m), which are not supported"
        )
    if unknown := sorted(set(plain) - set("EtL|")):
        raise UserError(
            f"parallel.pipeline_layout={text!r} has {unknown[0]!r}, which is neither a count nor E, t, L: {form}"
        )
    if not (plain.startswith("E") and plain.endswith("L") and plain.count("E") == plain.count("L") == 1):
        raise UserError(f"parallel.pipeline_layout={text!r} must start with its one E and end with its one L: {form}")
    return tuple(chunk.count("t") for chunk in chunks)


def balanced(layers: int, chunks: int) -> list[int]:
    """Layers over chunks as evenly as possible. The chunks in the middle get the rest, because the ends also have embedding and head."""
    extra = layers % chunks
    first = (chunks - extra) // 2
    return [layers // chunks + (first <= chunk < first + extra) for chunk in range(chunks)]
