"""Settings: which source wins, where a value came from, and the message of every mistake."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from swift_mega.config.load import load, split_arguments, to_dict, to_json
from swift_mega.config.parse import size_in_bytes
from swift_mega.config.schema import Run
from swift_mega.config.show import to_yaml
from swift_mega.config.tree import find, settings
from swift_mega.errors import UserError

Recipe = Callable[[str], str]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """recipe(text) -> the path of a recipe with that text, relative to the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        Path("recipe.yaml").write_text(text)
        return "recipe.yaml"

    return write


def test_nothing_given_is_the_schema() -> None:
    resolved = load(None)
    assert resolved.run == Run()
    assert set(resolved.sources) == set(settings())
    assert set(resolved.sources.values()) == {"default"}


def test_each_place_wins_over_the_one_before(recipe: Recipe) -> None:
    path = recipe("optim:\n  lr: 1e-3\n  beta1: 0.8\n  beta2: 0.7\n# a comment\nparallel:\n  tensor: 2\n")
    resolved = load(path, ["optim.beta1=0.5", "optim.beta2=0.6"], ["--adam_beta2", "0.4"])
    assert (resolved.run.optim.lr, resolved.run.optim.beta1, resolved.run.optim.beta2) == (1e-3, 0.5, 0.4)
    assert resolved.run.parallel.tensor == 2
    sources = {
        key: resolved.sources[key] for key in ("optim.lr", "optim.beta1", "optim.beta2", "optim.eps", "parallel.tensor")
    }
    assert sources == {
        "optim.lr": "recipe.yaml:2",
        "optim.beta1": "override",
        "optim.beta2": "--adam_beta2",
        "optim.eps": "default",
        "parallel.tensor": "recipe.yaml:7",
    }


def test_a_commands_defaults_are_the_weakest(recipe: Recipe) -> None:
    defaults = {"data.loss_on": "all", "tuner.type": "full"}
    resolved = load(recipe("tuner_type: lora"), defaults=defaults, defaults_source="default of pt")
    assert (resolved.run.data.loss_on, resolved.run.tuner.type) == ("all", "lora")
    assert (resolved.sources["data.loss_on"], resolved.sources["tuner.type"]) == ("default of pt", "recipe.yaml:1")


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("optim: {lr: 1e-4}", "optim.lr", 1e-4),  # PyYAML reads 1e-4 as text
        ("optim: {lr: 3}", "optim.lr", 3.0),
        ("optim.lr: 2.5e-5", "optim.lr", 2.5e-5),
        ("lora_rank: 16", "tuner.rank", 16),
        ("train_iters: 1e3", "train.steps", 1000),
        ("model: some/dir", "model.path", "some/dir"),
        ("data: {system: no}", "data.system", "no"),  # YAML 1.1 reads no as false
        ("data: {model_name: 007}", "data.model_name", "007"),
        ("data: {model_name: 'null'}", "data.model_name", "null"),
        ("data: {model_name: null}", "data.model_name", None),
        ("data: {model_name: }", "data.model_name", None),
        ("data: {packing: True}", "data.packing", True),
        ("data: {dataset: [a, 'b,c']}", "data.dataset", ("a", "b,c")),
        ("data: {dataset: 'a, b'}", "data.dataset", ("a, b",)),
        ("data: {dataset: a.jsonl#5}", "data.dataset", ("a.jsonl#5",)),
        ("dataset:\n  - a\n  - b", "data.dataset", ("a", "b")),
        ("data: {columns: {question: query}}", "data.columns", {"question": "query"}),
        ("report_to: none", "monitor.report_to", ()),
        ("loss_scale: last_round", "data.loss_on", "last"),
        (
            "model: {megatron: {a: 1, b: 1e-5, c: true, d: text, e: '1', f: null, g: [1, 2]}}",
            "model.megatron",
            {"a": 1, "b": 1e-5, "c": True, "d": "text", "e": "1", "f": None, "g": [1, 2]},
        ),
        ("", "optim.lr", 1e-4),
    ],
)
def test_yaml_means_what_it_says(recipe: Recipe, text: str, key: str, value: object) -> None:
    section, name = key.split(".")
    got = getattr(getattr(load(recipe(text)).run, section), name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("tokens", "key", "value"),
    [
        (["--dataset", "a", "b"], "data.dataset", ("a", "b")),
        (["--dataset", "a,b"], "data.dataset", ("a", "b")),
        (["--dataset=a"], "data.dataset", ("a",)),
        (["--data.dataset", "a", "b"], "data.dataset", ("a", "b")),
        (["--lr", "1e-3"], "optim.lr", 1e-3),
        (["--learning-rate=1e-3"], "optim.lr", 1e-3),
        (["--tensor-model-parallel-size", "4"], "parallel.tensor", 4),
        (["--parallel.tensor", "2"], "parallel.tensor", 2),
        (["--packing"], "data.packing", True),
        (["--packing", "--lr", "1"], "data.packing", True),
        (["--packing", "true"], "data.packing", True),
        (["--packing", "FALSE"], "data.packing", False),
        (["--columns", '{"a": "b"}'], "data.columns", {"a": "b"}),
        (["--data.columns.a", "b"], "data.columns", {"a": "b"}),
        (["--model.megatron.moe_router_topk", "2"], "model.megatron", {"moe_router_topk": 2}),
        (["--target_modules", "q_proj", "k_proj"], "tuner.target_modules", ("q_proj", "k_proj")),
        (["--lr", "1e-3", "--learning_rate", "0.001"], "optim.lr", 1e-3),
        (["--system", "a=b c"], "data.system", "a=b c"),
    ],
)
def test_flags_mean_what_they_say(tokens: list[str], key: str, value: object) -> None:
    section, name = key.split(".")
    got = getattr(getattr(load(None, [], tokens).run, section), name)
    assert got == value and type(got) is type(value)


def test_a_flag_ends_where_its_setting_is_full() -> None:
    tokens = "r.yaml --lr 1e-3 optim.eps=1 --dataset a ./b=c tp=2 --packing max_length=9 --report_to x -h".split()
    positional, flags = split_arguments(tokens)
    assert positional == ["r.yaml", "optim.eps=1", "tp=2", "max_length=9", "-h"]
    assert [(flag.name, flag.words) for flag in flags] == [
        *(("lr", ("1e-3",)), ("dataset", ("a", "./b=c")), ("packing", ()), ("report_to", ("x",))),
    ]


def test_tables_merge_key_by_key(recipe: Recipe) -> None:
    path = recipe("model:\n  megatron:\n    a: 1\n    b: 2\n")
    resolved = load(path, ["model.megatron.b=3"], ["--model.megatron.c", "4"])
    assert resolved.run.model.megatron == {"a": 1, "b": 3, "c": 4}
    keys = [f"model.megatron.{name}" for name in "abc"]
    assert [resolved.sources[key] for key in keys] == ["recipe.yaml:3", "override", "--model.megatron.c"]


YAML_ERRORS = [
    ("- a\n- b", "recipe.yaml:1: a recipe is a mapping of settings (key: value), not a list"),
    ("just words", "recipe.yaml:1: a recipe is a mapping of settings (key: value), not a single value"),
    ("optim:\n  lr: 1\n  lr: 2", "recipe.yaml:3: duplicate key 'lr', first on line 2"),
    ("lr: 1\noptim: {}\nlr: 2", "recipe.yaml:3: duplicate key 'lr', first on line 1"),
    ("optim:\n  lr: [1", "recipe.yaml:2: not valid YAML: expected ',' or ']'"),
    ("a: 1\n\tb: 2", "recipe.yaml:2: not valid YAML: "),
    ("a: \x01", "recipe.yaml: not valid YAML: "),
    ("? [a]\n: 1", "recipe.yaml:1: a key must be a word, not a list"),
    ("lr: 1\n---\nlr: 2", "recipe.yaml:2: not valid YAML: "),
    ("optim:\n  lrr: 1", "recipe.yaml:2: unknown setting optim.lrr (did you mean optim.lr"),
    ("lora_rnk: 1", "recipe.yaml:1: unknown setting lora_rnk (did you mean lora_rank"),
    ("optim: 3", "recipe.yaml:1: optim is a section, not a setting: it has optim.lr, "),
    ("optim:", "recipe.yaml:1: optim is a section, not a setting: it has optim.lr, "),
    ("\noptim: {lr: fast}", "recipe.yaml:2: optim.lr=fast: expected a number"),
    ("optim: {lr: }", "recipe.yaml:1: optim.lr: needs a value, a number"),
    ("optim: {lr: .inf}", "recipe.yaml:1: optim.lr=.inf: expected a number"),
    ("optim: {lr: [1, 2]}", 'recipe.yaml:1: optim.lr=["1", "2"]: expected a number, not several values'),
    ("optim: {lr: {a: 1}}", 'recipe.yaml:1: optim.lr={"a": "1"}: expected a number, not a mapping'),
    ("train: {steps: 1.5}", "recipe.yaml:1: train.steps=1.5: expected a whole number"),
    ("data: {packing: yes}", "recipe.yaml:1: data.packing=yes: expected true or false"),
    (
        "data: {columns: a}",
        'recipe.yaml:1: data.columns=a: expected a mapping such as {"name": "value"}, or data.columns.NAME',
    ),
    ("data: {dataset: [[a]]}", 'recipe.yaml:1: data.dataset=["a"]: expected text, not several values'),
    ("data: {dataset: ['']}", "recipe.yaml:1: data.dataset: a value is empty text"),
    (
        "lora_rank: 8\ntuner: {rank: 4}",
        "tuner.rank is set twice, to different values: by recipe.yaml:1: lora_rank=8 and by",
    ),
]


@pytest.mark.parametrize(("text", "message"), YAML_ERRORS)
def test_a_wrong_recipe_says_where(recipe: Recipe, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(recipe(text))
    assert str(caught.value).startswith(message)


def test_a_recipe_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recipe .*absent.yaml does not exist"):
        load(str(tmp_path / "absent.yaml"))
    with pytest.raises(UserError, match="Is a directory"):
        load(str(tmp_path))
    (tmp_path / "model.bin").write_bytes(b"a: \xff")
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 3\)"):
        load(str(tmp_path / "model.bin"))


WORD_ERRORS = [
    (["lr"], [], "'lr' is neither a recipe (.yaml) nor a setting: write key=value or --flag value"),
    (["=3"], [], "'=3' is neither a recipe"),
    (["optim.lrr=1"], [], "unknown setting optim.lrr (did you mean optim.lr"),
    (["parallel=2"], [], "parallel is a section, not a setting: it has parallel.tensor, "),
    (["tensor=2"], [], "unknown setting tensor (did you mean parallel.tensor?)"),
    (["zzzzzz=2"], [], "unknown setting zzzzzz; `swift-mega config` lists every setting"),
    (["lr=1", "optim.lr=2"], [], "optim.lr is set twice, to different values: by lr=1 and by optim.lr=2"),
    (["data.columns=[1]"], [], 'data.columns=["1"]: expected a mapping'),
    ([], ["--tensor_paralel_size", "2"], "unknown flag --tensor_paralel_size (did you mean --"),
    ([], ["--lr"], "--lr needs a value"),
    ([], ["--lr="], "--lr needs a value"),
    ([], ["--dataset", "--lr", "1"], "--dataset needs a value"),
    ([], ["--lr", "1", "2"], "'2' belongs to no flag"),
    ([], ["--lr", "1", "--learning_rate", "2"], "optim.lr is set twice, to different values: by --lr=1 and by --learning_rate=2"),
    ([], ["--dataset", "a", "--dataset", "b"], "data.dataset is set twice, to different values: by --dataset and by --dataset; "
     "give all its values after one --dataset"),
    ([], ["--tp", "0"], "--tp=0: expected a whole number of at least 1"),
    ([], ["--tp", "-2"], "--tp=-2: expected a whole number of at least 1"),
    ([], ["--tp", "none"], "--tp: needs a value, a whole number"),
    ([], ["--tp", "1.5"], "--tp=1.5: expected a whole number"),
    ([], ["--lr", "-1"], "--lr=-1.0: expected at least 0"),
    ([], ["--lr", "nan"], "--lr=nan: expected a number"),
    ([], ["--lora_dropout", "1"], "--lora_dropout=1.0: expected at least 0 and below 1"),
    ([], ["--split_dataset_ratio", "-0.1"], "--split_dataset_ratio=-0.1: expected at least 0 and below 1"),
    ([], ["--adam_beta1", "1.0"], "--adam_beta1=1.0: expected at least 0 and below 1"),
    ([], ["--lr_warmup_fraction", "1.5"], "--lr_warmup_fraction=1.5: expected between 0 and 1"),
    ([], ["--lora_alpha", "0"], "--lora_alpha=0.0: expected above 0"),
    ([], ["--num_train_epochs", "0"], "--num_train_epochs=0.0: expected above 0"),
    ([], ["--loss_chunk_size", "0"], "--loss_chunk_size=0: expected a whole number of at least 1"),
    ([], ["--tile_mlp", "true", "--mlp_tile_size", "0"], "--mlp_tile_size=0: expected a whole number of at least 1"),
    ([], ["--seed", "-1"], "--seed=-1: expected at least 0"),
    ([], ["--max_shard_size", "big"], "--max_shard_size=big: expected a size such as 500MB, 5GB or 512MiB"),
    ([], ["--output_dir", " "], "--output_dir= : expected text that is not empty"),
    ([], ["--packing", "maybe"], "--packing=maybe: expected true or false"),
    ([], ["--lr_decay_style", "cosin"], "--lr_decay_style=cosin: expected cosine | linear | constant (did you mean cosine?)"),
    ([], ["--report_to", "tensorboard", "swanlab"], "--report_to=swanlab: expected tensorboard | wandb"),
    ([], ["--columns", "a"], '--columns=a: expected a mapping such as {"name": "value"}'),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "flags", "message"), WORD_ERRORS)
def test_a_wrong_word_says_why(overrides: list[str], flags: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(None, overrides, flags)
    assert str(caught.value).startswith(message)


CONTRADICTIONS = [
    (["overlap_param_gather=true", "overlap_grad_reduce=true", "use_distributed_optimizer=false"],
     "parallel.overlap_param_gather=true gathers the parameters that the distributed optimizer shards"),
    (["overlap_param_gather=true"], "parallel.overlap_param_gather=true needs parallel.overlap_grad_reduce=true"),
    (["lr=1e-4", "min_lr=1e-3"], "optim.min_lr=0.001 is above optim.lr=0.0001"),
    (["min_lr=1e-5", "lr_decay_style=constant"], "optim.min_lr=1e-05 has no effect with optim.schedule=constant"),
    (["train_iters=10", "num_train_epochs=2"], "train.steps=10 and train.epochs=2.0 both say how long to train"),
    (["val_dataset=a", "split_dataset_ratio=0.1"], "data.val_dataset and data.split_dataset_ratio=0.1 both say what"),
    (["global_batch_size=6", "micro_batch_size=4"], "train.global_batch_size=6 is not a multiple of train.micro_batch_size=4"),
    (["tuner_type=full", "lora_rank=4"], "lora_rank has no effect: tuner.rank is a setting of tuner.type=lora, and this run has"),
    (["tuner_type=full", "merge_lora=true"], "export.merge_lora=true (override) has no effect, since tuner.type=full"),
    (["tuner_type=full", "target_modules=a,b"], "target_modules has no effect: tuner.target_modules is a setting of tuner.type=lora, and"),
    (["recompute_num_layers=2"], "train.recompute_layers=2 (override) has no effect, since train.recompute=none; set it to"),
    (["mlp_tile_size=64"], "train.mlp_tile_size=64 (override) has no effect, since train.tile_mlp=false; set it to true"),
    (["wandb_project=mine"], "monitor.wandb_project=mine (override) has no effect, since monitor.report_to does not name"),
    (["optimizer_offload_fraction=0.5"], "optim.offload_fraction=0.5 (override) has no effect, since optim.cpu_offload=false"),
    (["optimizer_cpu_offload=true", "optimizer_offload_fraction=0"], "optimizer_offload_fraction=0.0: expected above 0"),
    (["optimizer_cpu_offload=true", "torch_dtype=float64"], "optim.cpu_offload=true steps in float32, but model.dtype=float64"),
    (["optimizer_cpu_offload=true", "use_distributed_optimizer=false"],
     "optim.cpu_offload=true with parallel.distributed_optimizer=false and model.dtype=auto: Megatron keeps"),
    (["offload_activations=true"], "train.offload_activations=true with train.recompute=none: everything that a layer saves"),
    (["offload_activations=true", "recompute_granularity=full", "recompute_method=block"],
     "train.offload_activations=true with train.recompute_method=block"),
    (["eval_steps=5"], "train.eval_steps=5 (override) has no effect, since there is no validation data"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), CONTRADICTIONS)
def test_a_contradiction_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(None, overrides)
    assert str(caught.value).startswith(message)


def test_every_setting_can_be_written_and_read_back(recipe: Recipe) -> None:
    """The output of `config`, and args.json, are recipes that give the same run."""
    flags = [
        "--model",
        "m: x # y",
        "--dataset",
        "a#3",
        "b",
        "--lr",
        "3e-5",
        "--report_to",
        "wandb",
        "--columns",
        '{"q": "query"}',
    ]
    run = load(None, ["model.megatron.a=1e-5", "train_iters=3"], flags).run
    assert load(recipe(to_yaml(load(None, ["model.megatron.a=1e-5", "train_iters=3"], flags)))).run == run
    assert load(recipe(to_json(run))).run == run
    assert json.loads(to_json(run)) == to_dict(run)
    assert to_dict(run)["data"]["dataset"] == ["a#3", "b"]


def test_yaml_says_where_each_value_came_from(recipe: Recipe) -> None:
    resolved = load(recipe("\nlr: 1e-3"), ["tp=2"], ["--packing"])
    changed = to_yaml(resolved, only_changed=True)
    assert yaml.safe_load(changed) == {"optim": {"lr": 1e-3}, "parallel": {"tensor": 2}, "data": {"packing": True}}
    assert [line.split("# ")[1] for line in changed.splitlines() if "#" in line] == [
        "override",
        "--packing",
        "recipe.yaml:2",
    ]
    assert to_yaml(load(None), only_changed=True) == "# every setting has its default\n"
    assert len(yaml.safe_load(to_yaml(load(None)))) == len(dataclasses.fields(Run))


def test_every_name_finds_one_setting() -> None:
    """No two settings have the same flag, and every setting but tables is found by its own key and flags."""
    for key, setting in settings().items():
        for name in (key, *setting.flags):
            found = find(name)
            assert found is not None and found[0].key == key
        assert setting.flags or setting.key in ("model.megatron", "objective.name"), f"{key} has no SWIFT flag"


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5_000_000_000), ("500mb", 500_000_000), ("512MiB", 512 * 2**20), ("1.5K", 1500), ("77", 77), ("0GB", None),
     ("GB", None), ("5 XB", None), ("-1GB", None), ("5i", None), ("2TB", 2 * 10**12)],
)  # fmt: skip
def test_sizes(text: str, size: int | None) -> None:
    assert size_in_bytes(text) == size
