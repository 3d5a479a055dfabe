"""Quantised checkpoints read as plain ones, against files written number by number and against other libraries' dequantisers."""

import json
from pathlib import Path

import pytest
import quantised_files as files
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import tiny
from swift_mega import api
from swift_mega.convert.files import quantised
from swift_mega.convert.files.hf_files import Checkpoint
from swift_mega.convert.files.quantised import Dequantised, open_checkpoint
from swift_mega.errors import UserError


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("plain") / "llama", "llama", num_hidden_layers=1)


@pytest.fixture(scope="module", params=list(files.FORMATS))
def stored(request, plain, tmp_path_factory):
    """A quantised directory and the plain weights of it."""
    target = tmp_path_factory.mktemp(request.param) / "model"
    return target, files.write(plain, target, request.param)


def test_names_shapes_and_numbers_are_the_plain_models(stored, plain):
    """Every weight, bit for bit: in float32 by the formula of its format, and rounded to bfloat16. Plain tensors do not change."""
    directory, meant = stored
    wide, narrow = (open_checkpoint(directory, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert wide.entries.keys() == narrow.entries.keys() == Checkpoint(plain).entries.keys()
    assert any(files.linear(name) for name in meant)
    for name, value in meant.items():
        assert wide.entries[name].shape == narrow.entries[name].shape == value.shape
        assert torch.equal(wide.read(name), value), name
        expected = value.bfloat16() if files.linear(name) else value
        assert narrow.entries[name].dtype == narrow.read(name).dtype == expected.dtype
        assert torch.equal(narrow.read(name), expected), name


def test_slices_are_slices_of_the_whole(stored):
    """Along both dims: inside packed words and blocks, across their borders, empty and whole."""
    directory, meant = stored
    found = open_checkpoint(directory, torch.float32)
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.weight"):
        for axis in (0, 1):
            size = meant[name].shape[axis]
            for start, stop in ((0, size // 2), (size // 2, size), (5, 27), (3, 4), (13, 13), (size - 1, size)):
                value = found.read(name, axis, start, stop)
                assert torch.equal(value, meant[name].narrow(axis, start, stop - start)), (name, axis, start, stop)
        assert torch.equal(found.read(name, 0, 7), meant[name][7:])


def test_pieces_do_not_show(stored, monkeypatch):
    """A weight that is dequantised in many pieces has the same bits as one dequantised at once."""
    directory, meant = stored
    monkeypatch.setattr(quantised, "CHUNK", 40)
    monkeypatch.setattr(quantised, "ALIGNED", 3)
    found = open_checkpoint(directory, torch.float32)
    for name in filter(files.linear, meant):
        assert torch.equal(found.read(name), meant[name]), name
        assert torch.equal(found.read(name, 0, 5, 31), meant[name][5:31]), name


def test_without_asking_nothing_is_dequantised(stored):
    """Without dequantize the stored tensors are returned unchanged; code that needs weights refuses them (test_coverage.py)."""
    directory, _ = stored
    assert not isinstance(open_checkpoint(directory), Dequantised)
    assert open_checkpoint(directory).entries.keys() == Checkpoint(directory).entries.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_input_scale_is_no_weight(plain, tmp_path, dtype):
    """Scales of activations are not needed for plain weights: they are accounted for, and not returned."""
    files.write(plain, tmp_path / "model", "fp8_tensor")
    assert "model.layers.0.mlp.up_proj.input_scale" in Checkpoint(tmp_path / "model").entries
    assert not [name for name in open_checkpoint(tmp_path / "model", dtype).entries if name.endswith("_scale")]


def save(directory: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    directory.mkdir(exist_ok=True, parents=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    files.set_config(directory, quantization_config=config)
    return directory


def check(directory: Path, meant: torch.Tensor, box: list[tuple[int, int]], name: str = "x.weight") -> None:
    """Compares the whole tensor, and a slice along each dim, bit for bit."""
    found = open_checkpoint(directory, torch.float32)
    assert torch.equal(found.read(name), meant)
    for axis, (start, stop) in enumerate(box):
        assert torch.equal(found.read(name, axis, start, stop), meant.narrow(axis, start, stop - start)), (axis, box)


def cuts(draw, *sizes: int) -> list[tuple[int, int]]:
    found = [sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in sizes]
    return [(start, stop) for start, stop in found]


FEW = settings(max_examples=25, deadline=None, derandomize=True)


@FEW
@given(data=st.data())
def test_fp8_of_any_shape_and_block(tmp_path_factory, data):
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    block = (data.draw(st.integers(1, 17)), data.draw(st.integers(1, 17)))
    stored, meant = files.fp8_block("x.weight", torch.randn(rows, columns), block)
    folder = save(tmp_path_factory.mktemp("x"), stored, quant_method="fp8", weight_block_size=list(block))
    check(folder, meant, cuts(data.draw, rows, columns))


@FEW
@given(data=st.data())
def test_mxfp4_of_any_shape(tmp_path_factory, data):
    shape = (data.draw(st.integers(1, 3)), 32 * data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20)))
    stored, meant = files.mxfp4("x", torch.randn(shape))
    folder = save(tmp_path_factory.mktemp("x"), stored, quant_method="mxfp4")
    check(folder, meant, cuts(data.draw, *shape), "x")


@FEW
@given(data=st.data())
def test_gptq_of_any_shape(tmp_path_factory, data):
    bits, group = data.draw(st.sampled_from((2, 4, 8))), data.draw(st.integers(1, 50))
    rows, inputs = 16 * data.draw(st.integers(1, 2)), 16 * data.draw(st.integers(1, 3))
    order, v2, sym = (data.draw(st.booleans()) for _ in range(3))
    stored, meant = files.gptq(
        "x.weight", torch.randn(rows, inputs), bits=bits, group=group, act_order=order, v2=v2, sym=sym
    )
    folder = save(
        tmp_path_factory.mktemp("x"),
        stored,
        quant_method="gptq",
        bits=bits,
        group_size=group,
        sym=sym,
        desc_act=order,
        checkpoint_format="gptq_v2" if v2 else "gptq",
    )
    check(folder, meant, cuts(data.draw, rows, inputs))


@FEW
@given(data=st.data())
def test_awq_of_any_shape(tmp_path_factory, data):
    group = data.draw(st.integers(1, 20))
    rows, inputs = 8 * data.draw(st.integers(1, 4)), group * data.draw(st.integers(1, 4))
    stored, meant = files.awq("x.weight", torch.randn(rows, inputs), group=group)
    folder = save(tmp_path_factory.mktemp("x"), stored, quant_method="awq", bits=4, group_size=group)
    check(folder, meant, cuts(data.draw, rows, inputs))


@FEW
@given(data=st.data())
def test_four_bits_of_any_shape(tmp_path_factory, data):
    """Blocks end inside rows, and one byte can belong to two rows."""
    shape = (data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20)))
    stored, meant = files.four_bit(
        "x.weight",
        torch.randn(shape),
        kind=data.draw(st.sampled_from(("nf4", "fp4"))),
        block=data.draw(st.integers(2, 64)),
        nested=data.draw(st.one_of(st.none(), st.integers(1, 9))),
    )
    check(save(tmp_path_factory.mktemp("x"), stored, quant_method="bitsandbytes"), meant, cuts(data.draw, *shape))


@pytest.mark.parametrize(
    ("make", "config", "shape", "axis", "span"),
    [
        (files.fp8_block, dict(quant_method="fp8", weight_block_size=[16, 24]), (64, 96), 0, (16, 48)),
        (files.fp8_block, dict(quant_method="fp8", weight_block_size=[16, 24]), (64, 96), 1, (24, 72)),
        (files.mxfp4, dict(quant_method="mxfp4"), (4, 64, 8), 0, (1, 3)),
        (files.mxfp4, dict(quant_method="mxfp4"), (4, 64, 8), 1, (32, 64)),
        (files.mxfp4, dict(quant_method="mxfp4"), (4, 64, 8), 2, (2, 5)),
        (files.gptq, dict(quant_method="gptq", bits=4, group_size=16, desc_act=False), (64, 32), 0, (16, 40)),
        (files.awq, dict(quant_method="awq", bits=4, group_size=16), (64, 64), 0, (16, 40)),
        (files.awq, dict(quant_method="awq", bits=4, group_size=16), (64, 64), 1, (16, 48)),
        (files.four_bit, dict(quant_method="bitsandbytes"), (8, 64), 0, (2, 5)),
    ],
)  # fmt: skip
def test_a_slice_needs_its_own_blocks_only(tmp_path, make, config, shape, axis, span):
    """A slice reads only its share: of every stored tensor that is sliced, exactly the fraction."""
    name = "x" if config["quant_method"] == "mxfp4" else "x.weight"
    stored, meant = make(name, torch.randn(shape))
    found = open_checkpoint(save(tmp_path / "x", stored, **config), torch.float32)
    read: dict[str, int] = {}
    plain = found.stored.read

    def counted(part, *given):
        value = plain(part, *given)
        read[part] = value.numel()
        return value

    found.stored.read = counted
    assert torch.equal(found.read(name, axis, *span), meant.narrow(axis, span[0], span[1] - span[0]))
    whole = {part: value.numel() for part, value in stored.items()}
    share = (span[1] - span[0]) / shape[axis]
    constant = {"x.weight.quant_map", *([] if axis else ["x.g_idx"])}
    assert {part: count / whole[part] for part, count in read.items() if part not in constant} == {
        part: share for part in read if part not in constant
    }
    assert len(read.keys() - constant) >= 2


def test_one_of_a_stack_is_read_alone(tmp_path):
    """X[e], one expert of a stacked tensor as rules write it, whole and sliced."""
    stored, meant = files.mxfp4("x", torch.randn(3, 64, 10))
    found = open_checkpoint(save(tmp_path / "x", stored, quant_method="mxfp4"), torch.float32)
    assert found.shape("x[1]") == (64, 10) and found.shape("x") == (3, 64, 10)
    for expert in range(3):
        assert torch.equal(found.read(f"x[{expert}]"), meant[expert])
        assert torch.equal(found.read(f"x[{expert}]", 0, 17, 50), meant[expert, 17:50])
        assert torch.equal(found.read(f"x[{expert}]", 1, 3), meant[expert, :, 3:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_into_memory_of_any_form(stored, dtype):
    """Targets with strides, other shapes and other dtypes, rounded as the entry's dtype requires; plain tensors too."""
    directory, _meant = stored
    found = open_checkpoint(directory, torch.bfloat16)
    for name in ("model.layers.0.mlp.down_proj.weight", "model.norm.weight"):
        value = found.read(name)
        assert value.dtype == (torch.bfloat16 if files.linear(name) else torch.float32)
        half = value.shape[0] // 2
        want = value[half:].to(dtype)
        wide = torch.zeros(2 * len(want), *want.shape[1:], dtype=dtype)
        for target in (torch.zeros_like(want), torch.zeros(want.numel(), dtype=dtype), wide[::2]):
            found.read_into(target, name, 0, half)
            assert torch.equal(target.reshape(want.shape), want)
        assert not wide[1::2].any()
        flat = torch.zeros(want.numel(), 2, dtype=dtype)[:, 0]
        found.read_into(flat, name, 0, half)
        assert torch.equal(flat, want.flatten())


def test_plain_files_of_quantised_ones(stored, tmp_path):
    """Every tensor has the dequantised numbers, config.json has no quantisation, and a dry run accepts the model."""
    directory, meant = stored
    assert api.plan(source=str(directory), dequantize=True).source_bytes
    api.convert(source=str(directory), to="hf", output=str(tmp_path / "out"), dtype="float32", dequantize=True)
    found = Checkpoint(tmp_path / "out")
    assert found.entries.keys() == meant.keys()
    assert all(torch.equal(found.read(name), value.float()) for name, value in meant.items())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    with pytest.raises(UserError, match="--dequantize true"):
        api.convert(source=str(directory), to="hf", output=str(tmp_path / "other"))
