"""Comparison of two checkpoints: a difference is found where the test put it, and the numbers equal those computed with transformers
alone."""

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from swift_mega import api
from swift_mega.api import Candidate, comparison
from swift_mega.errors import UserError
from swift_mega.verify import distance as comparing
from swift_mega.verify import states, transformers_side
from swift_mega.verify.states import point_names

FAMILIES = ("llama", "qwen3_moe", "deepseek_v3_moe")
POINTS = point_names(4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("compare")
    return {name: tiny.make_chat(folder / name, name) for name in FAMILIES}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three short prompts, so that ranks have little work."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("The quick brown fox.\n\nWho are you?\ndef add(a, b):\n")
    return str(path)


def changed(model: Path, output: Path, change: Any) -> str:
    """A copy of `model` whose tensors `change(tensors)` edits in place."""
    shutil.copytree(model, output)
    tensors = load_file(output / "model.safetensors")
    change(tensors)
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, output / "model.safetensors", {"format": "pt"}
    )
    return str(output)


def nudge(name: str, by: float = 1.01) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] *= by

    return change


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_equals_itself_and_transformers(models, prompts, family):
    """Exactly equal in the same backend; in the other one within a hundredth of the tolerance."""
    model = str(models[family])
    same = api.compare(model, model, prompts=prompts)
    assert [d.point for d in same.distances] == list(POINTS) and same.passed and same.first_difference is None
    assert all(d.max_abs == d.relative == 0 and d.cosine == 1 for d in same.distances)
    assert same.agreement.top_1 == same.agreement.positions and same.agreement.first is None
    assert same.agreement.top_k == 5 * same.agreement.positions and same.agreement.divergence == 0
    other = api.compare(Candidate(checkpoint=model, backend="hf"), model, prompts=prompts, dtype="float64")
    assert other.passed and 0 < max(d.relative for d in other.distances) < 1e-5, other.table()


@pytest.mark.parametrize(
    ("family", "tensor", "point"),
    [
        ("llama", "model.embed_tokens.weight", "embedding"),
        ("llama", "model.layers.0.self_attn.o_proj.weight", "layer 0"),
        ("llama", "model.layers.2.mlp.up_proj.weight", "layer 2"),
        ("llama", "model.norm.weight", "final norm"),
        ("llama", "lm_head.weight", "logits"),
        ("qwen3_moe", "model.layers.3.mlp.gate.weight", "layer 3"),
        ("deepseek_v3_moe", "model.layers.1.self_attn.kv_b_proj.weight", "layer 1"),
    ],
)
@pytest.mark.parametrize("b", [{}, {"backend": "hf"}], ids=["mcore", "hf"])
def test_a_perturbed_tensor_is_found_where_it_is(models, prompts, tmp_path, family, tensor, point, b):
    other = changed(models[family], tmp_path / "other", nudge(tensor))
    found = api.compare(str(models[family]), Candidate(checkpoint=other, **b), prompts=prompts)
    assert not found.passed and found.first_difference is not None and found.first_difference.point == point
    before = found.distances[: POINTS.index(point)]
    assert all(d.relative < 1e-5 for d in before) and (b or not any(d.relative for d in before))


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("llama", "pp2-vpp2"),
        ("llama", "tp2-dp2"),
        ("llama", "cp2-ring"),
        ("llama", "tp2-cp2-ulysses-sp"),
        ("qwen3_moe", "tp2-ep2-etp1-sp"),
        ("qwen3_moe", "pp2"),
        ("deepseek_v3_moe", "tp2-sp"),
        ("deepseek_v3_moe", "ep2"),
        # each of these is a part of one above, or a similar case of another family
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                ("llama", "tp2-sp"),
                ("llama", "pp2"),
                ("qwen3_moe", "tp2-sp"),
                ("qwen3_moe", "tp2"),
                ("deepseek_v3_moe", "pp2"),
            )
        ),
    ],
)
def test_a_converted_checkpoint_in_a_layout(models, prompts, tmp_path, family, layout):
    """Converted on one rank, run in a layout, and compared with transformers on the source."""
    api.convert(source=str(models[family]), to="mcore", output=str(tmp_path / "mcore"))
    a, b = (
        Candidate(checkpoint=str(models[family]), backend="hf"),
        Candidate(checkpoint=str(tmp_path / "mcore"), layout=layout),
    )
    found = api.compare(a, b, prompts=prompts, tolerance=2e-5)
    assert found.passed, found.table()
    assert layout in found.b and "transformers" in found.a


def test_a_megatron_checkpoint_that_others_wrote(models, prompts, tmp_path):
    """Without our Hugging Face folder beside it; its config is given."""
    api.convert(source=str(models["llama"]), to="mcore", output=str(tmp_path / "mcore"))
    shutil.rmtree(tmp_path / "mcore" / "hf")
    model, bare = str(models["llama"]), str(tmp_path / "mcore")
    with pytest.raises(UserError, match=r"has no folder hf/.*give them with --b_model DIR"):
        api.compare(model, bare, prompts=prompts)
    found = api.compare(model, Candidate(checkpoint=bare, model=model), prompts=prompts)
    assert found.passed and max(d.relative for d in found.distances) == 0
    with pytest.raises(UserError, match="--a_backend=hf: transformers cannot read the Megatron checkpoint"):
        api.compare(Candidate(checkpoint=bare, model=model, backend="hf"), model, prompts=prompts)


def test_a_copy_rounded_to_bfloat16(models, prompts, tmp_path):
    """Rounded weights differ from the first point on in float32. They do not differ where both sides are rounded."""

    def rounded(tensors: dict[str, torch.Tensor]) -> None:
        for name, value in tensors.items():
            tensors[name] = value.bfloat16()

    other = changed(models["llama"], tmp_path / "other", rounded)
    found = api.compare(str(models["llama"]), other, prompts=prompts, tolerance=1e-6)
    assert found.first_difference is not None and found.first_difference.point == "embedding"
    assert 2**-11 < found.first_difference.relative <= 2**-8  # at most half a unit in the last of 8 bits
    both = api.compare(str(models["llama"]), other, prompts=prompts, dtype="bfloat16")
    assert max(d.relative for d in both.distances) == 0
    backends = api.compare(Candidate(checkpoint=other, backend="hf"), other, prompts=prompts, dtype="bfloat16")
    assert backends.passed and max(d.relative for d in backends.distances) > 1e-3, backends.table()


def test_a_quantised_copy(models, prompts, tmp_path):
    """FP8 differs from layer 0 on, because the embedding stays plain. It equals its dequantised weights in either backend."""
    model, quantised, plain = str(models["llama"]), str(tmp_path / "q"), str(tmp_path / "plain")
    api.quantize(model=model, output=quantised)
    with pytest.raises(UserError, match=r"q is quantised; pass --dequantize true"):
        api.compare(model, quantised, prompts=prompts)
    found = api.compare(model, quantised, prompts=prompts, tolerance=1e-6, dequantize=True)
    assert (
        found.first_difference is not None
        and found.first_difference.point == "layer 0"
        and found.distances[0].relative == 0
    )
    api.convert(source=quantised, to="hf", output=plain, dequantize=True, dtype="float32")
    same = api.compare(plain, quantised, prompts=prompts, dequantize=True)
    assert max(d.relative for d in same.distances) == 0
    assert api.compare(Candidate(checkpoint=quantised, backend="hf"), plain, prompts=prompts, dequantize=True).passed
    with pytest.raises(UserError, match="neither side states a quantization_config"):
        api.compare(model, plain, prompts=prompts, dequantize=True)


def test_swapped_heads_are_found_at_the_first_layer(models, prompts, tmp_path):
    """A typical mistake of conversions: heads in another order, here the queries of all layers."""

    def swapped(tensors: dict[str, torch.Tensor]) -> None:
        for name, value in tensors.items():
            if name.endswith("q_proj.weight"):
                tensors[name] = value.view(4, 2, 8, 32).transpose(0, 1).reshape(64, 32)

    other = changed(models["llama"], tmp_path / "other", swapped)
    found = api.compare(str(models["llama"]), Candidate(checkpoint=other, layout="tp2-sp"), prompts=prompts)
    assert (
        found.first_difference is not None
        and found.first_difference.point == "layer 0"
        and found.distances[0].relative == 0
    )
    assert found.agreement.first is not None and found.agreement.top_1 < found.agreement.positions


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_adapters(models, prompts, tmp_path, family):
    """PEFT's model against Megatron with the same adapter, and this against the merged model."""
    import peft
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(models[family])
    tuned = peft.get_peft_model(network, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"]))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    model, adapter = str(models[family]), str(tmp_path / "adapter")
    api.export(model=model, adapters=adapter, output=str(tmp_path / "merged"))
    theirs = Candidate(checkpoint=model, adapter=adapter, backend="hf")
    ours = Candidate(checkpoint=model, adapter=adapter, layout="tp2-sp")
    assert api.compare(theirs, ours, prompts=prompts).passed
    assert api.compare(str(tmp_path / "merged"), ours, prompts=prompts).passed
    assert api.compare(model, ours, prompts=prompts).first_difference.point == "layer 0"


def test_the_numbers(models, prompts, tmp_path, monkeypatch):
    """Against transformers alone, its own list of hidden states, and float64 arithmetic written out here; in blocks of a few tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = changed(models["llama"], tmp_path / "other", nudge("model.layers.1.mlp.down_proj.weight", 1.5))
    monkeypatch.setattr(comparing, "BLOCK", 3 * 32)
    sides = Candidate(checkpoint=str(models["llama"]), backend="hf"), Candidate(checkpoint=other, backend="hf")
    found = api.compare(*sides, prompts=prompts, dtype="float64", top_k=3, json=str(tmp_path / "out.json"))
    tokenizer = AutoTokenizer.from_pretrained(models["llama"])
    networks = [AutoModelForCausalLM.from_pretrained(side.checkpoint, dtype=torch.float64).eval() for side in sides]
    worst: dict[str, list[tuple[float, float, float, int, int]]] = {name: [] for name in POINTS}
    top_1, top_3, divergence, first = 0, 0, 0.0, None
    lines = [line for line in Path(prompts).read_text().splitlines() if line]
    for prompt, line in enumerate(lines):
        rows = torch.tensor([tokenizer(line)["input_ids"]])
        with torch.no_grad():
            a, b = (network(rows, output_hidden_states=True) for network in networks)
        for name, one, two in zip(
            # The last one of the list is after the norm: the output of layer 3 is not in the list.
            [*POINTS[:4], "final norm", "logits"],
            [*a.hidden_states, a.logits],
            [*b.hidden_states, b.logits],
            strict=True,
        ):
            for token, (x, y) in enumerate(zip(one[0], two[0], strict=True)):
                off = float((x - y).abs().max())
                cosine = float(torch.nn.functional.cosine_similarity(x, y, dim=0))
                relative = ((x - y).pow(2).mean() / x.pow(2).mean()).sqrt()
                worst[name].append((float(relative), off, cosine, prompt, token))
        for position, (x, y) in enumerate(zip(a.logits[0], b.logits[0], strict=True)):
            top_1 += int(x.argmax() == y.argmax())
            top_3 += len({*x.topk(3).indices.tolist()} & {*y.topk(3).indices.tolist()})
            divergence += float(
                torch.nn.functional.kl_div(y.log_softmax(0), x.log_softmax(0), reduction="sum", log_target=True)
            )
            if first is None and x.argmax() != y.argmax():
                first = (prompt, position, int(x.argmax()), int(y.argmax()))
    assert found.first_difference is not None and found.first_difference.point == "layer 1" and first is not None
    for distance in found.distances:
        if distance.point == "layer 3":
            continue
        relative, _, _, prompt, token = max(worst[distance.point])
        assert distance.relative == pytest.approx(relative, rel=1e-9)
        assert distance.max_abs == pytest.approx(max(off for _, off, *_ in worst[distance.point]), rel=1e-9)
        assert distance.cosine == pytest.approx(min(cosine for _, _, cosine, *_ in worst[distance.point]), abs=1e-9)
        if relative:
            assert (distance.prompt, distance.token) == (prompt, token)
    agreed = found.agreement
    assert (agreed.positions, agreed.top_1, agreed.top_k) == (len(worst["logits"]), top_1, top_3)
    assert agreed.divergence == pytest.approx(divergence, rel=1e-6)
    assert agreed.first is not None
    assert (agreed.first.prompt, agreed.first.position, agreed.first.a, agreed.first.b) == first
    assert agreed.first.text_a == tokenizer.decode([first[2]])
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["first_difference"] == "layer 1" and written["passed"] is False and written["prompts"] == 3
    assert [point["relative"] for point in written["points"]] == [d.relative for d in found.distances]
    assert written["top_1"] == top_1 / agreed.positions and written["first_disagreement"]["position"] == first[1]


def test_what_is_not_finite_differs(models, prompts, tmp_path):
    """NaN exceeds every tolerance, in the table, in the picture, and in JSON, which has no number for it."""
    other = changed(models["llama"], tmp_path / "other", nudge("model.layers.2.mlp.up_proj.weight", float("nan")))
    files = {"json": str(tmp_path / "out.json"), "plot": str(tmp_path / "out.png"), "scratch": str(tmp_path)}
    found = api.compare(str(models["llama"]), Candidate(checkpoint=other, backend="hf"), prompts=prompts, **files)
    assert not found.passed and found.first_difference is not None and found.first_difference.point == "layer 2"
    assert "first difference at layer 2: inf, beyond the tolerance of 0.0001" in found.table()
    points = json.loads((tmp_path / "out.json").read_text())["points"]
    assert points[3]["relative"] is None and points[1]["relative"] < 1e-5
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert {path.name for path in tmp_path.iterdir()} == {"other", "out.json", "out.png"}  # no other file is left


def test_a_family_that_is_not_known_here(tmp_path):
    """OPT runs in transformers, and one line says so; without a tokenizer the tokens are random."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "opt",
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        ffn_dim=48,
        vocab_size=131,
        word_embed_proj_dim=32,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "opt")
    model = str(tmp_path / "opt")
    other = changed(tmp_path / "opt", tmp_path / "other", nudge("model.decoder.layers.1.fc2.weight", 1.5))
    found = api.compare(model, other)
    assert found.first_difference is not None and found.first_difference.point == "layer 1"
    assert [d.point for d in found.distances] == list(point_names(3))
    assert found.notes[0] == f"model_type opt of {model} is not supported by swift_mega: transformers runs it"
    with pytest.raises(UserError, match=r"model_type 'opt' of .* is not supported"):
        api.compare(Candidate(checkpoint=model, backend="mcore"), other)


def test_what_cannot_be_compared(models, prompts, tmp_path):
    """One line each, before a model is loaded."""
    model = str(models["llama"])

    def refused(message: str, a: Any = model, b: Any = model, **given: Any) -> None:
        with pytest.raises(UserError, match=message):
            api.compare(a, b, **{"prompts": prompts, **given})

    refused("--b=absent: no such directory", b="absent")
    refused("has no config.json", b=str(tmp_path))
    thin = str(tiny.make_chat(tmp_path / "thin", "llama", hidden_size=16, num_hidden_layers=2))
    refused("of different shape: num_hidden_layers 4 and 2, hidden_size 32 and 16; compare two", b=thin)
    (tmp_path / "empty.txt").write_text("\n  \n")
    refused("empty.txt: no prompt has a token; give a text file", prompts=str(tmp_path / "empty.txt"))
    refused("--prompts=absent.txt does not exist", prompts="absent.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff")
    refused(r"bytes.txt: not UTF-8 text \(byte 0\)", prompts=str(tmp_path / "bytes.txt"))
    refused("--top_k=1000: expected 1 to 391, the number of tokens", top_k=1000)
    refused("--top_k=0: expected 1 to 391", top_k=0)
    refused("--tolerance=-1.0: expected a number of at least 0", tolerance=-1.0)
    refused("dtype='float16' is not one", dtype="float16")
    refused("--b_layout=tp2 splits a model", b=Candidate(checkpoint=model, backend="hf", layout="tp2"))
    refused("parallel.tensor=3 does not divide", b=Candidate(checkpoint=model, layout="tp3"))
    refused("'tq3' in the layout 'tq3' is not a size", b=Candidate(checkpoint=model, layout="tq3"))
    refused("--b_backend=vllm: expected mcore | hf", b=Candidate(checkpoint=model, backend="vllm"))
    refused(
        "--b_model=.* is the config of a Megatron checkpoint, and .* is not one; remove it",
        b=Candidate(checkpoint=model, model=model),
    )
    refused("has no adapter_config.json", b=Candidate(checkpoint=model, adapter=model))
    refused("--scratch=absent: no such directory", scratch="absent")
    refused("plots are PNG files", plot=str(tmp_path / "plot.pdf"))
    refused("a file cannot be written there", json=str(tmp_path / "absent" / "out.json"))


def test_tokenizers(models, tmp_path):
    """Two different tokenizers are refused unless one is given. Tokens beyond the vocabulary are refused, and so is a prompt without
    any tokenizer."""
    model = models["llama"]
    other, bare = tmp_path / "other", tmp_path / "bare"
    shutil.copytree(model, other)
    tiny.tokenizer(None, "<|other|>", "<|im_end|>").save_pretrained(other)
    with pytest.raises(UserError, match=r"the tokenizers of .* differ; give --tokenizer DIR, which is used for both"):
        api.compare(str(model), str(other))
    text = tmp_path / "text.txt"
    text.write_text("a <|im_start|>")
    found = api.compare(str(model), str(other), tokenizer=str(model), prompts=str(text))
    assert found.passed and found.prompts == 1
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("tok*", "chat*", "special*"))
    assert api.compare(str(bare), str(model), prompts=str(text)).passed  # the only tokenizer serves both sides
    assert api.compare(str(bare), str(bare)).passed
    with pytest.raises(UserError, match=r"neither side has a tokenizer for .*text.txt; give --tokenizer DIR"):
        api.compare(str(bare), str(bare), prompts=str(text))
    small = str(tiny.make(tmp_path / "small", "llama", vocab_size=100))
    with pytest.raises(
        UserError,
        match=r"the prompt .a <\|im_start\|>.: token \d+ \(.<\|im_start\|>.\) has no row .* ends at 99 .*--tokenizer DIR",
    ):
        api.compare(small, small, prompts=str(text), tokenizer=str(model))


def test_verify_knows_experts_in_float64(models):
    """In its default dtype. transformers' grouped products of experts have no float64."""
    report = api.verify(str(models["qwen3_moe"]), ["single"])
    assert report.passed and report.dtype == "float64", report.table()


def left_over(side: states.Side, cpu: Any, folder: Path) -> int:
    """The number of weights of a side that still exist after its run, minus the number before."""
    before = weights_here()
    states.run_side(side, cpu, [[1, 2, 3]], torch.float32, lambda prompt, point, value: None, folder)
    return weights_here() - before


def weights_here() -> int:
    return sum(isinstance(thing, torch.nn.Parameter) for thing in gc.get_objects())


@pytest.mark.parametrize("backend", ["mcore", "hf"])
def test_a_side_is_gone_before_the_next_one_comes(models, tmp_path, ranks, cpu, backend):
    """Under torchrun both sides run in one process, which must never have both in memory."""
    given = Candidate(checkpoint=str(models["llama"]), backend=backend)
    assert ranks(1, left_over, comparison._side(given, "a", False, []), cpu, tmp_path) == 0


def test_a_model_whose_layers_cannot_be_told_apart():
    network = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(2, 2)] * 3))
    assert len(transformers_side.decoder_layers(network, 3, where=Path("model"))) == 3
    with pytest.raises(UserError, match=r"model: Sequential has no list of 4 decoder layers \(num_hidden_layers\)"):
        transformers_side.decoder_layers(network, 4, where=Path("model"))
    network.get_output_embeddings = lambda: None  # type: ignore[assignment]
    with pytest.raises(
        UserError, match="model: Sequential has no output layer, and so no logits; compare a language model"
    ):
        transformers_side.head_of(network, where=Path("model"))
