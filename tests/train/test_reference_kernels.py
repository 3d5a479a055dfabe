"""train.kernels: a training step in plain torch equals one with the best forms, and runs the reference forms only; and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from swift_mega import api
from swift_mega.config import schema
from swift_mega.device.device import CPU, Device
from swift_mega.errors import UserError
from swift_mega.models import fusions
from swift_mega.models.kernels import check_kernels, te_layers, uses
from swift_mega.models.megatron_config import transformer_config
from swift_mega.models.translate import load_settings
from swift_mega.objectives.objective import Loss, Output
from swift_mega.ops import kernels as registry
from swift_mega.ops.kernels import AUTO, Kernels
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.layout import Layout, parse_layout, plan_layout
from swift_mega.parallel.mesh import Mesh
from swift_mega.train.header import header
from swift_mega.train.step import run_schedule
from swift_mega.train.wire import build_training
from swift_mega.verify import parity
from tests.ops.test_registry import nodes

CUDA = Device(kind="cuda", device=CPU, backend="gloo", name="stand-in")
OURS = {
    "_RmsNormBackward",
    "_RotateBackward",
    "_CpuAttentionBackward",
    "_ByBlocksBackward",
    "_LogProbabilitiesBackward",
}
"""The gradients of our own that tuned forms have on the CPU. A ring has its own in any form, because ranks communicate in it."""
MODELS: dict[str, tuple[str, set[str], set[str]]] = {
    # layout, nodes of OURS with `auto`, ops
    "llama": (
        "cp2-ring",
        {"_RmsNormBackward", "_RotateBackward", "_LogProbabilitiesBackward"},
        {"attention_blocks", "rope", "rms_norm", "cross_entropy"},
    ),
    "gemma2": ("tp2-sp", OURS - {"_CpuAttentionBackward"}, {"attention", "rope", "rms_norm", "cross_entropy"}),
    "gpt_oss": ("cp2-ulysses", OURS - {"_ByBlocksBackward"}, {"attention", "rope", "rms_norm", "cross_entropy"}),
    "deepseek_v3_dense": ("single", OURS - {"_ByBlocksBackward"}, {"attention", "rope", "rms_norm", "cross_entropy"}),
    "qwen3_next": (
        "single",
        OURS - {"_ByBlocksBackward"},
        {"attention", "rope", "rms_norm", "causal_conv", "gated_delta", "cross_entropy"},
    ),
    "bloom": ("single", {"_CpuAttentionBackward", "_LogProbabilitiesBackward"}, {"attention", "cross_entropy"}),
}


def step(
    directory: Path, cpu: Device, layout: Layout, form: str
) -> tuple[float, dict[str, Any], set[str], set[str], str]:
    """One rank: loss and gradients of a step, autograd nodes, the ops that asked the registry, and the header's line."""
    run = schema.Run(
        model=schema.Model(path=str(directory), dtype="float64"),
        parallel=schema.Parallel(distributed_optimizer=False),
        tuner=schema.Full(),
        train=schema.Train(kernels=form),
    )
    groups = parallel_groups.init(layout)
    training = build_training(run, cpu, groups, steps=1)
    asked, behind, resolve, loss_of = set[str](), set[str](), registry.resolve, training.objective.loss

    def watched(output: Output) -> Loss:
        found = loss_of(output)
        behind.update(nodes(found.sum))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.objective, "loss", watched)
        patch.setattr(registry, "resolve", lambda op, *given: asked.add(op.name) or resolve(op, *given))
        rows = parity.microbatches(parity.example_rows(131, examples=4), layout, groups.coordinate.data)
        for chunk in training.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        loss = run_schedule(training, rows, forward_only=False).loss
    gradients = {
        named.name: named.parameter.main_grad.clone()
        for named in training.part.named_parameters()
        if named.parameter.requires_grad
    }
    line = header(training)[1]
    listed = {use.op.name for use in uses(training.part.settings, layout.mesh, te=False)}
    assert asked | ({"attention_blocks"} if layout.mesh.ring > 1 else set()) == listed, "the header's list is the truth"
    parallel_groups.close()
    return loss, gradients, behind & OURS, listed, line


def both(directory: Path, cpu: Device, layout: Layout) -> Any:
    plain, best = (step(directory, cpu, layout, form) for form in ("reference", "auto"))
    assert plain[0] == pytest.approx(best[0], rel=1e-12)
    assert plain[1].keys() == best[1].keys()
    for name, gradient in best[1].items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(
            plain[1][name], gradient, rtol=0, atol=1e-11 * max(largest, 1e-3), msg=lambda m, n=name: f"{n}: {m}"
        )
    return [one[2:] for one in (plain, best)]


@pytest.mark.parametrize("family", MODELS)
def test_a_step_in_plain_torch_equals_one_with_the_best_forms(ranks, cpu, tmp_path, family):
    """Loss and every gradient in float64; the graph of the plain one has none of our gradients."""
    name, tuned, ops = MODELS[family]
    layers = {} if family in ("qwen3_next", "deepseek_v3_dense") else {"num_hidden_layers": 2}
    directory = tiny.make(tmp_path / family, family, **layers)
    parallel, world = parse_layout(name)
    layout = plan_layout(parallel, load_settings(directory).shape, world)
    (plain, listed, line), (best, _, best_line) = ranks(world, both, directory, cpu, layout)
    assert plain == set() and best == tuned and listed == ops
    assert line.startswith("kernels             train.kernels=reference: attention") and "(tuned" not in line
    assert line.count("(reference)") == len(ops)
    assert best_line.startswith("kernels             train.kernels=auto: ") and "(tuned" in best_line


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_chat(tmp_path_factory.mktemp("kernels") / "model", "llama", num_hidden_layers=2)


def test_a_run_is_refused_before_ranks_start(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"query": "a", "response": "b"}\n')

    def refusal(*settings: str) -> str:
        given = [f"model.path={model}", f"data.dataset={data}", f"train.output_dir={tmp_path / 'out'}"]
        with pytest.raises(UserError) as caught:
            api.train(api.load_recipe(None, [*given, *settings]).run)
        return str(caught.value)

    assert (
        "train.kernels=fused, and these ops have none on CPU in float32: attention (needs CUDA), rope (there is none)"
        in refusal("train.kernels=fused")
    )
    assert "have none on CPU in float32: rms_norm (there is none); set" in refusal("train.kernels_by_op.rms_norm=fused")
    assert "this run has no such op; it has attention, rope, rms_norm, cross_entropy" in refusal(
        "train.kernels_by_op.gated_delta=reference"
    )
    assert not (tmp_path / "out").exists()
    for kernels in ("train.kernels=reference", "train.kernels_by_op.cross_entropy=reference"):
        with pytest.raises(
            UserError, match=r"train\.loss_chunk_size=8 .* has no effect, since the reference form of the loss"
        ):
            api.load_recipe(None, [kernels, "train.loss_chunk_size=8"])
    with pytest.raises(UserError, match=r"train\.kernels=fast: expected auto \| fused \| reference"):
        api.load_recipe(None, ["train.kernels=fast"])
    with pytest.raises(UserError, match=r"train\.kernels_by_op\.rope=fast: expected auto \| fused \| reference"):
        api.load_recipe(None, ["train.kernels_by_op.rope=fast"])


def test_plain_torch_is_without_transformer_engine_and_fusions(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA with Transformer Engine and a compiler."""
    monkeypatch.setattr(Device, "uses_transformer_engine", lambda self, dtype: True)
    monkeypatch.setattr(fusions, "cannot_compile", lambda: None)
    settings, half, plain = load_settings(model), torch.bfloat16, Kernels("reference")
    assert te_layers(CUDA, half, AUTO) and not te_layers(CUDA, half, plain)
    names = [[use.op.name for use in uses(settings, Mesh(), te=te)] for te in (True, False)]
    assert names == [["attention", "rope", "cross_entropy"], ["attention", "rope", "rms_norm", "cross_entropy"]]
    layout = plan_layout(schema.Parallel(), settings.shape, 1)

    def fused(train: schema.Train, **given: Any) -> bool:
        config = transformer_config(settings, layout, device=CUDA, dtype=half, train=train, given=given)
        return bool(config.bias_activation_fusion)

    reference = schema.Train(kernels="reference")
    assert fused(schema.Train()) and not fused(reference)
    with pytest.raises(
        UserError, match=r"bias_activation_fusion=True needs train\.kernels=auto, since train\.kernels=reference"
    ):
        fused(reference, bias_activation_fusion=True)
    with pytest.raises(
        UserError, match=r"train\.kernels=reference computes attention in torch, but parallel\.cp=te:p2p asks"
    ):
        check_kernels(plain, settings, Mesh(ring=2, te=True), CUDA, half)
