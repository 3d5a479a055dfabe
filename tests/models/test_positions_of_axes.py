"""Tokens with positions on three axes (M-RoPE), and an embedding of more than tokens, against Qwen2-VL's text model in transformers.

transformers' norms compute in float32, so the oracle gets RMSNorms in float64; its rotation and attention are its own.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from swift_mega.config import schema
from swift_mega.convert.load import load
from swift_mega.convert.source import Source
from swift_mega.data.pack import Example, Microbatch, collate
from swift_mega.device.device import Device
from swift_mega.errors import UserError
from swift_mega.models.build import Decoder, build
from swift_mega.models.megatron_config import transformer_config
from swift_mega.models.settings import Rope
from swift_mega.models.translate import load_settings
from swift_mega.objectives.objective import Head
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.layout import Layout, parse_layout, plan_layout
from swift_mega.parallel.sequence import local_tokens
from swift_mega.train.step import local_part
from swift_mega.train.wire import Training, build_training
from swift_mega.verify.parity import collect_logits, example_rows
from tests import tiny

SECTIONS = [2, 3, 3]
IMAGE = 7
"""The token whose embedding is replaced."""


def checkpoint(directory: Path, **rope: Any) -> Path:
    """A tiny qwen2 with heads of 8 rotated pairs."""
    parameters = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": SECTIONS, **rope}
    return tiny.make(
        directory, "qwen2", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, rope_parameters=parameters,
        num_hidden_layers=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("axes") / "model")


def layout_of(model: Path, name: str) -> Layout:
    parallel, world = parse_layout(name)
    return plan_layout(parallel, load_settings(model).shape, world)


def batch() -> Microbatch:
    """Two examples in one row of 40 tokens, which no layout here pads, with some image tokens. Each axis has positions of its own, which
    do not grow with every token.
    """
    first, second = example_rows(131, examples=2, shortest=23, longest=23)
    rows = [first[:17], second]
    for example in rows:
        example[2:9:3] = [IMAGE] * 3
    row = collate([Example(tokens=np.asarray(x, dtype=np.int32), trained=np.ones(len(x), dtype=bool)) for x in rows])
    draw = torch.Generator().manual_seed(1)
    positions = torch.randint(0, 90, (3, len(row.tokens)), generator=draw)
    return replace(row, positions=positions)


def theirs(model: Path, row: Microbatch, features: Tensor | None = None) -> list[Tensor]:
    """Logits of each example by transformers in float64. features: [n, hidden], for the tokens IMAGE of the row, in order."""
    from transformers.models.qwen2_vl import modeling_qwen2_vl as module
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig

    source = Source(model)
    fields = {key: source.config[key] for key in tiny.SIZES if key in source.config}
    config = Qwen2VLTextConfig(
        **fields, rope_parameters=source.config["rope_parameters"], rms_norm_eps=source.config["rms_norm_eps"]
    )
    config._attn_implementation = "sdpa"
    network: Any = module.Qwen2VLTextModel(config).double().eval()
    weights = {name.removeprefix("model."): source.tensors.read(name).double() for name in source.tensors.entries}
    head = weights.pop("lm_head.weight")
    network.load_state_dict(weights)
    found, bounds = [], row.cu_seqlens.tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            module.Qwen2VLRMSNorm,
            "forward",
            lambda norm, x: F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon),
        )
        for start, length in zip(bounds, row.lengths.tolist(), strict=False):
            place = slice(start, start + length)
            embedded = network.embed_tokens(row.tokens[place])
            if features is not None:
                mine = which_feature(row.tokens)[place]
                embedded = torch.where((mine >= 0)[:, None], features[mine.clamp(min=0)], embedded)
            given = {"inputs_embeds": embedded[None], "position_ids": row.positions[:, None, place]}
            found.append(network(**given, use_cache=False).last_hidden_state[0] @ head.t())
    return found


def which_feature(tokens: Tensor) -> Tensor:
    """[tokens] int64: the number of the feature that a token takes, -1 for none."""
    image = tokens == IMAGE
    return torch.where(image, image.cumsum(0) - 1, -1)


def training_of(directory: Path, cpu: Device, layout: Layout) -> Training:
    run = schema.Run(
        model=schema.Model(path=str(directory), dtype="float64"),
        parallel=schema.Parallel(distributed_optimizer=False),
        tuner=schema.Full(),
    )
    return build_training(run, cpu, parallel_groups.init(layout), steps=1)


def compare_logits(directory: Path, cpu: Device, layout: Layout, expected: list[Tensor]) -> None:
    """One rank: three axes give what transformers gives; three equal axes give the bits of one axis."""
    training, row = training_of(directory, cpu, layout), batch()
    axis = row.positions[1]
    rows = [replace(row, positions=positions) for positions in (row.positions, axis.expand(3, -1), axis, axis)]
    found = collect_logits(training, rows)  # empty where there is no last stage
    for three, equal, one, want in zip(*found[:3], expected, strict=True) if found else ():
        torch.testing.assert_close(three, want, rtol=0, atol=1e-12)
        assert torch.equal(equal, one) and not torch.equal(three, one)
    compared = torch.tensor(len(found))
    dist.all_reduce(compared)
    assert compared
    parallel_groups.close()


@pytest.mark.parametrize("name", ["single", "tp2-sp", "cp2-ring", "cp2-ulysses", "pp2"])
def test_three_axes_equal_transformers(ranks, cpu, model, name):
    layout = layout_of(model, name)
    ranks(layout.world, compare_logits, model, cpu, layout, theirs(model, batch()))


# ------------------------------------------------------------------------------------------------ an embedding of more than tokens


class WithFeatures(Decoder):
    """Puts features in the place of some tokens' embedding."""

    def embed(self, tokens: Tensor, positions: Tensor, *, features: Tensor, which: Tensor) -> Tensor:
        """features: [n, hidden]. which: [tokens], the number of a token's feature, -1 for none."""
        which = self.own_tokens(which)
        embedded = super().embed(tokens, positions)
        return torch.where((which >= 0)[:, None, None], features[which.clamp(min=0), None], embedded)


def compare_features(directory: Path, cpu: Device, layout: Layout, expected: Tensor, gradient: Tensor) -> None:
    """One rank: the loss and the gradient of the features are transformers'."""
    groups, source = parallel_groups.init(layout), Source(directory)
    train = schema.Train()
    config = transformer_config(source.settings, layout, device=cpu, dtype=torch.float64, train=train, given={})
    part = build(
        source.family, source.settings, layout, groups.coordinate, device=cpu, config=config, decoder=WithFeatures
    )
    load(part, source.tensors, groups)
    row = batch()
    which, features = which_feature(row.tokens), features_of(row).requires_grad_()
    if groups.row is not None:
        which = which[local_tokens(row.cu_seqlens.tolist(), groups.row.mesh, groups.row.rank)]
    mine = local_part(row, groups.row)
    hidden = part.chunks[0](mine.tokens, mine.positions, mine.cu_seqlens, groups.row, features=features, which=which)
    loss = -Head(part, groups).log_probabilities(part.chunks[0], hidden, mine.labels).sum()
    loss.backward()
    found = [loss.detach(), features.grad]
    # Every rank has the gradient by its own tokens. The loss is the same on tensor ranks.
    found[0] /= layout.tensor
    for one in found:
        dist.all_reduce(one)
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(found[1], gradient, rtol=0, atol=1e-12)
    parallel_groups.close()


def features_of(row: Microbatch) -> Tensor:
    count = int((row.tokens == IMAGE).sum())
    assert count > 2
    return 0.3 * torch.randn(count, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("name", ["tp2-sp", "cp2"])
def test_an_embedding_of_more_than_tokens(ranks, cpu, model, name):
    layout = layout_of(model, name)
    row = batch()
    features = features_of(row).requires_grad_()
    logits = torch.cat(theirs(model, row, features))
    loss = F.cross_entropy(logits, row.labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, features)
    ranks(layout.world, compare_features, model, cpu, layout, loss.detach(), gradient)


# ------------------------------------------------------------------------------------------------ config.json


def test_sections_of_config_json(tmp_path):
    """Qwen2-VL's pairs by section, Qwen3-VL's alternating; sections that do not fit the head are refused."""
    assert Rope((1.0,) * 7, sections=(2, 3, 2)).axes == (0, 0, 1, 1, 1, 2, 2)
    assert Rope((1.0,) * 7, sections=(3, 2, 2), sections_interleaved=True).axes == (0, 1, 2, 0, 1, 2, 0)
    assert Rope((1.0,)).axes == ()
    made = load_settings(checkpoint(tmp_path / "ok", mrope_section=[4, 2, 2], mrope_interleaved=True))
    assert made.rope is not None and made.rope.axes == (0, 1, 2, 0, 1, 2, 0, 0)
    for number, parameters in enumerate([
        {"mrope_section": [2, 3, 2]},
        {"mrope_section": [8, 0, 0]},
        {"mrope_section": [2, 3, 3], "mrope_interleaved": True},
    ]):  # fmt: skip
        directory = checkpoint(tmp_path / str(number), **parameters)
        with pytest.raises(UserError, match=r"mrope_section=\[.*\] does not share out the 8 rotated pairs of a head"):
            load_settings(directory)
