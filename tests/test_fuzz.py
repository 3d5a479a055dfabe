"""No input ends in a traceback: unusual flags, rows, configs, templates, adapters and headers are used, or are one UserError.

Hypothesis draws the same cases every time. `--full` draws a hundred times as many.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from swift_mega.cli import main
from swift_mega.config.schema import Data
from swift_mega.config.tree import settings as all_settings
from swift_mega.convert.files.hf_files import Checkpoint
from swift_mega.data.chat import load_tokenizer
from swift_mega.data.formats import COLUMNS
from swift_mega.data.loader import prepare
from swift_mega.errors import UserError
from swift_mega.export.adapters import tuner_of
from swift_mega.export.companions import stop_tokens
from swift_mega.models.family import family_of
from swift_mega.models.translate import load_settings
from swift_mega.tuners.lora_files import read_adapter

WORDS = [
    "",
    " ",
    "0",
    "-1",
    "1",
    "2",
    "3.5",
    "1e400",
    "nan",
    "-inf",
    "true",
    "null",
    "none",
    "[]",
    "{}",
    "[1,[2]]",
    '{"a": 1}',
    "\u2028",
    "é",
    "\ud800",
    "\x00",
    "9" * 5000,
    "a" * 5000,
    "[" * 3000,
    "tp2",
    "1e308",
    "-0",
    "1_000",
    "٣",
    "0x10",
    ",",
    "=",
    "--",
    "auto",
    "full",
]
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.floats()
    | st.sampled_from([2**70, -(2**63), "", "a", "\ud800", "é" * 50, "1"])
    | st.text(max_size=8)
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def often(times: int) -> Callable[[Any], Any]:
    """Draws `times` cases; with --full a hundred times as many."""

    def decorate(test: Any) -> Any:
        @pytest.mark.parametrize(
            "examples", [times, pytest.param(times * 100, marks=pytest.mark.full)], ids=["some", "many"]
        )
        def repeated(examples: int, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
            quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
            chosen = settings(
                max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=quiet
            )
            chosen(lambda data: test(place, data)) if False else chosen(
                given(st.data())(lambda data: test(place, data))
            )()
            capfd.readouterr()

        repeated.__name__, repeated.__doc__ = test.__name__, test.__doc__
        return repeated

    return decorate


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter of it and a data set, in their own folder."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("fuzz")
    tiny.make_chat(folder / "model", "llama", num_hidden_layers=1)
    net = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "model"), LoraConfig(r=2, target_modules=["q_proj"])
    )
    net.save_pretrained(folder / "adapter")
    (folder / "rows.jsonl").write_text('{"query": "q", "response": "r"}\n')
    return folder


def ends_well(*argv: str) -> None:
    """Checks that the status is one of those that a run may end with. An exception that is no UserError is not caught."""
    assert main(argv) in (0, 1, 2), argv


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def copy_of(place: Path, name: str) -> Path:
    folder = place / f"{name}-odd"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place / name, folder)
    return folder


def test_every_setting_by_every_odd_word(capfd: pytest.CaptureFixture[str]) -> None:
    """As an override, as a flag with its value, as a flag with "=", and as a key of a table."""
    for number, (key, setting) in enumerate(all_settings().items()):
        flag = f"--{setting.flags[0]}" if setting.flags else f"--{key}"
        for turn, word in enumerate(WORDS[number % 4 :: 4], number):
            ends_well("config", *([f"{key}={word}"], [flag, word], [f"{flag}={word}"], [f"{key}.x={word}"])[turn % 4])
    capfd.readouterr()


@often(8)
def test_recipes(place: Path, data: Any) -> None:
    """Any YAML that contains names of our settings."""
    keys = st.sampled_from(
        [*all_settings(), *(flag for s in all_settings().values() for flag in s.flags), "train", "x", "<<"]
    )
    recipe = place / "recipe.yaml"
    value = data.draw(st.dictionaries(keys, JSON, max_size=3) | JSON)
    text = data.draw(
        st.sampled_from(
            [json.dumps(value), json.dumps(value) + data.draw(st.text(max_size=5)), data.draw(st.text(max_size=20))]
        )
    )
    recipe.write_bytes(text.encode("utf-8", "surrogatepass"))
    ends_well("config", str(recipe))


@often(15)
def test_words_of_every_verb(place: Path, data: Any) -> None:
    """Options and settings in any order, for verbs that read a model first."""
    verb = data.draw(st.sampled_from(["plan", "sft", "convert", "export", "infer", "verify", "compare"]))
    names = [s.flags[0] for s in all_settings().values() if s.flags] + [
        "nproc",
        "to",
        "output",
        "ranks",
        "gpu_memory",
        "layouts",
        "a",
        "b",
        "prompt",
    ]
    words = data.draw(st.lists(st.tuples(st.sampled_from(names), st.sampled_from(WORDS)), min_size=1, max_size=3))
    model = ["--model", str(place / "model")] if verb == "plan" else ["--model", "nowhere"]
    ends_well(verb, *model, *(part for name, word in words for part in (f"--{name}", word)))


@often(40)
def test_rows(place: Path, data: Any) -> None:
    """Objects with our columns and values of any type, with turns of any type among them."""
    turn = st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "loss", "x"]),
        JSON | st.sampled_from(["user", "assistant", "system"]),
        max_size=4,
    )
    value = JSON | st.lists(turn | JSON, max_size=4)
    row = st.dictionaries(st.sampled_from(COLUMNS) | st.text(max_size=4), value, max_size=4) | JSON
    path = place / data.draw(st.sampled_from(["odd.jsonl", "odd.json"]))
    path.write_text("\n".join(map(json.dumps, data.draw(st.lists(row, min_size=1, max_size=2)))))
    columns = data.draw(st.dictionaries(st.sampled_from(["a", *COLUMNS]), st.sampled_from(COLUMNS), max_size=2))
    tokenizer = load_tokenizer(place / "model")
    _try(lambda: prepare(Data(dataset=(str(path),), columns=columns, max_length=64), tokenizer, vocab=10**6))


@often(15)
def test_bytes_of_a_data_set(place: Path, data: Any) -> None:
    path = place / "odd.jsonl"
    path.write_bytes(data.draw(st.binary(max_size=40) | st.text('[]{}",:01eE-\\u\n', max_size=40).map(str.encode)))
    tokenizer = load_tokenizer(place / "model")
    _try(lambda: prepare(Data(dataset=(str(path),)), tokenizer, vocab=10**6))


@often(20)
def test_dataset_info(place: Path, data: Any) -> None:
    names = st.sampled_from(
        [
            "file_name",
            "dataset_path",
            "dataset_name",
            "formatting",
            "columns",
            "tags",
            "num_samples",
            "ranking",
            "hf_hub_url",
        ]
    )
    entry = (
        st.dictionaries(
            names, JSON | st.just("rows.jsonl") | st.just({"prompt": "query", "response": "response"}), max_size=4
        )
        | JSON
    )
    write_json(
        place / "info.json",
        data.draw(st.dictionaries(st.sampled_from("ab"), entry) | st.lists(entry, max_size=3) | JSON),
    )
    tokenizer = load_tokenizer(place / "model")
    info = str(place / "info.json")
    _try(lambda: prepare(Data(dataset=("a",), dataset_info=info), tokenizer, vocab=10**6))


TEMPLATES = [
    "{{ raise_exception('no') }}",
    "{{ 1 / 0 }}",
    "{{ messages[9].content }}",
    "{{ x.y.z }}",
    "{% for",
    "{{ messages | tojson }}",
    "{{ '%d' % 'a' }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% include 'x' %}",
    "{{ messages | map('x') | list }}",
    "{{ namespace }}",
    "{{ 'a' * 100000 }}",
    "{{ messages[0].__class__ }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ range(10**9) | length }}",
    "{{ [].pop() }}",
    "{{ {}['a'] }}",
    "{{ messages[0].content.encode('ascii') }}",
    "{{ 'x' | int + 'y' }}",
    "{{ strftime_now(3) }}",
    "{{ messages.append(1) }}",
    "{% set messages = 3 %}{{ messages.x.y }}",
    "{{ messages | sort }}",
    "{{ -('a') }}",
    "{{ 'a' | nofilter }}",
    "{{ 'a' is notest }}",
    "{% block a %}{% endblock %}{{ self.b() }}",
    "{{ 9 ** 99999 }}",
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "",
    "\ufeff",
    "{% generation %}",
    "{{ lipsum(n=2) }}",
    "{% break %}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates(place: Path, template: str) -> None:
    """Each template renders, or is one UserError."""
    path = place / "odd.jinja"
    path.write_text(template)
    tokenizer = load_tokenizer(place / "model")
    _try(lambda: prepare(Data(dataset=(str(place / "rows.jsonl"),), chat_template=str(path)), tokenizer, vocab=10**6))


def damaged(place: Path, name: str, file: str, data: Any, *, more: tuple[str, ...] = ()) -> Path:
    """A copy of a folder in which one field, or a few bytes, of the JSON file `file` are arbitrary."""
    folder = copy_of(place, name)
    path = folder / file
    if data.draw(st.integers(0, 4)):
        content = json.loads(path.read_text()) if path.exists() else {}
        for key in data.draw(st.lists(st.sampled_from([*sorted(content), *more]), min_size=1, max_size=2)):
            content[key] = data.draw(JSON)
        write_json(path, content)
    else:
        raw = bytearray(path.read_bytes())
        for at in data.draw(st.lists(st.integers(0, min(len(raw), 2000) - 1), min_size=1, max_size=3)):
            raw[at] = data.draw(st.integers(0, 255))
        path.write_bytes(bytes(raw[: data.draw(st.just(len(raw)) | st.integers(0, len(raw)))]))
    return folder


FIELDS = (
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
    "quantization_config",
    "layer_types",
    "torch_dtype",
    "num_experts",
    "text_config",
    "x",
)


@often(20)
def test_configs(place: Path, data: Any) -> None:
    """A dry run and a plan of a damaged config.json, without weights."""
    folder = damaged(place, "model", "config.json", data, more=FIELDS)
    ends_well("plan", "--model", str(folder), "--max_length", "64")
    ends_well("convert", "--model", str(folder), "--to", "mcore", "--dry_run", "true")


@often(12)
def test_adapters(place: Path, data: Any) -> None:
    folder = damaged(
        place,
        "adapter",
        "adapter_config.json",
        data,
        more=("rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform"),
    )
    _try(lambda: read_adapter(folder))
    ends_well(
        "export",
        "--adapters",
        str(folder),
        "--merge_lora",
        "true",
        "--output",
        str(place / "merged"),
        "--overwrite",
        "true",
    )


@often(10)
def test_tokenizers_and_generation(place: Path, data: Any) -> None:
    """Damaged files that transformers reads for us."""
    file = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json", "generation_config.json"]))
    folder = damaged(
        place, "model", file, data, more=("eos_token", "pad_token", "chat_template", "tokenizer_class", "eos_token_id")
    )
    _try(lambda: stop_tokens(folder))
    _try(lambda: prepare(Data(dataset=(str(place / "rows.jsonl"),)), load_tokenizer(folder), vocab=10**6))


@often(40)
def test_headers_of_safetensors(place: Path, data: Any) -> None:
    """Any byte of a header, or any value in it."""
    folder = place / "header"
    folder.mkdir(exist_ok=True)
    raw = bytearray((place / "model" / "model.safetensors").read_bytes())
    length = int.from_bytes(raw[:8], "little")
    if data.draw(st.booleans()):
        for at in data.draw(st.lists(st.integers(0, length + 7), min_size=1, max_size=3)):
            raw[at] = data.draw(st.integers(0, 255))
    else:
        header = json.loads(raw[8 : 8 + length])
        name = data.draw(st.sampled_from(sorted(header)))
        if isinstance(header[name], dict) and data.draw(st.booleans()):
            header[name][data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = data.draw(JSON)
        else:
            header[name] = data.draw(JSON)
        text = json.dumps(header).encode()
        raw = bytearray(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    (folder / "model.safetensors").write_bytes(bytes(raw))
    _try(lambda: Checkpoint(folder))


def _try(action: Callable[[], Any]) -> None:
    try:
        action()
    except UserError as error:
        assert str(error)


def test_a_field_of_another_type_is_named(place: Path) -> None:
    """The error names the field, so that different damages give different errors."""
    folder = copy_of(place, "model")
    path = folder / "tokenizer_config.json"
    write_json(path, json.loads(path.read_text()) | {"model_max_length": "long"})
    with pytest.raises(UserError, match=r"does not tokenise .*tokenizer_config.json may be of another type"):
        load_tokenizer(folder)
    folder = copy_of(place, "adapter")
    path = folder / "adapter_config.json"
    write_json(path, json.loads(path.read_text()) | {"target_modules": 131})
    with pytest.raises(UserError, match="target_modules=131 is neither a name nor a list of names"):
        tuner_of(folder, family_of(place / "model"), load_settings(place / "model"))


@pytest.mark.parametrize("field, value, said", [
    ("num_hidden_layers", 2**70, "num_hidden_layers=1180591620717411303424 is more than 100,000; correct it"),
    ("vocab_size", 2**40, "vocab_size=1099511627776 is more than 268,435,456; correct it"),
    ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": "x"}, "give no frequencies"),
    ("dtype", [], "transformers cannot read"),
])  # fmt: skip
def test_a_config_beyond_all_models(place: Path, field: str, value: Any, said: str) -> None:
    folder = copy_of(place, "model")
    path = folder / "config.json"
    write_json(path, json.loads(path.read_text()) | {field: value})
    with pytest.raises(UserError) as caught:
        load_settings(folder)
    assert said in str(caught.value)
