"""Data sets: shapes, statistics, splits, seeds, and what is said when a file is missing or damaged."""

import gzip

import numpy as np
import pytest
import torch

from kronfisher.errors import DataError
from kronfisher.experiments import data, networks
from kronfisher.likelihoods import Bernoulli, Categorical, Gaussian
from tests.helpers.command_line import run


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    raw = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.fixture
def idx_dir(tmp_path):
    """Tiny MNIST files, the training part compressed."""
    random, folder = np.random.default_rng(0), tmp_path / "mnist"
    folder.mkdir()
    for part, number, suffix in (("train", 7, ".gz"), ("t10k", 3, "")):
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", random.integers(0, 256, (number, 28, 28)))
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", np.arange(number))
    return tmp_path


@pytest.fixture
def uci_dir(tmp_path):
    """A tiny "yacht": the target is the middle column, one feature is constant, two splits."""
    folder = tmp_path / "uci" / "UCI_Datasets" / "yacht" / "data"
    folder.mkdir(parents=True)
    table = np.random.default_rng(0).normal(3.0, 2.0, (10, 4))
    table[:, 3] = 288.0
    np.savetxt(folder / "data.txt.gz", table)
    np.savetxt(folder / "index_features.txt", [0, 1, 3])
    np.savetxt(folder / "index_target.txt", [2])
    np.savetxt(folder / "n_splits.txt", [2])
    for split, test in enumerate(([1, 4], [0, 9])):
        np.savetxt(folder / f"index_test_{split}.txt", test)
        np.savetxt(folder / f"index_train_{split}.txt.gz", np.setdiff1d(np.arange(10), test))
    return tmp_path, table


@pytest.fixture
def faces_dir(tmp_path):
    """350 'faces': image k is k plus a ramp from left to right, so that orientation and person can be read off."""
    from scipy.io import savemat

    (tmp_path / "faces").mkdir()
    ramp = np.tile(np.arange(64), (64, 1)) * 2  # [row, column]
    columns = np.stack([(ramp + k // 10).flatten(order="F") for k in range(350)], axis=1)
    savemat(tmp_path / "faces" / "olivettifaces.mat", {"faces": columns.astype(np.uint8)})
    return tmp_path


def test_digits():
    digits = data.load("digits", seed=1)
    assert digits.train_inputs.shape == (1500, 1, 8, 8) and digits.test_inputs.shape == (297, 1, 8, 8)
    assert (
        digits.train_inputs.dtype == torch.float32 and digits.train_inputs.max() == 1 and digits.train_inputs.min() == 0
    )
    assert digits.train_targets.dtype == torch.int64 and digits.train_targets.unique().tolist() == list(range(10))
    assert digits.outputs == 10 and isinstance(digits.likelihood, Categorical)
    other = data.load("digits", seed=2)
    assert not torch.equal(digits.train_inputs, other.train_inputs)
    everything = [torch.cat([d.train_inputs, d.test_inputs]).flatten(1).sum(1).sort().values for d in (digits, other)]
    assert torch.equal(*everything)  # the same digits, split otherwise
    assert torch.equal(data.load("digits", seed=1).test_targets, digits.test_targets)


def test_loading_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    data.load("digits"), data.load("curves", train_size=5, test_size=5)
    assert torch.equal(before, torch.get_rng_state())


def test_curves():
    curves = data.load("curves", train_size=500, test_size=100)
    images = curves.train_inputs.reshape(-1, 28, 28)
    assert images.dtype == torch.float32 and curves.test_inputs.shape == (100, 784)
    assert torch.equal(curves.train_targets, curves.train_inputs) and isinstance(curves.likelihood, Bernoulli)
    assert images.min() >= 0 and images.max() <= 1
    assert images.amax((1, 2)).median() > 0.9  # strokes are dark
    border = torch.cat([images[:, [0, -1]].flatten(1), images[:, :, [0, -1]].flatten(1)], dim=1)
    assert border.max() < 0.6 and border.mean() < 0.01  # and inside the image
    assert (images.mean((1, 2)) > 0.001).all()  # none is empty
    assert 0.02 < images.mean() < 0.15


def test_curves_depend_on_the_seed_only():
    small = data.load("curves", train_size=30, test_size=20)
    assert torch.equal(small.train_inputs, data.load("curves", train_size=30, test_size=20).train_inputs)
    assert torch.equal(small.test_inputs, data.load("curves", train_size=5, test_size=20).test_inputs)
    assert not torch.equal(small.train_inputs, data.load("curves", train_size=30, test_size=0, seed=1).train_inputs)
    assert not torch.equal(small.train_inputs[:20], small.test_inputs)


def test_a_curve_goes_through_its_points():
    from kronfisher.experiments.data.curves import MARGIN, draw

    seed = 5
    points = torch.rand(1, 3, 2, generator=torch.Generator().manual_seed(seed)) * (27 - 2 * MARGIN) + MARGIN
    image = draw(1, torch.Generator().manual_seed(seed)).reshape(28, 28)
    for x, y in points[0].round().int().tolist():
        assert image[y, x] > 0.4


def test_mnist(idx_dir):
    mnist = data.load("mnist", data_dir=idx_dir)
    assert mnist.train_inputs.shape == (7, 1, 28, 28) and mnist.test_inputs.shape == (3, 1, 28, 28)
    assert mnist.train_targets.tolist() == list(range(7)) and mnist.train_targets.dtype == torch.int64
    first = np.random.default_rng(0).integers(0, 256, (7, 28, 28))
    assert torch.equal(mnist.train_inputs[:, 0], torch.from_numpy(first).float() / 255)
    assert len(data.load("mnist", data_dir=idx_dir, train_size=4, test_size=1).train_inputs) == 4


def test_data_dir_comes_from_the_environment(idx_dir, monkeypatch):
    monkeypatch.setenv("KRONFISHER_DATA", str(idx_dir))
    assert len(data.load("mnist").train_inputs) == 7


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "faces", "yacht"])
def test_missing_files_are_named_with_their_origin(name, tmp_path, monkeypatch):
    origin = {"mnist": "LeCun", "fashion-mnist": "Zalando", "faces": "Olivetti", "yacht": "Gal and Ghahramani"}[name]
    with pytest.raises(
        FileNotFoundError, match=rf"{tmp_path}.*{origin}.*https://.*--data-dir.*KRONFISHER_DATA"
    ) as caught:
        data.load(name, data_dir=tmp_path)
    assert "idx3" in str(caught.value) or ".mat" in str(caught.value) or "n_splits" in str(caught.value)
    monkeypatch.delenv("KRONFISHER_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=rf"--data-dir.*KRONFISHER_DATA.*{origin}.*https://"):
        data.load(name)


def test_damaged_idx_files(idx_dir):
    images, labels = idx_dir / "mnist" / "train-images-idx3-ubyte.gz", idx_dir / "mnist" / "train-labels-idx1-ubyte.gz"
    whole = images.read_bytes()
    images.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"train-images.*decompressed"):
        data.load("mnist", data_dir=idx_dir)
    images.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    with pytest.raises(DataError, match="5487 values where its header says 5488"):
        data.load("mnist", data_dir=idx_dir)
    images.write_bytes(labels.read_bytes())
    with pytest.raises(DataError, match="not an idx file of unsigned bytes with 3 dimensions"):
        data.load("mnist", data_dir=idx_dir)
    images.write_bytes(whole)
    write_idx(labels, np.arange(6))
    with pytest.raises(DataError, match="7 train images and 6 labels"):
        data.load("mnist", data_dir=idx_dir)


@pytest.mark.parametrize("split", [0, 1])
def test_uci(uci_dir, split):
    folder, table = uci_dir
    yacht = data.load("yacht", data_dir=folder, split=split)
    test = ([1, 4], [0, 9])[split]
    train = np.setdiff1d(np.arange(10), test)
    assert yacht.train_inputs.shape == (8, 3) and yacht.test_targets.shape == (2, 1)
    assert isinstance(yacht.likelihood, Gaussian) and yacht.outputs == 1
    expected = (table[:, 2] - table[train, 2].mean()) / table[train, 2].std()
    assert torch.allclose(yacht.train_targets[:, 0], torch.from_numpy(expected[train]).float(), atol=1e-6)
    assert torch.allclose(yacht.test_targets[:, 0], torch.from_numpy(expected[test]).float(), atol=1e-6)
    assert torch.allclose(yacht.train_inputs[:, :2].std(0, correction=0), torch.ones(2))
    assert (yacht.train_inputs[:, 2] == 0).all()  # constant: centred, not blown up


def test_the_order_of_concrete_is_drawn_as_by_kronfluence(uci_dir):
    folder, table = uci_dir
    (folder / "uci" / "UCI_Datasets" / "yacht").rename(folder / "uci" / "UCI_Datasets" / "concrete")
    found = data.load("concrete-shuffled", data_dir=folder)
    order = np.random.RandomState(0).choice(np.arange(10), 10, replace=False)
    expected = (table[:, 2] - table[order[:9], 2].mean()) / table[order[:9], 2].std()
    torch.testing.assert_close(found.train_targets[:, 0].numpy(), expected[order[:9]].astype(np.float32))
    torch.testing.assert_close(found.test_targets[:, 0].numpy(), expected[order[9:]].astype(np.float32))
    assert found.train_inputs.shape == (9, 3) and found.input_shape == (3,)


def test_damaged_uci_files(uci_dir):
    folder, _ = uci_dir
    with pytest.raises(ValueError, match="splits 0 to 1, not 2"):
        data.load("yacht", data_dir=folder, split=2)
    tables = folder / "uci" / "UCI_Datasets" / "yacht" / "data"
    np.savetxt(tables / "index_test_0.txt", [3, 10])
    with pytest.raises(DataError, match="index_test_0 goes beyond the 10 rows"):
        data.load("yacht", data_dir=folder)
    (tables / "index_test_0.txt").write_text("not a number\n")
    with pytest.raises(DataError, match=r"index_test_0.txt is not a table of numbers"):
        data.load("yacht", data_dir=folder)


def test_faces(faces_dir):
    faces = data.load("faces", data_dir=faces_dir, train_size=500, test_size=100)
    assert faces.train_inputs.shape == (500, 625) and faces.test_inputs.shape == (100, 625)
    assert isinstance(faces.likelihood, Gaussian) and torch.equal(faces.train_targets, faces.train_inputs)
    assert faces.train_inputs.mean(1).abs().max() < 1e-5
    assert faces.train_inputs.square().mean().item() == pytest.approx(1, rel=1e-5)
    again = data.load("faces", data_dir=faces_dir, train_size=500, test_size=100)
    assert torch.equal(faces.train_inputs, again.train_inputs)
    other = data.load("faces", data_dir=faces_dir, train_size=500, test_size=100, seed=1)
    assert not torch.equal(faces.train_inputs, other.train_inputs)


def test_faces_are_turned_and_enlarged_as_published(faces_dir):
    from kronfisher.experiments.data import faces as module

    originals = module.photographs(faces_dir)
    assert torch.allclose(originals[20] * 255, 2.0 + 2 * torch.arange(64.0).expand(64, 64))  # rows are rows
    images = module._transform(originals, 700, torch.Generator().manual_seed(0)).reshape(-1, 25, 25)
    # The ramp rises 2/255 a pixel along x; a 25-pixel crop of 64/zoom pixels turned by φ shows its gradient.
    along_x = (images[:, :, -1] - images[:, :, 0]).mean(1) / 24
    along_y = (images[:, -1] - images[:, 0]).mean(1) / 24
    zoom = 64 / 25 * 2 / 255 / torch.hypot(along_x, along_y)
    angle = torch.atan2(along_y, along_x)
    assert 1.35 < zoom.min() < 1.45 and 1.75 < zoom.max() < 1.9
    assert -torch.pi / 2 - 0.05 < angle.min() < -1.4 and 1.4 < angle.max() < torch.pi / 2 + 0.05


def test_faces_of_test_people_are_others(faces_dir, monkeypatch):
    from kronfisher.experiments.data import faces as module

    seen = []
    original, module._transform = (
        module._transform,
        lambda images, number, random: seen.append(images) or torch.ones(2, 625),
    )
    try:
        data.load("faces", data_dir=faces_dir, train_size=2, test_size=2)
    finally:
        module._transform = original
    people = [set((images[:, 0, 0] * 255).round().int().tolist()) for images in seen]
    assert people == [set(range(25)), set(range(25, 35))]


def test_a_matlab_file_of_something_else(faces_dir):
    from scipy.io import savemat

    savemat(faces_dir / "faces" / "olivettifaces.mat", {"faces": np.zeros((10, 10))})
    with pytest.raises(DataError, match="4096 rows"):
        data.load("faces", data_dir=faces_dir)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"no data set 'cifar'.*digits.*yacht"):
        data.load("cifar")


def test_batches_are_views_in_order():
    digits = data.load("digits")
    batches = digits.batches(64, limit=150)
    assert [len(y) for _, y in batches] == [64, 64, 22]
    assert torch.equal(torch.cat([x for x, _ in batches]), digits.train_inputs[:150])
    assert batches[0][0].data_ptr() == digits.train_inputs.data_ptr()
    assert sum(len(y) for _, y in digits.batches(100, test=True)) == 297


def test_reconstruction_chooses_its_likelihood(uci_dir):
    digits = data.load("digits").reconstruction()
    assert digits.train_inputs.shape == (1500, 64) and isinstance(digits.likelihood, Bernoulli)
    yacht = data.load("yacht", data_dir=uci_dir[0]).reconstruction()
    assert isinstance(yacht.likelihood, Gaussian) and yacht.outputs == 3


@pytest.fixture
def text_dir(tmp_path):
    (tmp_path / "shakespeare").mkdir()
    (tmp_path / "shakespeare" / "input.txt").write_text("abcd\né" * 120)
    return tmp_path


def test_text_is_in_pieces_with_the_next_character_as_target(text_dir):
    text = data.load("shakespeare", data_dir=text_dir)
    assert text.text and text.outputs == 6 and text.task == "classes" and not data.load("digits").text
    inputs = torch.cat([text.train_inputs, text.test_inputs]).flatten()
    targets = torch.cat([text.train_targets, text.test_targets]).flatten()
    truth = ["\nabcdé".index(character) for character in "abcd\né" * 120]
    assert inputs.tolist() == truth[: len(inputs)] and targets.tolist() == truth[1 : len(inputs) + 1]
    assert text.train_inputs.shape == (20, 32) and text.test_inputs.shape == (2, 32)


@pytest.mark.parametrize(
    ("content", "message"), [(b"\xff\xfe" * 400, "is not UTF-8 text"), (b"too short", "needs more than 320")]
)
def test_text_that_is_damaged(text_dir, content, message):
    (text_dir / "shakespeare" / "input.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        data.load("shakespeare", data_dir=text_dir)


def test_text_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"shakespeare/input\.txt.*char-rnn"):
        data.load("shakespeare", data_dir=tmp_path)


@pytest.fixture
def parity(monkeypatch):
    """A data set of somebody else's, and a network for it."""
    monkeypatch.setattr(data.registry, "LOADERS", dict(data.registry.LOADERS))
    monkeypatch.setattr(networks.registry, "NETWORKS", dict(networks.registry.NETWORKS))

    @data.register("parity", "majority")
    def bits(name, seed=0, train_size=80):
        inputs = torch.randint(2, (train_size + 40, 8), generator=torch.Generator().manual_seed(seed))
        targets = inputs.sum(1) % 2 if name == "parity" else (inputs.sum(1) > 4).long()
        parts = inputs.float().split((train_size, 40)), targets.split((train_size, 40))
        return data.Dataset(name, parts[0][0], parts[1][0], parts[0][1], parts[1][1], "classes", 2)

    @networks.register("perceptron")
    def perceptron(dataset, seed):
        return networks.mlp(8, (), dataset.outputs, seed=seed)


def test_a_registered_data_set_is_loaded_by_its_name(parity):
    loaded = data.load("majority", train_size=50, test_size=30, seed=3, split=1)
    assert loaded.name == "majority" and len(loaded.train_inputs) == 50 and len(loaded.test_inputs) == 30
    assert data.names()[-2:] == ("parity", "majority")
    with pytest.raises(ValueError, match="already a data set 'parity'"):
        data.register("parity")(lambda: loaded)
    with pytest.raises(ValueError, match=r"train_size.*'new' asks for path"):
        data.register("new")(lambda path: loaded)
    with pytest.raises(ValueError, match="already a network 'mlp'"):
        networks.register("mlp")(networks.mlp)


def test_a_registered_data_set_and_network_are_options_of_the_command_line(parity, capsys):
    options = ("--data", "parity", "--network", "perceptron", "--fits", "kfac", "--limit", "40", "--epochs", "1")
    code, out, err = run(capsys, "compare", *options)
    assert code == 0 and "parity: 80 examples to train on, 40 to test" in err and "perceptron on parity" in out
    code, out, _ = run(capsys, "compare", "--help")
    assert "parity" in out and "perceptron" in out


def test_every_data_set_and_network_of_the_package_is_registered():
    assert {"digits", "curves", "mnist", "fashion-mnist", "faces", "shakespeare", "yacht"} <= set(data.names())
    assert {"mlp", "autoencoder", "convnet", "lenet5", "alexnet", "resnet", "vit", "gpt"} == set(networks.names())
