"""Weights written as FP8 blocks equal a loop over their numbers and what other readers read, and writing again gives the same bytes."""

import json

import pytest
import quantised_files as files
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

import tiny
from swift_mega import api
from swift_mega.convert.files import to_fp8
from swift_mega.convert.files.hf_files import Checkpoint
from swift_mega.convert.files.quantised import open_checkpoint
from swift_mega.convert.files.to_fp8 import fp8_config, fp8_tensors, quantise_fp8
from swift_mega.errors import UserError

BLOCK = (16, 24)


def by_hand(weight: torch.Tensor, block: tuple[int, int]) -> tuple[list[list[int]], torch.Tensor]:
    """Codes and scales, block by block: among all FP8 codes the nearest one, on a tie the even one."""
    table = sorted((files.e4m3(code), code) for code in range(256) if files.e4m3(code) == files.e4m3(code))
    rows, columns = weight.shape
    codes = [[0] * columns for _ in range(rows)]
    scales = torch.ones(-(-rows // block[0]), -(-columns // block[1]), dtype=torch.float64)
    for top in range(0, rows, block[0]):
        for left in range(0, columns, block[1]):
            part = weight[top : top + block[0], left : left + block[1]].double()
            scale = float(part.abs().max()) / 448 or 1.0
            scales[top // block[0], left // block[1]] = scale
            for r in range(part.shape[0]):
                for c in range(part.shape[1]):
                    value = float(part[r, c]) / scale
                    found = min(table, key=lambda entry: (abs(entry[0] - value), entry[1] & 1, entry[1] & 128 == 0))
                    codes[top + r][left + c] = found[1]
    return codes, scales


@pytest.mark.parametrize("shape", [(32, 48), (33, 47), (5, 100), (1, 1)])
def test_codes_are_the_nearest(shape):
    """Scales to two roundings of float32; codes of all numbers except those halfway between two codes."""
    weight = torch.randn(shape)
    codes, scales = quantise_fp8(weight, BLOCK)
    want, want_scales = by_hand(weight, BLOCK)
    torch.testing.assert_close(scales.double(), want_scales, rtol=2.5e-7, atol=0)
    found = codes.float()
    numbers = torch.tensor([[files.e4m3(code) for code in row] for row in want])
    spread = scales.repeat_interleave(16, 0)[: shape[0]].repeat_interleave(24, 1)[:, : shape[1]]
    tied = (found - weight / spread).abs() - (numbers - weight / spread).abs()
    assert bool((found == numbers).double().mean() > 0.999) and float(tied.abs().max()) < 1e-4


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_reading_and_writing_again_changes_nothing(data):
    """Read and write again, from float32 weights through float32 and from bfloat16 weights also through bfloat16, for any size of numbers
    and any block."""
    shape = (data.draw(st.integers(1, 50)), data.draw(st.integers(1, 50)))
    block = (data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20)))
    size = 10.0 ** data.draw(st.integers(-20, 20))
    source, through = data.draw(
        st.sampled_from(
            [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
        )
    )
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999)))) * size).to(
        source
    )
    codes, scales = quantise_fp8(weight, block)
    assert bool(torch.isfinite(codes.float()).all()) and bool((scales > 0).all())
    spread = scales.repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)[:, : shape[1]]
    again, again_scales = quantise_fp8((codes.float() * spread).to(through), block)
    assert torch.equal(scales, again_scales)
    assert torch.equal(codes.view(torch.uint8), again.view(torch.uint8))


def test_every_scale_comes_back():
    """s = x / 448 is the scale of 448 s in float32, for all 2^23 numbers x between two powers of two. Powers of two change nothing."""
    scales = torch.arange(127 << 23, 128 << 23, dtype=torch.int32).view(torch.float32) / 448
    assert torch.equal(scales * 448 / 448, scales)


def test_zeros_stay_zeros():
    codes, scales = quantise_fp8(torch.zeros(3, 5), (2, 2))
    assert not codes.float().any() and bool((scales == 1).all())


def test_stacked_weights_and_pieces(monkeypatch):
    """[experts, out, in] is treated as many matrices, and the size of the pieces changes no bit."""
    weight = torch.randn(3, 50, 30)
    want = [quantise_fp8(one, BLOCK) for one in weight]
    monkeypatch.setattr(to_fp8, "CHUNK", 1)
    codes, scales = quantise_fp8(weight, BLOCK)
    for number, (one, its_scales) in enumerate(want):
        assert torch.equal(codes[number].view(torch.uint8), one.view(torch.uint8))
        assert torch.equal(scales[number], its_scales)


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3_moe"])
def written(request, tmp_path_factory):
    """A bfloat16 model and its FP8 files."""
    folder = tmp_path_factory.mktemp(request.param)
    source = tiny.make(folder / "source", request.param, dtype=torch.bfloat16)
    api.quantize(model=str(source), output=str(folder / "fp8"), block=BLOCK)
    return source, folder / "fp8"


def test_which_weights_are_fp8(written):
    """The linears of attention, MLP and experts are FP8. Norms, embeddings, output layer and routers are not; config.json names them."""
    source, fp8 = written
    found, plain = Checkpoint(fp8).entries, Checkpoint(source).entries
    quantised = {name for name, entry in found.items() if entry.dtype == torch.float8_e4m3fn}
    assert quantised == {name for name in plain if files.linear(name)}
    assert found.keys() == plain.keys() | {f"{name}_scale_inv" for name in quantised}
    config = json.loads((fp8 / "config.json").read_text())["quantization_config"]
    assert config["weight_block_size"] == list(BLOCK) and config["quant_method"] == "fp8"
    routers = {name.removesuffix(".weight") for name in plain if name.endswith("mlp.gate.weight")}
    assert routers
    assert set(config["modules_to_not_convert"]) == {"lm_head", "model.embed_tokens", *routers}


def test_transformers_reads_the_same(written):
    """transformers' own dequantiser, which accepts whole blocks only, on every weight that has whole blocks."""
    _, fp8 = written
    stored, ours, compared = load_file(fp8 / "model.safetensors"), open_checkpoint(fp8, torch.float32), 0
    for name, value in stored.items():
        if value.dtype == torch.float8_e4m3fn:
            scales = stored[f"{name}_scale_inv"]
            rows, columns = (size % edge for size, edge in zip(value.shape, BLOCK, strict=True))
            if not rows and not columns:
                want = Fp8Dequantize(None)._dequantize_one(value, scales, torch.float32)
                assert torch.equal(ours.read(name), want), name
                compared += 1
    assert compared > 4


def test_written_again_to_the_byte(written, tmp_path):
    """FP8 files, read and written as FP8 with the same blocks, are the same bytes."""
    _, fp8 = written
    api.quantize(model=str(fp8), output=str(tmp_path / "again"), block=BLOCK, dequantize=True)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (fp8 / name).read_bytes(), name


def test_values_in_any_order(written):
    """Scales that are read before the codes, or twice, are those of the weight."""
    source, fp8 = written
    want = load_file(fp8 / "model.safetensors")
    linears = {name.removesuffix(".weight") for name in Checkpoint(source).entries if files.linear(name)}
    for tensor in reversed(list(fp8_tensors(Checkpoint(source), linears, BLOCK))):
        for _ in range(2):
            value = tensor.value()
            assert (value.dtype, tuple(value.shape)) == (tensor.dtype, tensor.shape)
            assert torch.equal(value.view(torch.uint8), want[tensor.name].view(torch.uint8)), tensor.name


def test_a_missing_linear_and_a_number_that_is_none(written, tmp_path):
    source, _ = written
    with pytest.raises(UserError, match=r"has no weights of model\.layers\.9\.mlp\.up_proj, so"):
        list(fp8_tensors(Checkpoint(source), ["model.layers.9.mlp.up_proj"]))
    broken = tiny.make(tmp_path / "broken", "llama", num_hidden_layers=1)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")
    files.save_file(tensors, broken / "model.safetensors")
    with pytest.raises(
        UserError, match=r"up_proj\.weight \[48, 32\] has 1 value that is not finite, the first \(nan\) at \[3, 4\]"
    ):
        api.quantize(model=str(broken), output=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out*"))


def test_config_of_a_model_without_an_output_layer(tmp_path):
    """A tied model's output layer is not FP8 either."""
    model = tiny.make(tmp_path / "m", "llama_tied", num_hidden_layers=1)
    assert "lm_head" in fp8_config(Checkpoint(model), [])["modules_to_not_convert"]


def test_outputs_that_are_in_the_way(written, tmp_path):
    """An existing output is kept, and a directory that contains the model is never replaced."""
    source, fp8 = written
    with pytest.raises(
        UserError, match=r"exists already and is left as it is; choose another path, or pass --overwrite true"
    ):
        api.quantize(model=str(source), output=str(fp8))
    with pytest.raises(UserError, match=r"contains .*source, the input; choose another path"):
        api.quantize(model=str(source), output=str(source.parent), overwrite=True)
    before = (fp8 / "model.safetensors").read_bytes()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")
    api.quantize(model=str(source), output=str(tmp_path / "out"), block=BLOCK, overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
