"""The padding token's row of the embedding gets no gradient from lookups, where the model of that type in transformers has padding_idx."""

import json
from pathlib import Path

import pytest
import torch

import tiny
from swift_mega.config import schema
from swift_mega.device.device import Device
from swift_mega.errors import UserError
from swift_mega.launch.torchrun import run_ranks
from swift_mega.models.translate import load_settings
from swift_mega.parallel.layout import parse_layout, plan_layout
from swift_mega.verify import parity
from tests.train.bench import settings

ONE_OF_A_TYPE = {fields.get("written_as", fields["model_type"]): name for name, fields in tiny.FAMILIES.items()}


def written(directory: Path, name: str, **changes: object) -> Path:
    """A directory with config.json alone, as transformers writes it."""
    from transformers import AutoConfig

    fields = tiny.fields_of(name, **changes)
    kind = fields.pop("written_as", None)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    config.save_pretrained(directory)
    if kind is not None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": kind}))
    return directory


def test_the_row_is_transformers_padding_idx_for_every_type(tmp_path):
    """All types, by their embedding in the installed transformers: six older types have no padding_idx."""
    from transformers import AutoConfig, AutoModelForCausalLM

    ours, theirs = {}, {}
    for kind, name in ONE_OF_A_TYPE.items():
        ours[kind] = load_settings(written(tmp_path / name, name)).pad_row
        fields = tiny.fields_of(name)
        fields.pop("written_as", None)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
        theirs[kind] = network.get_input_embeddings().padding_idx
    assert ours == theirs
    assert {kind for kind, row in ours.items() if row is None} == {
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "bloom",
        "mpt",
        "falcon",
    }
    assert len(ours) >= 53


@pytest.mark.parametrize(("pad", "row"), [(None, None), (0, 0), (-1, 130), (130, 130)])
def test_numbers_of_a_row(tmp_path, pad, row):
    """torch counts a negative index from the end: old Llama configs say pad_token_id=-1."""
    assert load_settings(written(tmp_path, "llama", pad_token_id=pad)).pad_row == row


def test_a_row_that_transformers_has_no_embedding_for(tmp_path):
    """GLM's published pad_token_id with a smaller vocabulary. For types without padding_idx it changes nothing."""
    with pytest.raises(
        UserError, match=r"pad_token_id=151329 is beyond vocab_size=131, .*; set pad_token_id to one of"
    ):
        load_settings(written(tmp_path / "glm", "glm", pad_token_id=151329))
    assert load_settings(written(tmp_path / "gpt2", "gpt2", pad_token_id=151329)).pad_row is None


@pytest.mark.parametrize("tied", [True, False])
def test_a_pad_token_that_is_the_end_of_text(tmp_path: Path, cpu: Device, tied: bool) -> None:
    """The pad token is the last row, on the second tensor rank, and ends the rows: gradients equal transformers', where only the head
    changes it."""
    model = tiny.make(tmp_path / "model", "llama", tie_word_embeddings=tied, pad_token_id=-1, eos_token_id=130)
    rows = [[*row, 130, *row[:3]] for row in parity.example_rows(131, examples=8)]
    run_ranks(1, parity.reference, model, None, rows, tmp_path / "reference")
    parallel, world = parse_layout("tp2-pp2-sp")
    run = settings(model, schema.Parallel(tensor=2, pipeline=2, sequence=True, distributed_optimizer=False), "full")
    layout = plan_layout(parallel, load_settings(model).shape, world)
    run_ranks(world, parity.measure, run, cpu, layout, rows, tmp_path / "found")
    found = parity.compare("tp2-pp2-sp", tmp_path / "reference", tmp_path / "found")
    assert found.logits < 1e-4 and found.loss < 2e-6 and found.gradient < 1e-5, found
    embedding = {name: have for name, _, have in parity.gradients(tmp_path / "reference", tmp_path / "found")}[
        "model.embed_tokens.weight"
    ]
    assert bool(embedding[130].any()) is tied
