"""A whole run through the API, from data to checkpoints, in SWIFT's output layout; and what stops it before ranks start."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from swift_mega import api
from swift_mega.convert.files.hf_files import Checkpoint
from swift_mega.device.device import Device
from swift_mega.errors import UserError
from swift_mega.launch.torchrun import run_ranks
from swift_mega.models.translate import load_settings
from swift_mega.train.loop import flops_per_token


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_chat(tmp_path_factory.mktemp("chat") / "model", "llama", max_position_embeddings=512)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [
        {"query": f"What is {n} plus {n}?" + " Please." * (n % 5), "response": f"It is {2 * n}."} for n in range(40)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def recipe(model: Path, rows: Path, output: Path, *changes: str) -> Any:
    base = [
        f"model.path={model}",
        f"data.dataset={rows}",
        f"train.output_dir={output}",
        "data.max_length=128",
        "train.global_batch_size=4",
        "optim.lr=0.01",
        "monitor.progress=false",
        "monitor.report_to=tensorboard",
        "train.steps=6",
    ]
    names = {change.partition("=")[0] for change in changes}
    return api.load_recipe(None, [*(one for one in base if one.partition("=")[0] not in names), *changes]).run


def logits(model: Path, adapters: Path | None) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapters is not None:
        network = PeftModel.from_pretrained(network, str(adapters))
    with torch.no_grad():
        return network(torch.arange(3, 40)[None]).logits[0]


@pytest.fixture(scope="module")
def lora_run(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> api.TrainResult:
    run = recipe(
        model,
        rows,
        tmp_path_factory.mktemp("lora"),
        "parallel.tensor=2",
        "parallel.pipeline=2",
        "parallel.sequence=true",
        "data.packing=true",
        "data.split_dataset_ratio=0.1",
        "train.eval_steps=3",
        "train.save_steps=2",
        "train.save_total_limit=2",
        "export.merge_lora=true",
    )
    return api.train(run, nproc=4)


def test_lora_run_learns(lora_run: api.TrainResult) -> None:
    assert len(lora_run.losses) == 6
    assert lora_run.losses[-1] < lora_run.losses[0] - 0.5
    assert [step for step, _ in lora_run.evaluations] == [3, 6]
    assert lora_run.evaluations[1][1] < lora_run.evaluations[0][1]


def test_lora_run_leaves_swifts_layout(lora_run: api.TrainResult) -> None:
    names = {path.name for path in lora_run.directory.iterdir()}
    assert names == {
        "args.json",
        "logging.jsonl",
        "runs",
        "images",
        "checkpoint-4",
        "checkpoint-6",
        "checkpoint-6-merged",
    }
    assert {path.name for path in lora_run.checkpoint.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "report.json",
        "generation_config.json",
    }
    lines = [json.loads(line) for line in (lora_run.directory / "logging.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["iteration"] for line in steps] == [f"{n}/6" for n in range(1, 7)]
    assert [line["loss"] for line in steps] == pytest.approx(lora_run.losses, abs=1e-4)
    assert json.loads((lora_run.directory / "args.json").read_text())["layout"] == "tp2-pp2-sp"


def test_adapter_and_merged_model_are_the_same_model(lora_run: api.TrainResult, model: Path) -> None:
    """PEFT with the adapter and transformers with the merged model give the same logits, which differ from the base's."""
    assert lora_run.merged is not None
    adapted = logits(model, lora_run.checkpoint)
    torch.testing.assert_close(logits(lora_run.merged, None), adapted, atol=1e-4, rtol=0)
    assert (adapted - logits(model, None)).abs().max() > 0.1


def test_trained_adapter_gives_megatrons_logits(lora_run: api.TrainResult, model: Path) -> None:
    report = api.verify(str(model), ["tp2-sp"], adapters=str(lora_run.checkpoint), dtype="float32")
    assert report.passed, report.table()


def test_training_goes_on_from_an_adapter(lora_run: api.TrainResult, model: Path, rows: Path, tmp_path: Path) -> None:
    """--adapters continues from the adapter: the first loss is near its last one, far from the base model's."""
    run = recipe(model, rows, tmp_path, f"model.adapters={lora_run.checkpoint}", "train.steps=1", "data.packing=true")
    again = api.train(run, nproc=1)
    assert abs(again.losses[0] - lora_run.losses[-1]) < abs(lora_run.losses[0] - lora_run.losses[-1]) / 2


def test_layouts_train_alike(model: Path, rows: Path, tmp_path: Path) -> None:
    """In every layout, the loss curve and the files of a run equal those of one rank."""
    one = api.train(recipe(model, rows, tmp_path / "one", "train.steps=4", "optim.eps=1e-4"), nproc=1)
    two = api.train(
        recipe(model, rows, tmp_path / "two", "train.steps=4", "optim.eps=1e-4", "parallel.tensor=2"), nproc=4
    )
    assert two.losses == pytest.approx(one.losses, abs=1e-4)
    a, b = Checkpoint(one.checkpoint), Checkpoint(two.checkpoint)
    for name in a.entries:
        torch.testing.assert_close(a.read(name), b.read(name), atol=1e-4, rtol=0)


def test_tiles_and_chunks_train_alike(rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A whole run with all communication over data ranks overlapped: the loss curve is the same, and the run says what it does not tile."""
    model = tiny.make_chat(tmp_path / "model", "qwen2_moe", max_position_embeddings=512)
    shared = ("tuner.type=full", "train.steps=4", "optim.eps=1e-4", "data.split_dataset_ratio=0.1")
    shared += (
        "parallel.overlap_grad_reduce=true",
        "parallel.overlap_param_gather=true",
        "parallel.ddp_bucket_size=5000",
    )
    plain = api.train(recipe(model, rows, tmp_path / "plain", *shared), nproc=2)
    assert "tile_mlp" not in capfd.readouterr().out
    tiles = ("train.tile_mlp=true", "train.mlp_tile_size=7", "train.loss_chunk_size=5")
    tiled = api.train(recipe(model, rows, tmp_path / "tiled", *shared, *tiles), nproc=2)
    assert "tile_mlp            not the routed experts" in capfd.readouterr().out
    assert tiled.losses == pytest.approx(plain.losses, abs=1e-5)
    assert tiled.evaluations[-1][1] == pytest.approx(plain.evaluations[-1][1], abs=1e-5)


def test_routed_experts_alone_are_not_tiled(rows: Path, tmp_path: Path) -> None:
    """One error before ranks start, not a setting without an effect."""
    model = tiny.make_chat(tmp_path / "model", "mixtral", max_position_embeddings=512)
    with pytest.raises(UserError, match="every MLP of this model is routed experts"):
        api.train(recipe(model, rows, tmp_path / "out", "train.tile_mlp=true"), nproc=2)


def test_full_run_in_bfloat16(model: Path, rows: Path, tmp_path: Path) -> None:
    """bfloat16 weights with float32 masters learn, and the checkpoint is a whole bfloat16 model with its tokenizer."""
    run = recipe(
        model,
        rows,
        tmp_path,
        "tuner.type=full",
        "model.dtype=bfloat16",
        "parallel.pipeline=2",
        "optim.lr=0.003",
        "train.recompute=full",
        "train.add_version=false",
        "export.max_shard_size=60KB",
    )
    done = api.train(run, nproc=2)
    assert done.directory == tmp_path.resolve()
    assert done.losses[-1] < done.losses[0] - 0.5
    found, source = Checkpoint(done.checkpoint), Checkpoint(model)
    assert found.entries.keys() == source.entries.keys()
    assert {entry.dtype for entry in found.entries.values()} == {torch.bfloat16}
    assert len({entry.file for entry in found.entries.values()}) > 1
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors.index.json"} <= {
        p.name for p in done.checkpoint.iterdir()
    }
    assert logits(done.checkpoint, None).isfinite().all()


def test_offloaded_run(model: Path, rows: Path, tmp_path: Path) -> None:
    """Inputs of layers and the optimizer's state on the host, with evaluations and checkpoints between steps: the same run."""
    changes = (
        "tuner.type=full",
        "model.dtype=bfloat16",
        "train.recompute=full",
        "train.steps=3",
        "data.split_dataset_ratio=0.1",
        "train.eval_steps=1",
        "train.save_steps=1",
    )
    flags = ("offload_activations=true", "optimizer_cpu_offload=true", "optimizer_offload_fraction=0.7")
    plain = api.train(recipe(model, rows, tmp_path / "plain", *changes), nproc=2)
    done = api.train(recipe(model, rows, tmp_path / "moved", *changes, *flags), nproc=2)
    assert done.losses == plain.losses and done.evaluations == plain.evaluations and len(done.evaluations) == 3
    found, want = Checkpoint(done.checkpoint), Checkpoint(plain.checkpoint)
    assert all(torch.equal(found.read(name), want.read(name)) for name in want.entries)


def test_a_float32_model_has_no_narrower_sum(model: Path, rows: Path, tmp_path: Path) -> None:
    changes = ("model.dtype=float32", "parallel.gradients_in_float32=false")
    with pytest.raises(
        UserError, match="gradients_in_float32=false sums gradients in the dtype of the weights, and that is float32"
    ):
        api.train(recipe(model, rows, tmp_path / "out", *changes), nproc=1)


def test_pretraining_trains_every_token(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(
        "\n".join(
            json.dumps({"text": "The quick brown fox jumps over the lazy dog. " * (1 + n % 3)}) for n in range(20)
        )
    )
    run = recipe(
        model, text, tmp_path / "out", "tuner.type=full", "data.loss_on=all", "data.packing=true", "optim.lr=0.003"
    )
    done = api.train(run, nproc=1)
    assert done.losses[-1] < done.losses[0] - 1


def test_evaluations_can_take_a_part(model: Path, rows: Path, tmp_path: Path) -> None:
    """One batch of four is the evaluation of a file with the first four rows."""
    lines = [json.dumps({"query": f"Say {n}", "response": "yes" * (n + 1)}) for n in range(6)]
    for name, count in (("four", 4), ("six", 6)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines[:count]))

    def evaluated(name: str, *changes: str) -> list[tuple[int, float]]:
        run = recipe(
            model, rows, tmp_path / "out", f"data.val_dataset={tmp_path / name}.jsonl", "train.steps=1", *changes
        )
        return api.train(run, nproc=1).evaluations

    four, six = evaluated("four"), evaluated("six")
    assert evaluated("six", "eval_iters=1") == four != six == evaluated("six", "eval_iters=99")


def test_infer_answers(lora_run: api.TrainResult, model: Path) -> None:
    answer = api.infer(model=str(model), adapters=str(lora_run.checkpoint)).answer(
        [{"role": "user", "content": "What is 3 plus 3?"}], max_new_tokens=8
    )
    assert isinstance(answer, str) and answer


def test_conversion_there_and_back(model: Path, tmp_path: Path) -> None:
    api.convert(
        source=str(model),
        to="mcore",
        output=str(tmp_path / "mcore"),
        parallel=api.Parallel(tensor=2, pipeline=2),
    )
    api.convert(source=str(tmp_path / "mcore"), to="hf", output=str(tmp_path / "hf"))
    a, b = Checkpoint(model), Checkpoint(tmp_path / "hf")
    assert a.entries.keys() == b.entries.keys()
    assert all(
        a.entries[name].dtype == b.entries[name].dtype and torch.equal(a.read(name), b.read(name)) for name in a.entries
    )
    assert {p.name for p in (tmp_path / "hf").iterdir()} == {p.name for p in model.iterdir()} | {"report.json"}


@pytest.mark.parametrize(
    "changes, said",
    [
        (["parallel.tensor=3"], "parallel.tensor=3"),
        (["parallel.pipeline=8"], "pipeline"),
        (["parallel.expert=2"], "has none"),
        (["parallel.sequence=true"], "parallel.sequence=true"),
        (["tuner.type=lorra"], "known: full, lora"),
        (["objective.name=dqo"], "known: next_token"),
        (["tuner.target_modules=q_prj"], "'q_prj' names no linear"),
        (["train.global_batch_size=3"], "set it to 2 or 4"),
        (["train.global_batch_size=3", "train.micro_batch_size=2"], "not a multiple"),
        (["optim.warmup_steps=6"], "warmup"),
        (["model.megatron.hidden_sizes=4"], "did you mean hidden_size"),
        (["model.megatron.hidden_size=4"], "follows from the model"),
        (["export.max_shard_size=big"], "500MB"),
        (["model.router_aux_loss_coefficient=0.1"], "no experts"),
        (["data.max_length=4"], "data.max_length=4"),
        (
            ["parallel.context=2", "parallel.cp=te:p2p"],
            "parallel.cp=te:p2p needs CUDA and Transformer Engine, and ranks run on the CPU",
        ),
        (["model.megatron.cp_comm_type=a2a"], "follows from the model and the layout; set parallel.*"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_impossible_runs_stop_before_they_start(
    model: Path, rows: Path, tmp_path: Path, changes: list[str], said: str
) -> None:
    """One UserError that names the value, and no output directory."""
    with pytest.raises(UserError) as caught:
        api.train(recipe(model, rows, tmp_path / "out", *changes), nproc=2)
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_stops_the_run(model: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not finite, so no later step"):
        api.train(
            recipe(
                model, rows, tmp_path / "out", "optim.lr=1e30", "tuner.type=full", "optim.clip_grad=0", "train.steps=20"
            ),
            nproc=1,
        )


@pytest.mark.parametrize("name", ["llama", "starcoder2_plain"])
def test_flops_count_weights(tmp_path: Path, cpu: Device, name: str) -> None:
    """6 per weight and token where weights are trained, 4 where they are frozen. Embeddings are lookups, not products.

    A gated MLP has three linears, another MLP two.
    """
    model = tiny.make(tmp_path, name)
    settings = load_settings(str(model))
    names = Checkpoint(model).entries
    weights = sum(
        torch.Size(entry.shape).numel()
        for name, entry in names.items()
        if len(entry.shape) == 2 and "embed" not in name
    )
    assert flops_per_token(settings, trained=True) == 6 * weights
    assert flops_per_token(settings, trained=False) == 4 * weights


def test_verify_passes_and_fails(model: Path) -> None:
    report = api.verify(str(model), ["tp2", "pp2"])
    assert report.passed and "tp2" in report.table() and "every layout equals" in report.table()
    assert not api.verify(str(model), ["single"], tolerance=1e-18).passed


def test_one_rank_needs_no_process_group(model: Path, rows: Path, tmp_path: Path) -> None:
    """A notebook's process is not changed."""
    api.train(recipe(model, rows, tmp_path, "train.steps=1"), nproc=1)
    assert not torch.distributed.is_initialized()
    assert run_ranks(2, torch.distributed.get_world_size) == 2


@pytest.mark.parametrize("sequence", [False, True])
def test_dropout_of_adapters_differs_by_step_and_not_by_rank(
    model: Path, rows: Path, tmp_path: Path, sequence: bool
) -> None:
    """Dropout changes the loss of a step after a trained adapter; replicas stay equal (otherwise the run would diverge)."""
    base = ["train.steps=3", "parallel.tensor=2", f"parallel.sequence={str(sequence).lower()}", "tuner.rank=4"]
    plain = api.train(recipe(model, rows, tmp_path / "plain", *base), nproc=2)
    dropped = api.train(recipe(model, rows, tmp_path / "dropped", *base, "tuner.dropout=0.5"), nproc=2)
    assert dropped.losses[0] == pytest.approx(plain.losses[0], abs=1e-5)  # `up` is zero: the adapter adds nothing yet
    assert abs(dropped.losses[2] - plain.losses[2]) > 1e-4


def test_a_balancing_loss_is_logged_beside_the_loss(rows: Path, tmp_path: Path) -> None:
    """Without its coefficient, and not in `loss`: a large coefficient does not change `loss` of the first step."""
    moe = tiny.make_chat(tmp_path / "model", "qwen3_moe")
    want = ["train.steps=1", "model.router_aux_loss_coefficient=5", "model.megatron.moe_z_loss_coeff=3"]
    losses = []
    for name, changes in (("plain", want[:1]), ("both", want)):
        api.train(recipe(moe, rows, tmp_path / name, *changes), nproc=1)
        (log,) = (tmp_path / name).glob("**/logging.jsonl")
        losses.append(json.loads(log.read_text().splitlines()[0]))
    plain, both = losses
    assert both["loss"] == plain["loss"] and both["grad_norm"] > plain["grad_norm"]
    assert (
        1 < both["load_balancing_loss"] < 4
        and both["z_loss"] > 0
        and not {"load_balancing_loss", "z_loss"} & plain.keys()
    )


def test_what_a_config_names_and_training_leaves_out_is_said_once(
    rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Dropout of pretraining in config.json: one line, from the first of two ranks."""
    named = tiny.make_chat(tmp_path / "model", "starcoder2", residual_dropout=0.1)
    api.train(recipe(named, rows, tmp_path / "out", "parallel.tensor=2", "train.steps=1"), nproc=2)
    assert capfd.readouterr().err.count("not used from config.json: residual_dropout=0.1") == 1
