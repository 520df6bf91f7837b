"""Files: what is written is read, and what does not fit is refused."""

import json
import os
from dataclasses import replace

import pytest
import torch

import kronfisher as kf
from kronfisher.errors import DataError
from kronfisher.fisher import Fisher, load, storage
from kronfisher.fisher.blocks import Block, Window
from kronfisher.fisher.info import Info
from kronfisher.operators import Diagonal
from tests.helpers.optional import require

safetensors = require("safetensors")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "fisher.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip(fisher, model, path, dtype):
    F = fisher[0].to(dtype=dtype)
    for G in (F, F + 0.25, (F * 3.0).inverse()):
        G.save(path)
        H = load(path, model)
        assert H.dtype == dtype and H.device.type == "cpu" and H.context is None
        for (_, restored), (_, saved) in zip(H.entries, G.entries, strict=True):
            assert all(torch.equal(restored.tensors()[key], tensor) for key, tensor in saved.tensors().items())
        torch.testing.assert_close(H.to_dense(), G.to_dense())
        assert H.info == G.info and H.shapes == G.shapes and H.names == G.names
        assert [o.structure for o in H.blocks.values()] == [o.structure for o in G.blocks.values()]
        assert list(H.blocks) == list(G.blocks) and [e[0] for e in H.entries] == [e[0] for e in G.entries]
        torch.testing.assert_close((H + 0.1).logdet(), (G + 0.1).logdet())
        assert (H + G).info.count == 20  # the blocks are the same
    assert os.listdir(path.parent) == [path.name]


def test_tensors_that_share_memory_are_saved(fisher, model, path):
    F = fisher[0]
    (F.inverse() + F.inverse()).save(path)
    doubled = F + F  # every tensor of a lazy sum occurs twice
    doubled.save(str(path))
    assert torch.equal(load(str(path), model).to_dense(), doubled.to_dense())


def test_one_number_of_any_stride_is_saved(path):
    """A single number that was expanded has stride zero, and counts as contiguous."""
    one = Diagonal(torch.tensor(2.0).expand(1))
    block = Block("w", "linear", Window.of("w", torch.zeros(1, 1, 1)))
    Fisher([(block, one)], {"w": (1, 1, 1)}, Info(count=1)).save(path)
    assert load(path).to_dense().item() == 2.0


def test_the_file_says_what_it_holds(fisher, path):
    fisher[0].save(path)
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["kronfisher"])
    assert header["format"] == storage.FORMAT and header["dtype"] == "torch.float64"
    assert header["shapes"]["conv.weight"] == [4, 2, 2, 1]
    assert header["info"]["count"] == 20 and header["info"]["reduction"] == "mean"
    assert header["info"]["labels"] == "sampled" and header["info"]["blocks"]["transposed"]["method"] == "KFAC()"
    assert {"vec", "kronecker", "scale"} <= header["conventions"].keys()
    assert [entry["operator"]["kind"] for entry in header["entries"]] == [
        "kronecker",
        "eigen",
        "diagonal",
        "dense",
        "total",
    ]


def test_another_model_is_refused(fisher, model, path):
    fisher[0].save(path)
    model.alone = torch.nn.Parameter(torch.zeros(6))
    del model.scale
    model.extra = torch.nn.Linear(1, 1)
    with pytest.raises(DataError) as error:
        load(path, model)
    message = str(error.value)
    assert "not in the model: scale" in message
    assert "alone (file [5], model [6])" in message
    assert "extra.weight, extra.bias" in message and "conv" not in message


def test_a_frozen_parameter_may_be_there(fisher, model, path):
    fisher[0].save(path)
    model.scale.requires_grad_(False)
    model.frozen = torch.nn.Parameter(torch.zeros(99), requires_grad=False)
    assert load(path, model).names == fisher[0].names


def test_damaged_and_foreign_files_are_refused(fisher, model, path, tmp_path):
    fisher[0].save(path)
    content = path.read_bytes()
    for broken in (content[:-1], content[: len(content) // 2], content[:4], b"", b"\xff" * 200, content + b"x"):
        path.write_bytes(broken)
        with pytest.raises(DataError, match="damaged"):
            load(path, model)
    safetensors.torch.save_file({"w": torch.ones(2)}, path)
    with pytest.raises(DataError, match="not one of kronfisher"):
        load(path, model)
    with pytest.raises(FileNotFoundError, match="missing"):
        load(tmp_path / "missing.safetensors", model)


def rewrite(path, change, earlier=True):
    """Change a file; an `earlier` version wrote no checksum."""
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["kronfisher"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if earlier:
        del header["checksum"], header["conventions"]["checksum"]
    change(header, tensors)
    safetensors.torch.save_file(tensors, path, metadata={"kronfisher": json.dumps(header)})


def test_unknown_formats_and_inconsistent_contents_are_refused(fisher, model, path):
    fisher[0].save(path)
    rewrite(path, lambda header, tensors: header.update(format=99))
    with pytest.raises(DataError, match="format 99"):
        load(path, model)
    fisher[0].save(path)
    rewrite(path, lambda header, tensors: header["entries"][0]["operator"].update(kind="unknown"))
    with pytest.raises(DataError, match=r"damaged.*unknown"):
        load(path, model)
    fisher[0].save(path)
    rewrite(path, lambda header, tensors: tensors.pop("0.A"))
    with pytest.raises(DataError, match="damaged"):
        load(path, model)


def test_an_interrupted_write_leaves_the_old_file(fisher, model, path, monkeypatch):
    F = fisher[0]
    F.save(path)
    old = path.read_bytes()

    def half(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise KeyboardInterrupt

    def never(source, target):
        raise KeyboardInterrupt

    for module, name, interrupted in ((safetensors.torch, "save_file", half), (os, "replace", never)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                (F + 1.0).save(path)
        assert path.read_bytes() == old and os.listdir(path.parent) == [path.name]
    assert torch.equal(load(path, model).to_dense(), F.to_dense())


def test_wrappers_around_the_model_do_not_matter(tmp_path):
    model = torch.nn.Linear(3, 2)
    fisher = kf.estimate(model, torch.randn(8, 3), kf.Gaussian(), labels="exact")
    fisher.save(tmp_path / "fisher")
    loaded = kf.load(tmp_path / "fisher", torch.nn.DataParallel(model))
    assert torch.equal(loaded.to_dense(), fisher.to_dense()) and loaded.names == ("weight", "bias")


def leaves(value, place=()):
    """Where the values of a header are that hold no others."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [leaf for key, one in inner for leaf in leaves(one, (*place, key))]
    return found or [place]


def replace_at(place, new):
    def change(header, tensors):
        for key in place[:-1]:
            header = header[key]
        header[place[-1]] = new(header[place[-1]])

    return change


def test_files_of_earlier_versions_are_read(fisher, model, path):
    fisher[0].save(path)
    rewrite(path, lambda header, tensors: None)
    assert torch.equal(load(path, model).to_dense(), fisher[0].to_dense())


def another(value):
    if isinstance(value, bool) or value is None:
        return 1 if not value else None
    return value + 1 if isinstance(value, int | float) else f"{value}x" if isinstance(value, str) else 7


def test_a_changed_header_is_refused(fisher, model, path):
    fisher[0].save(path)
    content = path.read_bytes()
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["kronfisher"])
    places = leaves(header)
    assert len(places) > 100
    for place in places:
        path.write_bytes(content)
        rewrite(path, replace_at(place, another), earlier=False)
        with pytest.raises(DataError):
            load(path, model)
    for gone in header:
        path.write_bytes(content)
        rewrite(path, lambda header, tensors, gone=gone: header.pop(gone), earlier=False)
        with pytest.raises(DataError):
            load(path, model)


def test_a_flipped_bit_of_any_tensor_is_refused(fisher, model, path):
    fisher[0].save(path)
    content = bytearray(path.read_bytes())
    with safetensors.safe_open(path, framework="pt") as file:
        names = list(file.keys())
    start = 8 + int.from_bytes(content[:8], "little")
    spans = json.loads(content[8:start])
    assert len(names) >= 7
    for name in names:
        low, high = spans[name]["data_offsets"]
        for place in (low, (low + high) // 2, high - 1):
            content[start + place] ^= 1
            path.write_bytes(content)
            with pytest.raises(DataError, match="checksum"):
                load(path, model)
            content[start + place] ^= 1
    path.write_bytes(content)
    assert torch.equal(load(path, model).to_dense(), fisher[0].to_dense())


def test_a_flipped_bit_that_leaves_all_values_as_they_were_is_refused(path):
    """Such as the last digit of a number that has more than a float, or an exponent's ``e``."""
    x = torch.randn(8, 3, dtype=torch.float64)
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    fisher = kf.estimate(model, x, kf.Gaussian(), labels="exact")
    (name, block), *_ = fisher.info.blocks.items()
    block = replace(block, error=0.035430483001618998, seconds=9.718399815028533e-05)
    info = replace(fisher.info, blocks={**fisher.info.blocks, name: block})
    Fisher(fisher.entries, fisher.shapes, info).save(path)
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")

    def value():
        try:
            header = json.loads(content[8:start])
            return header, json.loads(header.pop("__metadata__")["kronfisher"])
        except (ValueError, KeyError, TypeError):
            return None

    truth, same = value(), 0
    for place in range(8, start):
        for bit in range(8):
            content[place] ^= 1 << bit
            if value() == truth:
                same += 1
                path.write_bytes(content)
                with pytest.raises(DataError, match="checksum"):
                    load(path, model)
            content[place] ^= 1 << bit
    assert same >= 2
    path.write_bytes(content)
    assert load(path, model).info == info


@pytest.mark.parametrize("field", ["shape", "layout", "size", "stride", "offset"])
@pytest.mark.parametrize("new", [0, 1, 2, 3, 5, 1000, 2**62, -1, 0.5, None, "1", [], [[1]]])
def test_windows_without_a_checksum_never_reach_outside(fisher, model, path, field, new):
    fisher[0].save(path)
    content = path.read_bytes()
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["kronfisher"])
    truth = fisher[0].to_dense()
    places = [place for place in leaves(header["entries"]) if field in place and place[1] == "blocks"]
    assert places
    for place in places:
        path.write_bytes(content)
        rewrite(path, replace_at(("entries", *place), lambda old: new))
        try:
            loaded = load(path, model)
        except DataError:
            continue
        # Only what makes no difference is accepted: strides of axes of length one, and the value that was there.
        assert torch.equal(loaded.to_dense(), truth)
