"""The protocols, by use: an objective and two tuners outside the package (tests/toys), started by name from a recipe.

Each gives, in float64 and in every layout, what transformers and torch alone give on one device: losses, metrics and trained weights.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import tiny
from swift_mega import api
from swift_mega.config import schema
from swift_mega.convert.files.hf_files import Checkpoint
from swift_mega.data.chat import load_tokenizer
from swift_mega.data.loader import prepare
from swift_mega.errors import UserError

LAYOUTS = {"tp2": "parallel.tensor=2", "pp2": "parallel.pipeline=2", "cp2": "parallel.context=2"}
RATE, DECAY, BETA = 0.01, 0.1, 0.3
STEPS, BATCH = 5, 4
LINE, LINE_OF_WEIGHTS = 1e-7, 1e-5
"""transformers' norms are in float32 in a float64 model: losses differ by 4e-9 of their value for that, in every layout alike."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_chat(tmp_path_factory.mktemp("chat") / "model", "llama", max_position_embeddings=512)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [
        {
            "query": f"What is {n} plus {n}?" + " Please." * (n % 5),
            "response": f"It is {2 * n}.",
            "rejected_response": f"Add them yourself, {'friend' * (n % 3)}",
        }
        for n in range(STEPS * BATCH)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def recipe(model: Path, rows: Path, output: Path, *changes: str, epochs: int = 1) -> schema.Run:
    settings = (
        *(f"model.path={model}", "model.dtype=float64", f"data.dataset={rows}", f"train.output_dir={output}"),
        *(f"train.global_batch_size={BATCH}", "data.shuffle=false", f"optim.lr={RATE}", "optim.schedule=constant"),
        *(f"optim.weight_decay={DECAY}", "optim.clip_grad=0", "optim.eps=1e-4", f"train.epochs={epochs}"),
        *("parallel.distributed_optimizer=false", "monitor.progress=false", *changes),
    )
    changed = {change.partition("=")[0] for change in changes}
    first = [one for one in settings[: -len(changes)] if one.partition("=")[0] not in changed]
    return api.load_recipe(None, [*first, *changes]).run


def logged(done: api.TrainResult) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (done.directory / "logging.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def network_of(model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)


class Oracle:
    """transformers' model on one device, and the examples of a run in order."""

    def __init__(self, model: Path, run: schema.Run, fields: tuple[str, ...] = ()) -> None:
        self.network = network_of(model)
        self.examples = prepare(run.data, load_tokenizer(model), fields=fields).train

    def log_probabilities(self, example: Any, network: Any = None) -> Tensor:
        """[trained tokens] of one example."""
        tokens = torch.from_numpy(example.tokens).long()
        logits = (network or self.network)(input_ids=tokens[None], use_cache=False).logits[0]
        found = logits[:-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        return found[torch.from_numpy(example.trained[1:])]

    def next_token(self, step: int) -> Tensor:
        found = torch.cat([self.log_probabilities(one) for one in self.examples[step * BATCH : (step + 1) * BATCH]])
        return -found.mean()

    def adam(self, chosen: Callable[[str], bool]) -> torch.optim.Optimizer:
        """AdamW without decay of vectors, as Megatron's."""
        mine = [parameter for name, parameter in self.network.named_parameters() if chosen(name)]
        groups = [
            {"params": [one for one in mine if one.dim() > 1], "weight_decay": DECAY},
            {"params": [one for one in mine if one.dim() == 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-4)

    def step(self, loss: Tensor, *optimizers: torch.optim.Optimizer) -> float:
        self.network.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return float(loss.detach())

    def same_weights(self, checkpoint: Path, line: float = LINE_OF_WEIGHTS) -> None:
        found = Checkpoint(checkpoint)
        for name, parameter in self.network.state_dict().items():
            if name in found.entries:
                torch.testing.assert_close(found.read(name).double(), parameter, rtol=0, atol=line)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_objective_with_a_reference(layout: str, model: Path, rows: Path, tmp_path: Path) -> None:
    """DPO with full training: pairs from the data, a second copy of the model as reference, sums over the tokens of context ranks."""
    run = recipe(model, rows, tmp_path, "objective.name=toys.dpo", f"beta={BETA}", "tuner.type=full", LAYOUTS[layout])
    done = api.train(run, nproc=2)
    oracle = Oracle(model, run, ("rejected_response",))
    reference = network_of(model)
    optimizer = oracle.adam(lambda name: True)
    for step, line in enumerate(logged(done)):
        margins, kept = [], []
        for pair in range(step * BATCH, (step + 1) * BATCH):
            ratios = []
            for example in oracle.examples[2 * pair : 2 * pair + 2]:
                with torch.no_grad():
                    before = oracle.log_probabilities(example, reference).sum()
                ratios.append(oracle.log_probabilities(example).sum() - before)
                kept.append(before)
            margins.append(BETA * (ratios[0] - ratios[1]))
        margin = torch.stack(margins)
        loss = oracle.step(-logsigmoid(margin).mean(), optimizer)
        assert line["loss"] == pytest.approx(loss, rel=LINE, abs=LINE)
        assert line["rewards/margins"] == pytest.approx(float(margin.detach().mean()), rel=LINE, abs=LINE)
        assert line["rewards/accuracies"] == float((margin > 0).double().mean())
        assert line["logps/reference"] == pytest.approx(float(torch.stack(kept[0::2]).mean()), rel=LINE)
    assert logged(done)[0]["loss"] == pytest.approx(math.log(2), rel=1e-12)
    oracle.same_weights(done.checkpoint)


def test_the_reference_of_an_adapter_is_the_model_without_it(model: Path, rows: Path, tmp_path: Path) -> None:
    """The same batch in every step: the reference does not move, the policy does; the metrics reach the event file and the pictures."""
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(rows.read_text().splitlines()[:BATCH]))
    run = recipe(model, few, tmp_path, "objective.name=toys.dpo", "tuner.type=lora", "tp=2", "train.eval_steps=2",
                 f"data.val_dataset={rows}", epochs=4)  # fmt: skip
    done = api.train(run, nproc=2)
    lines = logged(done)
    assert len({line["logps/reference"] for line in lines}) == 1
    oracle = Oracle(model, run, ("rejected_response",))
    with torch.no_grad():
        preferred = [float(oracle.log_probabilities(one).sum()) for one in oracle.examples[0::2]]
    assert lines[0]["logps/reference"] == pytest.approx(sum(preferred) / BATCH, rel=LINE)
    assert lines[0]["loss"] == pytest.approx(math.log(2), rel=1e-12)
    assert lines[-1]["rewards/accuracies"] == 1.0 and lines[-1]["loss"] < 0.6
    evaluated = [json.loads(line) for line in (done.directory / "logging.jsonl").read_text().splitlines()]
    assert [line["eval_rewards/accuracies"] > 0 for line in evaluated if "eval_loss" in line] == [True, True]
    assert {"train_rewards_margins.png", "train_loss.png"} <= {
        path.name for path in (done.directory / "images").iterdir()
    }
    events = b"".join(path.read_bytes() for path in (done.directory / "runs").iterdir())
    assert b"train/rewards/margins" in events and b"eval/rewards/margins" in events


OVERLAPPED = (
    "model.dtype=float32",
    "parallel.distributed_optimizer=true",
    "parallel.overlap_grad_reduce=true",
    "parallel.overlap_param_gather=true",
)


@pytest.mark.parametrize("layout", [*LAYOUTS, "dp2"])
def test_a_tuner_that_trains_layers_in_turn(layout: str, model: Path, rows: Path, tmp_path: Path) -> None:
    """On two data ranks with the distributed optimizer and all overlap: what DDP put on the model before a change must be gone."""
    plain, changes = plain_rows(rows, tmp_path), OVERLAPPED if layout == "dp2" else (LAYOUTS[layout],)
    line_of_losses, line_of_weights = (1e-5, 1e-4) if layout == "dp2" else (LINE, LINE_OF_WEIGHTS)
    run = recipe(model, plain, tmp_path, "tuner.type=toys.layers", "switch_every=2", *changes)
    done = api.train(run, nproc=2)
    oracle = Oracle(model, run)
    for step, line in enumerate(logged(done)):
        layer = (0, 3)[step // 2 % 2]
        if step % 2 == 0:
            optimizer = oracle.adam(lambda name, layer=layer: f".layers.{layer}." in name)
        assert line["loss"] == pytest.approx(oracle.step(oracle.next_token(step), optimizer), rel=line_of_losses)
    oracle.same_weights(done.checkpoint, line_of_weights)
    base, trained = Checkpoint(model), Checkpoint(done.checkpoint)
    moved = {name for name in base.entries if not torch.equal(base.read(name).double(), trained.read(name).double())}
    assert moved and {name.split(".")[2] for name in moved} == {"0", "3"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tuner_with_an_optimizer_of_its_own(layout: str, model: Path, rows: Path, tmp_path: Path) -> None:
    plain = plain_rows(rows, tmp_path)
    run = recipe(model, plain, tmp_path, "tuner.type=toys.momentum", "momentum=0.5", LAYOUTS[layout])
    done = api.train(run, nproc=2)
    oracle = Oracle(model, run)
    matrices = [parameter for name, parameter in oracle.network.named_parameters() if ".mlp." in name]
    optimizers = (
        oracle.adam(lambda name: ".mlp." not in name),
        torch.optim.SGD(matrices, lr=RATE, momentum=0.5, weight_decay=DECAY),
    )
    for step, line in enumerate(logged(done)):
        assert line["loss"] == pytest.approx(oracle.step(oracle.next_token(step), *optimizers), rel=LINE)
    oracle.same_weights(done.checkpoint)


def plain_rows(rows: Path, folder: Path) -> Path:
    """The rows without their rejected replies, which next_token would refuse."""
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    path = folder / "plain.jsonl"
    path.write_text("\n".join(json.dumps({key: line[key] for key in ("query", "response")}) for line in lines))
    return path


def test_settings_of_another_kind_are_refused(model: Path, rows: Path, tmp_path: Path) -> None:
    run = recipe(model, plain_rows(rows, tmp_path), tmp_path, "tuner.type=full")
    with pytest.raises(UserError, match=r"tuner\.type='lora' has settings of class Lora, not Tuner"):
        api.train(dataclasses.replace(run, tuner=schema.Tuner(type="lora")), nproc=1)
    with pytest.raises(
        UserError, match=r"objective\.name='toys\.dpo' has settings of class DpoSettings, not Objective"
    ):
        api.train(dataclasses.replace(run, objective=schema.Objective(name="toys.dpo")), nproc=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["tuner.type=toys.absent"], "tuner.type='toys.absent' cannot be used .ModuleNotFoundError"),
        (["tuner.type=toys.dpo"], "module toys.dpo has no TUNER"),
        (["tuner.type=toys.layers", "switch_every=0"], "switch_every=0: expected a whole number of at least 1"),
        (["switch_every=2"], "unknown setting switch_every"),
        (["tuner.type=toys.nothing"], "its TUNER is no subclass of Tuner; derive it from swift_mega.tuners.tuner.Tuner"),
        (["tuner.type=toys.broken"], "step 2: the tuner trains 'decoder.layers.9.\\*', and no parameter of the model has such a name"),
        (["objective.name=dpp"], "objective.name='dpp' is not known; known: next_token"),
        (["objective.name=toys.dpo", "beta=0"], "beta=0.0: expected above 0"),
        (["tuner.type=toys.momentum", "parallel.distributed_optimizer=true", "model.dtype=float32"],
         "parallel.distributed_optimizer=true with tuner.type=toys.momentum, whose own optimizer needs whole gradients"),
        (["objective.name=toys.dpo"], "plain.jsonl:1: column 'rejected_response' is missing or empty, and the objective needs it"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    changes: list[str], message: str, model: Path, rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        api.train(recipe(model, plain_rows(rows, tmp_path), tmp_path, *changes), nproc=1)
