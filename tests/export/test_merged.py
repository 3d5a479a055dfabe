"""Merging from files to files: the sum is in float32, all other tensors keep their bytes; and every adapter that is refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from swift_mega import api
from swift_mega.config import schema
from swift_mega.errors import UserError
from swift_mega.export.merged import merge
from swift_mega.models.translate import load_settings
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.layout import plan_layout
from swift_mega.train.wire import build_training
from swift_mega.tuners.lora_files import read_adapter
from tests import tiny

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj"
SHAPES = {Q: (64, 32), DOWN: (32, 48)}
CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "down_proj"],
    "bias": "none",
    "use_dora": False,
}


def factors(rank: int = 2, shapes: dict[str, tuple[int, int]] = SHAPES) -> dict[str, Tensor]:
    found = {}
    for module, (rows, columns) in shapes.items():
        found[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, columns)
        found[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, rank)
    return found


def adapter(directory: Path, tensors: dict[str, Tensor] | None = None, config: Any = None, **changes: Any) -> Path:
    directory.mkdir(parents=True)
    save_file(factors() if tensors is None else tensors, directory / "adapter_model.safetensors")
    text = config if isinstance(config, str) else json.dumps({**CONFIG, **changes})
    (directory / "adapter_config.json").write_text(text)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny.make(tmp_path_factory.mktemp("base"), "llama", dtype=torch.bfloat16)
    (directory / "tokenizer.json").write_text("{}")
    return directory


# --- merging


@pytest.mark.parametrize(("rslora", "scale"), [(False, 3.0), (True, 6 / 2**0.5)])
def test_adapted_linears_in_float32_and_the_rest_untouched(tmp_path, base, rslora, scale):
    made = adapter(tmp_path / "adapter", use_rslora=rslora)
    before, tensors = contents(base), load_file(made / "adapter_model.safetensors")
    merge(base, made, tmp_path / "out", max_shard_size="20KB")
    assert contents(base) == before
    want = load_file(base / "model.safetensors")
    found = {
        name: value for file in (tmp_path / "out").glob("*.safetensors") for name, value in load_file(file).items()
    }
    assert found.keys() == want.keys() and len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    for name, value in want.items():
        module = name.removesuffix(".weight")
        if module in SHAPES:
            up, down = (tensors[f"base_model.model.{module}.lora_{letter}.weight"].double() for letter in "BA")
            exact = value.double() + scale * up @ down
            assert found[name].dtype == torch.bfloat16 and not torch.equal(found[name], value)
            # one rounding to bfloat16 (8 bits, so half a unit is 2^-8 at most), of a sum that is correct to float32
            assert ((found[name].double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()
        else:
            assert torch.equal(found[name].view(torch.int16), value.view(torch.int16)), name
    assert (tmp_path / "out" / "tokenizer.json").exists() and not (tmp_path / "out" / "adapter_config.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]


def test_an_adapter_in_bfloat16_and_extra_fields_that_say_nothing(tmp_path, base):
    """An adapter_config.json as PEFT itself writes it: many fields, most of them null."""
    from peft import LoraConfig

    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM").to_dict()
    written = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    made = adapter(
        tmp_path / "adapter", {k: v.bfloat16() for k, v in factors().items()}, json.dumps(written, default=str)
    )
    assert read_adapter(made).scale == 3.0
    merge(base, made, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == (base / "model.safetensors").stat().st_size


def test_outputs_that_may_not_be_written(tmp_path, base):
    made = adapter(tmp_path / "adapter")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    shutil.copytree(base, tmp_path / "base")
    before = contents(tmp_path)
    for output, overwrite, message in (
        (tmp_path / "mine", False, "mine exists already and is left as it is; choose another path"),
        (tmp_path / "file", True, "file is a file and is left as it is; choose another path"),
        (tmp_path / "file" / "out", True, "cannot write .*: Not a directory; choose another --output"),
        (tmp_path / "base", True, "output .*base contains .*base, the input; choose another path"),
        (tmp_path / "adapter", True, "output .*adapter contains .*adapter, the input; choose another path"),
        (tmp_path, True, "contains .*, the input; choose another path"),
    ):
        with pytest.raises(UserError, match=message):
            merge(tmp_path / "base", made, output, overwrite=overwrite)
    assert contents(tmp_path) == before
    merge(tmp_path / "base", made, tmp_path / "mine", overwrite=True)
    assert not (tmp_path / "mine" / "notes.txt").exists()


def test_a_full_disk_leaves_nothing(ranks, tmp_path, base):
    made = adapter(tmp_path / "adapter")

    def body() -> str:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
        try:
            merge(base, made, tmp_path / "out")
        except UserError as error:
            return str(error)
        return ""

    assert ranks(1, body).startswith(f"cannot write {tmp_path}/out: File too large; free the space")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            {"model.layers.9.self_attn.q_proj": (64, 32)},
            r"factors for model.layers.9.self_attn.q_proj, and .* has no such linear; give",
        ),
        (
            {Q: (64, 48)},
            r"q_proj is for a linear of \[64, 48\], the model's is \[64, 32\]; give the model of this adapter",
        ),
        ({Q: (32, 32)}, r"q_proj is for a linear of \[32, 32\], the model's is \[64, 32\]"),
        ({"model.norm": (32, 32)}, r"norm is for a linear of \[32, 32\], the model's is \[32\]"),
        ({"lm_head.weight": (131, 32)}, "factors for lm_head.weight, and"),
    ],
)
def test_an_adapter_of_another_model(tmp_path, base, shapes, message):
    made = adapter(tmp_path / "adapter", factors(shapes=shapes))
    with pytest.raises(UserError, match=message):
        merge(base, made, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_quantised_base(tmp_path, base):
    source = tmp_path / "base"
    shutil.copytree(base, source)
    tensors = load_file(source / "model.safetensors")
    tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(
        UserError, match=r"q_proj is quantised \(torch.float8_e4m3fn\); merge into the bfloat16 or float32 model"
    ):
        merge(source, adapter(tmp_path / "adapter"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_api_has_nothing_to_do_without_merging(tmp_path, base):
    with pytest.raises(UserError, match="an adapter is in PEFT's format already"):
        api.export(
            model=str(base), adapters=str(adapter(tmp_path / "adapter")), output=str(tmp_path / "out"), merge=False
        )


# --- adapters that are refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(use_dora=True), "use_dora=True is not supported here; merge this adapter with PEFT's merge_and_unload"),
        (dict(bias="lora_only"), "bias='lora_only' is not supported"),
        (dict(modules_to_save=["lm_head"]), r"modules_to_save=\['lm_head'\] is not supported"),
        (dict(rank_pattern={"q_proj": 4}), "rank_pattern={'q_proj': 4} is not supported"),
        (dict(alpha_pattern={"q_proj": 4}), "alpha_pattern={'q_proj': 4} is not supported"),
        (dict(lora_bias=True), "lora_bias=True is not supported"),
        (dict(init_lora_weights="pissa"), "init_lora_weights='pissa' is not supported"),
        (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4' is not supported"),
        (dict(init_lora_weights="olora"), "init_lora_weights='olora' is not supported"),
        (dict(alora_invocation_tokens=[1, 2]), r"alora_invocation_tokens=\[1, 2\] is not supported"),
        (dict(trainable_token_indices=[1]), r"trainable_token_indices=\[1\] is not supported"),
        (dict(layer_replication=[[0, 4]]), "layer_replication="),
        (dict(target_parameters=["experts.gate_up_proj"]), "target_parameters="),
        (dict(use_qalora=True), "use_qalora=True"),
        (dict(peft_type="IA3"), "peft_type is 'IA3'; only LORA can be merged"),
        (dict(peft_type=None), "peft_type is None"),
        (dict(r=4), "has rank 2, adapter_config.json says r=4; use the adapter_config.json of this adapter"),
        (dict(r=None), "r=None and lora_alpha=6 must be numbers"),
        (dict(r="many"), "r='many' and lora_alpha=6 must be numbers"),
        (dict(lora_alpha=None), "r=2 and lora_alpha=None must be numbers"),
        (dict(r=0), "r=0 and lora_alpha=6.0 are not a valid rank and scale"),
        (dict(lora_alpha=float("inf")), "r=2 and lora_alpha=inf are not a valid rank and scale"),
    ],
)
def test_a_config_that_means_more_than_two_factors(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        read_adapter(adapter(tmp_path / "adapter", **changes))


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", '{"r": 2}'])
def test_a_config_that_is_none(tmp_path, text):
    with pytest.raises(
        UserError, match=r"is not valid JSON .*; copy it again|contains .*, not an object|peft_type is .*; only LORA"
    ):
        read_adapter(adapter(tmp_path / "adapter", config=text))


def test_files_that_are_not_there(tmp_path):
    made = adapter(tmp_path / "adapter")
    (made / "adapter_model.safetensors").rename(made / "adapter_model.bin")
    with pytest.raises(UserError, match=r"holds pickle files only \(adapter_model.bin\)"):
        read_adapter(made)
    (made / "adapter_config.json").unlink()
    with pytest.raises(
        UserError, match=r"has no adapter_config.json, so it is not a PEFT adapter; give the checkpoint directory"
    ):
        read_adapter(made)
    with pytest.raises(UserError, match=r"absent has no adapter_config.json"):
        read_adapter(tmp_path / "absent")


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in factors().items() if key != name}


A, B = (f"base_model.model.{Q}.lora_{letter}.weight" for letter in "AB")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without(A), rf"LoRA factors come in pairs A and B under base_model.model.…, but {A} are missing or unknown"),
        (without(B), rf"but {B} are missing or unknown"),
        ({**factors(), "base_model.model.lm_head.bias": torch.ones(2)}, "lm_head.bias"),
        ({**factors(), f"base_model.model.{Q}.lora_magnitude_vector": torch.ones(2)}, "lora_magnitude_vector"),
        ({**factors(), f"base_model.model.{Q}.lora_B.bias": torch.ones(64)}, "lora_B.bias"),
        (
            {name.removeprefix("base_model.model."): value for name, value in factors().items()},
            "under base_model.model.…",
        ),
        ({**factors(), A: torch.ones(3, 32)}, "q_proj has rank 3, adapter_config.json says r=2"),
        ({**factors(), B: torch.ones(64, 3)}, "q_proj has rank 3, adapter_config.json says r=2"),
        ({**factors(), A: torch.ones(64)}, "q_proj"),
        ({**factors(), B: torch.ones(64, 2, 1)}, "q_proj"),
        ({**factors(), B: torch.ones(64, 2, dtype=torch.int8)}, "q_proj.*int8.* are quantised"),
    ],
)
def test_factors_that_are_no_pairs(tmp_path, tensors, message):
    with pytest.raises(UserError, match=message):
        read_adapter(adapter(tmp_path / "adapter", tensors))


# --- a run that starts from an adapter


def start(model: Path, made: Path, tuner: dict[str, Any], world: int, cpu: Any) -> str:
    """In every rank: the message of building a run from an adapter."""
    parallel = schema.Parallel(tensor=world, distributed_optimizer=False)
    run = schema.Run(
        model=schema.Model(path=str(model), dtype="float32", adapters=(str(made),)),
        parallel=parallel,
        tuner=schema.Full() if tuner.get("type") == "full" else schema.Lora(**tuner),
    )
    groups = parallel_groups.init(plan_layout(parallel, load_settings(model).shape, world))
    try:
        build_training(run, cpu, groups, steps=1)
    except UserError as error:
        return str(error)
    finally:
        parallel_groups.close()
    return ""


TUNER = {"rank": 2, "alpha": 6.0, "target_modules": ("layers.0.self_attn.q_proj", "layers.3.mlp.down_proj")}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("changes", "shapes", "message"),
    [
        ({}, SHAPES, ""),
        ({"rank": 4}, SHAPES, "has r=2, the run 4; set the tuner's settings to the adapter's"),
        ({"alpha": 8.0}, SHAPES, "has lora_alpha=6, the run 8.0; set"),
        ({"rslora": True}, SHAPES, "has use_rslora="),
        (
            {"target_modules": ("layers.0.self_attn.q_proj",)},
            SHAPES,
            "and tuner.target_modules differ in 2 factors: .*down_proj.lora_A",
        ),
        ({"target_modules": ("all-linear",)}, SHAPES, "and tuner.target_modules differ in 52 factors"),
        ({"type": "full"}, SHAPES, "with a tuner that trains the whole model; merge the adapter first"),
        (
            {},
            {**SHAPES, Q: (64, 16)},
            r"q_proj.lora_A.weight is \[2, 16\] for a factor of \[2, 32\]; give an adapter of this model",
        ),
        ({}, {**SHAPES, Q: (62, 32)}, r"q_proj.lora_B.weight is \[62, 2\] for a factor of \[64, 2\]; give an adapter"),
        ({}, {**SHAPES, DOWN: (32, 47)}, r"down_proj.lora_A.weight is \[2, 47\] for a factor of \[2, 48\]"),
    ],
)
def test_starting_from_an_adapter(ranks, cpu, tmp_path, base, changes, shapes, message, world):
    made = adapter(tmp_path / "adapter", factors(shapes=shapes))
    said = ranks(world, start, base, made, {**TUNER, **changes}, world, cpu, timeout=60)
    assert re.search(message, said) if message else said == ""
