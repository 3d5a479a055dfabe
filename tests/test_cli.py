"""The command line: its imports, where arguments go, and that every mistake is one line and status 2."""

import io
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import swift_mega
from swift_mega.cli import main
from swift_mega.cli.table import VERBS
from swift_mega.config.schema import Parallel
from swift_mega.config.tree import settings
from swift_mega.convert.files.hf_write import plan_files, write_headers
from swift_mega.convert.files.report import checksums, write_report
from swift_mega.errors import UserError
from swift_mega.launch.watch import RankError

HEAVY = ("torch", "transformers", "megatron", "numpy", "peft", "matplotlib")


class Recorder(types.ModuleType):
    """Replaces swift_mega.api and records the arguments of each call. It tests routing, nothing else."""

    def __init__(self) -> None:
        super().__init__("swift_mega.api")
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.answers: list[list[dict[str, str]]] = []
        self.passed = True
        self.failure: BaseException | None = None
        self.directory, self.checkpoint, self.merged = Path("out/v0"), Path("out/v0/checkpoint-5"), None
        self.Candidate = dict
        for name in ("train", "convert", "export", "infer", "verify", "quantize", "compare"):
            setattr(self, name, self._recording(name))

    def _recording(self, name: str) -> Callable[..., "Recorder"]:
        def record(*args: Any, **kwargs: Any) -> "Recorder":
            self.calls.append((name, args, kwargs))
            if kwargs.get("output"):
                Path(kwargs["output"]).mkdir(exist_ok=True)
                (Path(kwargs["output"]) / "config.json").write_text("new")
            if self.failure is not None:
                raise self.failure
            return self

        return record

    def answer(self, messages: list[dict[str, str]], *, max_new_tokens: int) -> str:
        self.answers.append(list(messages))
        return f"answer {len(self.answers)} in {max_new_tokens}"

    def tokens(self, messages: list[dict[str, str]]) -> list[int]:
        return list(range(len(messages)))

    def table(self) -> str:
        return "the table"


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "swift_mega.api", recorder)
    monkeypatch.setattr(swift_mega, "api", recorder, raising=False)
    return recorder


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, an adapter, data, a recipe, and outputs that exist already."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    for folder, file, text in (
        ("model", "config.json", "{}"),
        ("adapter", "adapter_config.json", json.dumps({"base_model_name_or_path": "model"})),
        ("orphan", "adapter_config.json", "{}"),
        ("lost", "adapter_config.json", json.dumps({"base_model_name_or_path": "nowhere"})),
        ("torn", "adapter_config.json", '{"base'),
        ("mcore", "metadata.json", "{}"),
        ("taken", "config.json", "old"),
        ("precious", "thesis.txt", "old"),
    ):
        Path(folder).mkdir()
        (Path(folder) / file).write_text(text)
    Path("data.jsonl").write_text('{"query": "Who are you?"}\n')
    Path("recipe.yaml").write_text("model: model\ndataset: data.jsonl\noptim:\n  lr: 2e-4\n")
    return tmp_path


SFT = ["sft", "--model", "model", "--dataset", "data.jsonl"]
CONVERT = ["convert", "--model", "model", "--to", "mcore"]
EXPORT = ["export", "--adapters", "adapter", "--merge_lora", "true"]
INFER = ["infer", "--model", "model"]
VERIFY = ["verify", "--model", "model"]
COMPARE = ["compare", "--a", "model", "--b", "mcore"]

MISTAKES = [
    ([], "no verb given; choose one of sft, pt, convert, export, infer, verify, compare, plan, config"),
    (["trian"], "unknown verb 'trian'"),
    (["convrt"], "unknown verb 'convrt' (did you mean convert?)"),
    (["--verbose"], "unknown verb '--verbose'"),
    # settings
    ([*SFT, "--lora_rnk", "8"], "unknown flag --lora_rnk (did you mean --lora_rank"),
    ([*SFT, "--nprc", "8"], "unknown flag --nprc (did you mean --nproc"),
    ([*SFT, "optim.lrr=8"], "unknown setting optim.lrr (did you mean optim.lr"),
    ([*SFT, "--lr", "fast"], "--lr=fast: expected a number"),
    ([*SFT, "--lr"], "--lr needs a value"),
    ([*SFT, "--tp", "0"], "--tp=0: expected a whole number of at least 1"),
    ([*SFT, "--packing", "maybe"], "--packing=maybe: expected true or false"),
    ([*SFT, "--lora_dropout", "1.5"], "--lora_dropout=1.5: expected at least 0 and below 1"),
    ([*SFT, "--lr_decay_style", "step"], "--lr_decay_style=step: expected cosine | linear | constant"),
    ([*SFT, "--lr", "1", "--lr", "2"], "optim.lr is set twice, to different values"),
    ([*SFT, "--train_iters", "3", "--num_train_epochs", "1"], "train.steps=3 and train.epochs=1.0 both say how long"),
    ([*SFT, "--nproc", "two"], "--nproc=two: expected a whole number of at least 1"),
    ([*SFT, "--nproc"], "--nproc needs a value"),
    ([*SFT, "--nproc", "1", "--nproc", "2"], "--nproc is given twice, with 1 and 2"),
    ([*SFT, "-x"], "sft: '-x' is no value of an option"),
    ([*SFT[:3]], "sft: no training data; give --dataset FILE.jsonl"),
    (["sft"], "sft: no model; give --model DIR, a Hugging Face directory"),
    (
        ["pt", "recipe.yaml", "lora_rank=4"],
        "lora_rank has no effect: tuner.rank is a setting of tuner.type=lora, and this run has tuner.type=full",
    ),
    # recipes
    (["sft", "absent.yaml"], "recipe absent.yaml does not exist"),
    (["sft", "recipe"], "sft: 'recipe' is neither a recipe (.yaml) nor a setting (key=value, --flag value)"),
    (["sft", "recipe.yaml", "recipe.yml"], "sft: two recipes, recipe.yaml and recipe.yml"),
    (["sft", "recipe.yaml", "nothing=1"], "unknown setting nothing"),
    # files
    (
        ["sft", "--model", "absent", "--dataset", "data.jsonl"],
        "model.path (--model)=absent: no such directory; models are",
    ),
    (["sft", "--model", "data.jsonl"], "model.path (--model)=data.jsonl: not a directory"),
    (["sft", "--model", "adapter"], "model.path (--model)=adapter: holds no config.json"),
    ([*SFT, "--adapters", "model"], "model.adapters (--adapters)=model: holds no adapter_config.json"),
    ([*SFT[:3], "--dataset", "no.jsonl"], "data.dataset=no.jsonl: no such file no.jsonl"),
    (
        [*SFT[:3], "--dataset", "data.jsonl#0"],
        "data.dataset=data.jsonl#0: after # comes the number of rows to take, at least 1",
    ),
    (
        [*SFT[:3], "--dataset", "data.jsonl#all"],
        "data.dataset=data.jsonl#all: after # comes the number of rows to take",
    ),
    ([*SFT[:3], "--dataset", "model"], "data.dataset=model: a directory; name its .jsonl files"),
    (
        [*SFT, "--adapters", "adapter", "orphan"],
        "sft: --adapters names 2 directories (adapter, orphan), and one adapter goes on a model: merge the first one (swift-mega export "
        "--adapters adapter --merge_lora true --output MERGED), then give --model MERGED --adapters orphan",
    ),
    (
        ["pt", *SFT[1:], "--tuner_type", "lora", "--adapters", "adapter", "adapter"],
        "pt: --adapters names 2 directories",
    ),
    ([*SFT, "--val_dataset", "no.jsonl"], "data.val_dataset=no.jsonl: no such file no.jsonl"),
    ([*SFT, "--chat_template", "no.jinja"], "data.chat_template=no.jinja: no such file"),
    ([*SFT, "--dataset_info", "no.json"], "data.dataset_info=no.json: no such file"),
    # convert
    (
        ["convert", "--model", "model", "--output", "o"],
        "convert: --to is missing; usage: swift-mega convert --model DIR",
    ),
    ([*CONVERT], "convert: --output is missing"),
    (["convert", "--to", "gguf"], "--to=gguf: expected mcore | hf"),
    (["convert", "--to", "mcore", "--output", "o"], "convert --to mcore: --model DIR is missing"),
    ([*CONVERT, "--output", "o", "--mcore", "mcore"], "convert --to mcore reads --model; --mcore mcore has no effect"),
    (
        [*CONVERT, "--output", "o", "--max_shard_size", "1GB"],
        "convert --to mcore: its files are split by ranks, not by size",
    ),
    ([*CONVERT, "--output", "o", "--lr", "1"], "--lr sets optim.lr, which has no effect in convert"),
    ([*CONVERT, "--output", "o", "lr=1"], "lr sets optim.lr, which has no effect in convert"),
    ([*CONVERT, "--output", "o", "recipe.yaml"], "convert: 'recipe.yaml' is no value of an option"),
    (
        [*CONVERT, "--output", "taken"],
        "--output=taken exists and is not empty; give another directory, or --overwrite true",
    ),
    ([*CONVERT, "--output", "precious", "--overwrite"], "--output=precious does not look like a model or checkpoint"),
    ([*CONVERT, "--output", "data.jsonl"], "--output=data.jsonl is a file; give a directory"),
    ([*CONVERT, "--output", "model", "--overwrite"], "--output=model is where model is read from"),
    ([*CONVERT, "--output", ".", "--overwrite"], "--output=. is where model is read from"),
    ([*CONVERT, "--output", "taken", "--overwrite", "x=1"], "unknown setting x"),
    (["convert", "--to", "hf", "--output", "o"], "convert --to hf: --mcore DIR (or --model DIR) is missing"),
    (["convert", "--to", "hf", "--output", "o", "--mcore", "absent"], "--mcore=absent: no such directory"),
    (
        ["convert", "--to", "hf", "--mcore", "mcore", "--dry_run", "true"],
        "--dry_run reports on a Hugging Face directory; give --model DIR, without --mcore",
    ),
    # export
    (["export", "--quant_method", "int3", "--model", "model"], "--quant_method=int3: expected fp8"),
    (["export", "--quant_method", "fp8"], "export --quant_method: no model; give --model DIR"),
    (
        ["export", "--quant_method", "fp8", "--model", "model", "--adapters", "adapter"],
        "export: --quant_method takes a whole model; merge the adapter first, then give --model MERGED",
    ),
    (
        ["export", "--quant_method", "fp8", "--model", "model", "--output", "taken"],
        "--output=taken exists and is not empty",
    ),
    (["export", "--merge_lora", "true"], "export: give one --adapters DIR, not 0"),
    (["export", "--adapters", "adapter"], "export: an adapter is in PEFT's format already; give --merge_lora true"),
    (["export", "--adapters", "absent", "--merge_lora", "true"], "--adapters=absent: no such directory"),
    (["export", "--adapters", "orphan", "--merge_lora"], "orphan/adapter_config.json names no base model"),
    (
        ["export", "--adapters", "lost", "--merge_lora"],
        "base_model_name_or_path in lost/adapter_config.json, since --model is",
    ),
    (
        ["export", "--adapters", "torn", "--merge_lora"],
        "torn/adapter_config.json is not valid JSON (",
    ),
    ([*EXPORT, "--output", "taken"], "--output=taken exists and is not empty"),
    # infer
    (["infer"], "infer: no model; give --model DIR, or --adapters DIR"),
    (["infer", "--adapters", "adapter", "adapter"], "infer: give one --adapters DIR, not 2"),
    ([*INFER, "--prompt", "a", "--input", "data.jsonl"], "infer: --prompt and --input both give the questions"),
    ([*INFER, "--output", "o.jsonl"], "infer: --output needs --input FILE.jsonl"),
    ([*INFER, "--input", "no.jsonl"], "data set no.jsonl does not exist"),
    ([*INFER, "--input", "data.jsonl", "--output", "data.jsonl"], "--output=data.jsonl exists; give another file"),
    ([*INFER, "--input", "data.jsonl", "--output", "model"], "--output=model is a directory; give a file name in it"),
    (
        [*INFER, "--input", "data.jsonl", "--output", "data.jsonl", "--overwrite", "true"],
        "--output=data.jsonl is the file of --input",
    ),
    (
        [*INFER, "--input", "data.jsonl", "--output", "data.jsonl/o.jsonl"],
        "--output=data.jsonl/o.jsonl: data.jsonl cannot be created",
    ),
    ([*INFER, "--prompt", " "], "infer: --prompt is empty"),
    ([*INFER, "--prompt", "a", "--model_name", "M"], "infer: --model_name says how rows are read"),
    ([*INFER, "--max_new_tokens", "0"], "--max_new_tokens=0: expected a whole number of at least 1"),
    # verify, config
    (["verify"], "verify: no model; give --model DIR"),
    (
        [*VERIFY, "--layouts", "tp2,pq2"],
        "--layouts=pq2: expected sizes joined by dashes, such as tp2, pp2 or tp2-pp2-sp",
    ),
    ([*VERIFY, "--layouts", "cp2-te:ring"], "--layouts=cp2-te:ring: expected sizes joined by dashes"),
    ([*VERIFY, "--tolerance", "small"], "--tolerance=small: expected a number above 0"),
    ([*VERIFY, "--tolerance", "-1"], "--tolerance=-1: expected a number above 0"),
    ([*VERIFY, "--prompts", "no.txt"], "--prompts=no.txt: no such file"),
    ([*VERIFY, "--tuner", "dora"], "--tuner=dora: expected lora | full"),
    (["compare", "--a", "model"], "compare: --b is missing; usage: swift-mega compare --a DIR --b DIR"),
    ([*COMPARE[:3], "--b", "absent"], "--b=absent: no such directory; give a Hugging Face directory or"),
    ([*COMPARE, "--b_backend", "vllm"], "--b_backend=vllm: expected mcore | hf"),
    ([*COMPARE, "--a_layout", "pq2"], "--a_layout=pq2: expected sizes joined by dashes, such as tp2"),
    ([*COMPARE, "--tolerance", "0"], "--tolerance=0: expected a number above 0"),
    ([*COMPARE, "--top_k", "0"], "--top_k=0: expected a whole number of at least 1"),
    ([*COMPARE, "--tp", "2"], "--tp sets parallel.tensor, which has no effect in compare"),
    (["config", "--only", "some"], "--only=some: expected changed"),
    (["config", "--lr", "x"], "--lr=x: expected a number"),
]


@pytest.mark.parametrize(("argv", "message"), MISTAKES, ids=[" ".join(argv) or "nothing" for argv, _ in MISTAKES])
def test_a_mistake_is_one_line_and_status_2(
    api: Recorder, place: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert main(argv) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"swift-mega: error: {message}")
    assert shown.err.count("\n") == 1 and not shown.out
    assert not api.calls
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


QUESTION_MISTAKES = [
    ("", "q.jsonl is empty"),
    ('{"query": "a"}\n{"query"', "q.jsonl:2: not valid JSON at character "),
    ("[1]", "q.jsonl:1: a row is a list ([1]); write a JSON object"),
    ('{"query": "a"}\n\n{"query": "b"}', "q.jsonl:2: an empty line between rows"),
    ('{"query": "a", "history": 5}', "q.jsonl:1: history is a number (5)"),
    ('{"messages": [{"role": "user", "content": null}]}', "q.jsonl:1: turn 1 (user) is empty"),
    ('{"messages": [{"role": "tool", "content": "x"}]}', "q.jsonl:1: turn 1: role 'tool' is tool use"),
    ('{"messages": [{"role": "narrator", "content": "x"}]}', "q.jsonl:1: turn 1: unknown role 'narrator'"),
    ('{"query": "a", "tools": ["t"]}', "q.jsonl:1: column 'tools' is tool use"),
    ('{"text": "a"}', "q.jsonl:1: a row of plain text has no question"),
    ('{"messages": ["a"]}', "q.jsonl:1: turn 1 is a string ('a')"),
    ('{"messages": [{"role": "assistant", "content": "a"}]}', "q.jsonl:1: there is no question in it"),
]


@pytest.mark.parametrize(("text", "message"), QUESTION_MISTAKES)
def test_a_wrong_question_says_its_line(
    api: Recorder, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    Path("q.jsonl").write_text(text)
    assert main([*INFER, "--input", "q.jsonl"]) == 2
    assert capsys.readouterr().err.startswith(f"swift-mega: error: {message}")
    Path("q.jsonl").write_bytes(b"\xff")
    assert main([*INFER, "--input", "q.jsonl"]) == 2
    assert "not UTF-8 text (byte 0)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--help"], ["sft", "--help"], ["sft", "--lora_rnk", "3"], ["verify", "--model", "no"]]
)
def test_help_and_mistakes_import_nothing_heavy(arguments: list[str]) -> None:
    """In a new interpreter, because a user waits for these imports."""
    environment = os.environ | {"PYTHONPATH": str(Path(swift_mega.__file__).parents[1])}
    command = [sys.executable, "-X", "importtime", "-m", "swift_mega", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == (0 if "--help" in arguments else 2)
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "swift_mega.cli" in imported
    assert not {name for name in imported if name.split(".")[0] in HEAVY}


@pytest.mark.parametrize("verb", VERBS)
def test_help_names_all_that_a_verb_takes(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: swift-mega {verb} ")
    for option in VERBS[verb].options:
        assert f"--{option.name} " in text
    for key, setting in settings().items():
        assert (f"[{key}: " in text.replace("\n" + " " * 30, " ")) == VERBS[verb].takes(key)
        if VERBS[verb].takes(key):
            assert all(f"--{flag}" in text for flag in setting.flags)
    assert max(map(len, text.splitlines())) <= 100


def test_help_of_a_tuner_shows_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "--tuner_type", "toys.layers", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--switch_every" in text and "[tuner.every: whole number; default 1]" in text and "--lora_rank" not in text


def test_overview_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {verb.name} " in text and verb.summary in text for verb in VERBS.values())
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"swift-mega {swift_mega.__version__}\n"


def test_sft_trains_what_the_settings_say(api: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "recipe.yaml", "optim.eps=1e-7", "--tp", "2", "lora_rank=4", "--nproc", "2"]) == 0
    assert "out/v0/checkpoint-5" in capsys.readouterr().out
    [(name, (run,), options)] = api.calls
    assert name == "train" and options["nproc"] == 2
    # A setting of the adapter replaces a default, and never a value that was set.
    assert options["sources"]["tuner.rank"] != "default" and options["sources"]["tuner.alpha"] == "default"
    assert (run.model.path, run.data.dataset, run.optim.lr) == ("model", ("data.jsonl",), 2e-4)
    assert (run.optim.eps, run.parallel.tensor, run.tuner.rank) == (1e-7, 2, 4)
    assert (run.data.loss_on, run.tuner.type) == ("assistant", "lora")


def test_pt_trains_everything_on_every_token(api: Recorder) -> None:
    assert main(["pt", "recipe.yaml"]) == 0
    assert main(["pt", "recipe.yaml", "--tuner_type", "lora"]) == 0
    (_, (first,), options), (_, (second,), _) = api.calls
    assert options["nproc"] is None
    assert (first.data.loss_on, first.tuner.type) == ("all", "full")
    assert (second.data.loss_on, second.tuner.type) == ("all", "lora")


CONVERTED: dict[str, Any] = dict(
    model=None, dtype=None, max_shard_size="5GB", overwrite=False, dequantize=False, parallel=Parallel()
)


def test_convert_to_megatron(api: Recorder) -> None:
    argv = [*CONVERT, "--output", "out", "--tensor_model_parallel_size", "2", "--torch_dtype", "bfloat16", "sp=true"]
    assert main(argv) == 0
    expected = CONVERTED | dict(source="model", to="mcore", output="out", dtype="bfloat16")
    assert api.calls == [("convert", (), expected | {"parallel": Parallel(tensor=2, sequence=True)})]


def test_convert_to_hugging_face(api: Recorder) -> None:
    """From a Megatron checkpoint, with its own config or with a given one, and from another Hugging Face directory."""
    to_hf = ["convert", "--to", "hf", "--output"]
    assert main([*to_hf, "a", "--mcore", "mcore", "--max_shard_size=1GB", "--pp=2"]) == 0
    assert main([*to_hf, "b", "--mcore", "mcore", "--model", "model"]) == 0
    assert main([*to_hf, "c", "--model", "model", "--torch_dtype", "float32"]) == 0
    common = CONVERTED | dict(to="hf")
    assert [given for _, _, given in api.calls] == [
        common | dict(source="mcore", output="a", max_shard_size="1GB", parallel=Parallel(pipeline=2)),
        common | dict(source="mcore", output="b", model="model"),
        common | dict(source="model", output="c", dtype="float32"),
    ]


def test_overwrite_is_handed_on(api: Recorder, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every writer replaces a directory in one step. The command line says only whether it may."""
    assert main([*CONVERT, "--output", "taken"]) == 2
    assert "--output=taken exists and is not empty" in capsys.readouterr().err
    assert main([*CONVERT, "--output", "taken", "--overwrite", "true"]) == 0
    assert [given["overwrite"] for _, _, given in api.calls] == [True]


def test_a_failure_is_one_line(api: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    api.failure = UserError("tensor a is missing:\n  and b\n  and c")
    assert main([*CONVERT, "--output", "out"]) == 2
    assert capsys.readouterr().err == "swift-mega: error: tensor a is missing: and b and c\n"


def test_verify_files(api: Recorder, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against report.json: status 1 with the tensor's name where a byte differs, 2 where there is nothing to compare with."""
    assert main(["verify", "--model", "model", "--files", "true"]) == 2
    assert "model has no report.json" in capsys.readouterr().err
    planned = plan_files({"x": (torch.float32, (3,))}, 1000)
    folder = place / "whole"
    folder.mkdir()
    write_headers(folder, planned)
    write_report(folder, planned, checksums(folder, planned, planned))
    assert main(["verify", "--model", "whole", "--files", "true"]) == 0
    assert capsys.readouterr().out == "all 1 tensors match report.json\n"
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[:-1] + b"\x01")
    assert main(["verify", "--model", "whole", "--files", "true"]) == 1
    assert "FAIL x in model.safetensors has other bytes" in capsys.readouterr().out


def test_export(api: Recorder) -> None:
    assert main(EXPORT) == 0
    assert main([*EXPORT, "--model", "taken", "--output", "out", "--max_shard_size", "1MB"]) == 0
    common = {"adapters": "adapter", "merge": True, "overwrite": False, "dequantize": False}
    assert api.calls == [
        ("export", (), common | {"model": "model", "output": "adapter-merged", "max_shard_size": "5GB"}),
        ("export", (), common | {"model": "taken", "output": "out", "max_shard_size": "1MB"}),
    ]


def test_export_in_fp8(api: Recorder) -> None:
    assert main(["export", "--model", "model", "--quant_method", "fp8", "--dequantize", "true"]) == 0
    common = {"model": "model", "max_shard_size": "5GB", "overwrite": False, "dequantize": True}
    assert api.calls == [("quantize", (), common | {"output": "model-fp8"})]


def test_infer_one_prompt(api: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "infer",
                "--adapters",
                "adapter",
                "--prompt",
                "Who are you?",
                "--system",
                "Be brief.",
                "--max_new_tokens",
                "9",
            ]
        )
        == 0
    )
    assert api.calls == [("infer", (), {"model": "model", "adapters": "adapter", "chat_template": None})]
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}
    assert api.answers == [[system, user]]
    assert capsys.readouterr().out == "answer 1 in 9\n"


def test_infer_a_file(api: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows: list[dict[str, Any]] = [
        {"messages": said, "id": 7},
        {"query": "c", "history": [["a", "b"]], "system": "own"},
        {"query": "d"},
    ]
    Path("q.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert main([*INFER, "--input", "q.jsonl", "--output", "out.jsonl", "--system", "given"]) == 0
    written = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert written == [row | {"response": f"answer {i} in 256"} for i, row in enumerate(rows, start=1)]
    given, own = {"role": "system", "content": "given"}, {"role": "system", "content": "own"}
    assert api.answers == [
        [given, said[0]],
        [own, *said, {"role": "user", "content": "c"}],
        [given, {"role": "user", "content": "d"}],
    ]
    assert not capsys.readouterr().out
    assert main([*INFER, "--input", "q.jsonl"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["id"] == 7


def test_infer_reads_rows_as_training_does(api: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    """Only a line feed ends a row. Byte order mark, sharegpt columns, mapped columns and placeholders are handled as in training."""
    rows = [
        {"ask": "a\u2028b\x0c{{NAME}}"},
        {"conversations": [{"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}]},
    ]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    Path("q.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    flags = ("--data.columns.ask", "query", "--model_name", "Mega", "--system", "")
    assert main([*INFER, "--input", "q.jsonl", *flags, "--output", "new/folder/o.jsonl"]) == 0, capsys.readouterr().err
    system = {"role": "system", "content": ""}
    assert api.answers == [
        [system, {"role": "user", "content": "a\u2028b\x0cMega"}],
        [system, {"role": "user", "content": "c"}],
    ]
    written = Path("new/folder/o.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in written[:-1]] == [
        row | {"response": f"answer {number} in 256"} for number, row in enumerate(rows, 1)
    ]


def test_infer_in_conversation(
    api: Recorder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n\nb\nclear\nc\n"))
    assert main(INFER) == 0
    assert [[m["content"] for m in messages] for messages in api.answers] == [
        ["a"],
        ["a", "answer 1 in 256", "b"],
        ["c"],
    ]
    assert capsys.readouterr().out == "".join(f"answer {i} in 256\n" for i in (1, 2, 3))
    monkeypatch.setattr(sys, "stdin", io.StringIO("exit\na\n"))
    assert main(INFER) == 0
    assert len(api.answers) == 3


@pytest.mark.parametrize("passed", [True, False])
def test_verify(api: Recorder, capsys: pytest.CaptureFixture[str], passed: bool) -> None:
    api.passed = passed
    argv = [
        *VERIFY,
        "--layouts",
        "tp2,pp2",
        "tp2-pp2-sp",
        "--tolerance",
        "1e-3",
        "--prompts",
        "data.jsonl",
        "--tuner",
        "full",
    ]
    assert main(argv) == (0 if passed else 1)
    options = {"layouts": ("tp2", "pp2", "tp2-pp2-sp"), "tolerance": 1e-3, "prompts": "data.jsonl", "tuner": "full"}
    assert api.calls == [("verify", ("model",), options)]
    assert capsys.readouterr().out == "the table\n"
    assert main(VERIFY) == (0 if passed else 1)
    assert api.calls[1:] == [("verify", ("model",), {})]


@pytest.mark.parametrize("kind", ["te:p2p", "te:a2a", "te:allgather", "te:a2a+p2p", "te:a2a2+p2p", "ulysses2", "ring"])
def test_verify_takes_the_names_of_context_layouts(api: Recorder, kind: str) -> None:
    api.passed = True
    assert main([*VERIFY, "--layouts", f"tp2-cp4-{kind}-sp"]) == 0
    assert api.calls == [("verify", ("model",), {"layouts": (f"tp2-cp4-{kind}-sp",)})]


@pytest.mark.parametrize("passed", [True, False])
def test_compare(api: Recorder, capsys: pytest.CaptureFixture[str], passed: bool) -> None:
    api.passed = passed
    none = {"model": None, "adapter": None, "backend": None, "layout": None}
    plain = ({"checkpoint": "model", **none}, {"checkpoint": "mcore", **none})
    assert main(COMPARE) == (0 if passed else 1)
    assert api.calls == [("compare", plain, {})]
    assert capsys.readouterr().out == "the table\n"
    words = "--b_layout tp2-sp --a_engine hf --b_model model --tolerance 1e-6 --top_k 3 --torch_dtype float64 --dequantize true"
    files = "--json out.json --plot out.png --prompts data.jsonl --tokenizer model --scratch model"
    assert main([*COMPARE, *words.split(), *files.split()]) == (0 if passed else 1)
    one, other = {**plain[0], "backend": "hf"}, {**plain[1], "layout": "tp2-sp", "model": "model"}
    options = {
        "tolerance": 1e-6,
        "top_k": 3,
        "dtype": "float64",
        "dequantize": True,
        "json": "out.json",
        "plot": "out.png",
        "prompts": "data.jsonl",
        "tokenizer": "model",
        "scratch": "model",
    }
    assert api.calls[1] == ("compare", (one, other), options)


def test_config_shows_values_and_sources(api: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "recipe.yaml", "--tp", "2", "--only", "changed"]) == 0
    text = capsys.readouterr().out
    expected = {
        "model": {"path": "model"},
        "parallel": {"tensor": 2},
        "data": {"dataset": ["data.jsonl"]},
        "optim": {"lr": 2e-4},
    }
    assert yaml.safe_load(text) == expected
    assert [line.split("# ")[1] for line in text.splitlines() if "#" in line] == [
        *("recipe.yaml:1", "--tp", "recipe.yaml:2", "recipe.yaml:4"),
    ]
    assert main(["config"]) == 0
    assert set(yaml.safe_load(capsys.readouterr().out)) == {key.split(".")[0] for key in settings()}


def test_interruption_and_broken_ranks(api: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    api.failure = KeyboardInterrupt()
    assert main([*SFT]) == 130
    assert capsys.readouterr().err == "swift-mega: error: interrupted\n"
    api.failure = RankError("rank 1 of 2 failed:\nTraceback …")
    assert main([*SFT]) == 1
    assert capsys.readouterr().err == "swift-mega: rank 1 of 2 failed:\nTraceback …\n"


def test_a_full_or_closed_disk_is_the_users(api: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    api.failure = PermissionError(13, "Permission denied", "/output")
    assert main([*SFT]) == 2
    assert capsys.readouterr().err == "swift-mega: error: /output: Permission denied\n"
    api.failure = OSError(5, "Input/output error", "/output")
    with pytest.raises(OSError, match="Input/output"):
        main([*SFT])


def test_a_defect_keeps_its_traceback(api: Recorder) -> None:
    api.failure = KeyError("ours")
    with pytest.raises(KeyError):
        main([*SFT])


def test_under_torchrun(api: Recorder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank joins for training and names itself in errors. A command that must run once is refused."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main([*SFT]) == 0
    assert main([*SFT, "--nproc", "3"]) == 2
    message = (
        "swift-mega: rank 1: error: --nproc 3, but this process is one of 4 ranks started already; remove --nproc\n"
    )
    assert capsys.readouterr().err == message
    for argv in ([*CONVERT, "--output", "o"], EXPORT, INFER, VERIFY):
        assert main(argv) == 2
        expected = f"swift-mega: rank 1: error: {argv[0]} starts its ranks itself, but WORLD_SIZE=4 were started; run it alone\n"
        assert capsys.readouterr().err == expected


def test_a_wrong_environment(
    api: Recorder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPROC_PER_NODE", "gpu")
    assert main([*SFT]) == 2
    assert "NPROC_PER_NODE='gpu' in the environment: expected a whole number" in capsys.readouterr().err
    assert not api.calls
