"""The chat template of training, and the token that ends a reply, are in every output of a model and in `infer`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import tiny
from swift_mega import api
from swift_mega.api.training import about_ends
from swift_mega.cli import main
from swift_mega.config.schema import Data
from swift_mega.data.chat import load_tokenizer
from swift_mega.data.loader import prepare
from swift_mega.errors import UserError
from swift_mega.export.companions import of_adapter, stop_tokens

MINE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
EOS, END = "</s>", "<|im_end|>"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model whose generation ends at </s>, with chatml, whose turns end with <|im_end|>; a row; a template of our own."""
    folder = tmp_path_factory.mktemp("form")
    words = tiny.tokenizer(tiny.CHATML, "<|im_start|>", END)
    end = words.convert_tokens_to_ids(EOS)
    tiny.make(folder / "model", "llama", vocab_size=len(words) + 3, num_hidden_layers=1, eos_token_id=end)
    words.save_pretrained(folder / "model")
    (folder / "row.jsonl").write_text('{"query": "hi", "response": "hello"}\n')
    (folder / "mine.jinja").write_bytes(b"\xef\xbb\xbf" + MINE.encode())
    return folder


def _train(home: Path, output: str, *changes: str) -> api.TrainResult:
    settings = [
        f"model.path={home / 'model'}",
        f"data.dataset={home / 'row.jsonl'}",
        f"train.output_dir={home / output}",
        "train.add_version=false",
        "train.global_batch_size=1",
        "monitor.progress=false",
        "monitor.report_to=",
        *changes,
    ]
    return api.train(api.load_recipe(None, settings).run, nproc=1)


@pytest.fixture(scope="module")
def full(home: Path) -> api.TrainResult:
    """Trained until it reproduces its row."""
    return _train(home, "full", "tuner.type=full", "train.steps=50", "optim.lr=0.02", "optim.schedule=constant")


@pytest.fixture(scope="module")
def lora(home: Path) -> api.TrainResult:
    return _train(home, "lora", f"data.chat_template={home / 'mine.jinja'}", "train.steps=1", "export.merge_lora=true")


def _ids(home: Path, *tokens: str) -> list[int]:
    return AutoTokenizer.from_pretrained(home / "model").convert_tokens_to_ids(list(tokens))


def test_a_trained_model_stops_where_its_turns_end(home: Path, full: api.TrainResult, capsys: Any) -> None:
    """transformers' own generate stops by the exported generation_config, and `infer` gives the same answer."""
    assert GenerationConfig.from_pretrained(full.checkpoint).eos_token_id == _ids(home, EOS, END)
    words = AutoTokenizer.from_pretrained(full.checkpoint)
    network = AutoModelForCausalLM.from_pretrained(full.checkpoint)
    asked = words.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = network.generate(**asked, max_new_tokens=30, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert words.decode(made) == f"hello{END}"
    assert main(["infer", "--model", str(full.checkpoint), "--prompt", "hi", "--max_new_tokens", "30"]) == 0
    assert capsys.readouterr().out == "hello\n"
    stale = json.loads((full.checkpoint / "generation_config.json").read_text()) | {"eos_token_id": _ids(home, EOS)[0]}
    (full.checkpoint / "generation_config.json").write_text(json.dumps(stale))
    # Without an entry in the files, the template itself says where replies end.
    assert main(["infer", "--model", str(full.checkpoint), "--prompt", "hi", "--max_new_tokens", "30"]) == 0
    assert capsys.readouterr().out == "hello\n"


def test_the_trained_template_goes_into_adapter_and_merge(home: Path, lora: api.TrainResult) -> None:
    """In the adapter, the merge at the end of the run, and a later export. The file's byte order mark is not part of the template."""
    assert of_adapter(lora.checkpoint).chat_template == MINE
    assert (
        main(["export", "--adapters", str(lora.checkpoint), "--merge_lora", "true", "--output", str(home / "m")]) == 0
    )
    for merged in (lora.merged, home / "m"):
        assert merged is not None
        assert AutoTokenizer.from_pretrained(merged).chat_template == MINE
        assert GenerationConfig.from_pretrained(merged).eos_token_id == _ids(home, EOS, END)
    assert AutoTokenizer.from_pretrained(home / "model").chat_template == tiny.CHATML


def test_infer_asks_in_the_trained_template(home: Path, lora: api.TrainResult) -> None:
    """infer uses the adapter's template unless another one is given. Further training of the adapter keeps its template."""
    asked = [{"role": "user", "content": "hi"}]
    model, adapter, file = str(home / "model"), str(lora.checkpoint), str(home / "mine.jinja")
    assert api.infer(model=model, adapters=adapter).prompt(asked) == "[user] hi<|im_end|>[assistant] "
    assert api.infer(model=model, chat_template=file).prompt(asked) == "[user] hi<|im_end|>[assistant] "
    assert api.infer(model=model).prompt(asked).startswith("<|im_start|>user\nhi")
    assert sorted(api.infer(model=model, adapters=adapter).stop_tokens) == sorted(_ids(home, EOS, END))
    again = _train(home, "again", f"model.adapters={adapter}", "train.steps=1")
    assert of_adapter(again.checkpoint) == of_adapter(adapter)


def test_infer_without_a_template_is_one_error(home: Path, tmp_path: Path, capsys: Any) -> None:
    for file in (home / "model").iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).symlink_to(file)
    assert main(["infer", "--model", str(tmp_path), "--prompt", "hi"]) == 2
    assert "no chat template" in (said := capsys.readouterr().err) and "--chat_template FILE" in said


def test_what_is_said_of_ends_when_training_starts(home: Path, tmp_path: Path) -> None:
    """A new stop token; a stop token without loss; an end of ordinary text; and no message where nothing changes."""
    content = "{% if m.role == 'user' %}{{ m.content }}{% else %}"
    marked = content + "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}"
    templates = {
        tiny.CHATML: f"{END} ({_ids(home, END)[0]}) ends the replies, and the model's generation stops at {EOS}",
        "{% for m in messages %}" + marked + "<|im_end|>{% endfor %}": f"1 replies end with {END}",
        "{% for m in messages %}{{ m.content }}\n### End\n{% endfor %}": "1 replies end with ordinary text",
        "{% for m in messages %}{{ m.content }}</s>{% endfor %}": "",
        # By default the prompt has <think>; a reply without reasoning follows the prompt of the other mode.
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant] "
        "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}{% endif %}": "1 replies follow the prompt "
        "that enable_thinking=false gives, not the default one",
    }
    words = load_tokenizer(home / "model")
    for template, said in templates.items():
        (tmp_path / "t.jinja").write_text(template)
        data = Data(dataset=(str(home / "row.jsonl"),), chat_template=str(tmp_path / "t.jinja"))
        lines = about_ends(prepare(data, words), words, stop_tokens(home / "model"))
        assert any(said in line for line in lines) if said else not lines, lines


def test_infer_on_our_own_fp8(home: Path) -> None:
    """Read as plain weights in the dtype of config.json, the logits of the answers equal those of the files that `convert`
    dequantises. In bfloat16 they equal transformers' FP8 without a GPU."""
    for dtype in ("float32", "bfloat16"):
        api.convert(source=str(home / "model"), to="hf", output=str(home / dtype), dtype=dtype)
    api.quantize(model=str(home / "float32"), output=str(home / "fp8"))
    api.convert(source=str(home / "fp8"), to="hf", output=str(home / "plain"), dequantize=True)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(home / "plain")(tokens).logits
        found = api.infer(model=str(home / "fp8"), dequantize=True).network(tokens).logits
        straight = api.infer(model=str(home / "fp8")).network(tokens).logits.float()
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert (straight - expected).norm() < 0.05 * expected.norm()
    with pytest.raises(UserError, match="is not quantised; remove it"):
        api.infer(model=str(home / "model"), dequantize=True)


def test_prompts_of_verify_and_compare_are_rows(home: Path) -> None:
    """Rows give the same numbers as the texts that the template renders from them."""
    (home / "rows.jsonl").write_text('{"query": "hi\u2028", "response": "hello"}\n', encoding="utf-8")
    model = str(home / "model")
    assert api.compare(model, model, prompts=str(home / "rows.jsonl")).prompts == 1
    assert api.verify(model, ["single"], prompts=str(home / "rows.jsonl")).passed
    for call in (api.verify, lambda model, **options: api.compare(model, model, **options)):
        (home / "bad.jsonl").write_text('{"query": "hi", "history": 5}\n')
        with pytest.raises(UserError, match=r"bad\.jsonl:1: history is a number"):
            call(model, prompts=str(home / "bad.jsonl"))
