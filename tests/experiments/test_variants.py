"""Data sets made from others: what is made of them is what they say."""

import torch

from kronfisher.experiments.data import Dataset, variants


def images(name, data_dir=None):
    random = torch.Generator().manual_seed(0)
    parts = []
    for number in (30, 20):
        parts += [torch.rand(number, 1, 28, 28, generator=random), torch.randint(10, (number,), generator=random)]
    return Dataset("mnist", *parts, task="classes", outputs=10)


def test_ink_is_counted_in_blocks(monkeypatch):
    monkeypatch.setattr(variants, "mnist", images)
    dataset, source = variants.ink(), images("mnist").train_inputs[:, 0] > 0.5
    assert dataset.train_inputs.shape == (30, 448) and dataset.train_targets.shape == (30, 21)
    assert dataset.train_targets[5, 8] == source[5, 20:24, 4:8].sum()  # the second row of blocks, the second block
    assert type(dataset.likelihood).__name__ == "Poisson"


def test_categories_are_quantiles_of_the_training_part(monkeypatch):
    table = torch.randn(640, 9)
    target = table[:, :1].exp()
    source = Dataset("protein", table, target, table[:50] + 100, target[:50], "values", 1)
    monkeypatch.setattr(variants, "uci", lambda name, data_dir: source)
    dataset = variants.binned()
    for column in dataset.train_inputs.T:
        assert column.bincount().tolist() == [20] * 32
    assert (dataset.test_inputs == 31).all() and dataset.train_targets.bincount().tolist() == [64] * 10
    order = table[:, 0].argsort()
    assert (dataset.train_targets[order].diff() >= 0).all()


def test_scenes_label_the_pixels_of_digits(monkeypatch):
    monkeypatch.setattr(variants, "mnist", images)
    dataset = variants.scenes(train_size=6, test_size=3)
    assert dataset.train_inputs.shape == (6, 1, 40, 40) and dataset.test_targets.shape == (3, 40, 40)
    labels = dataset.train_targets
    assert labels.min() == 0 and labels.max() <= 10 and all(len(scene.unique()) <= 3 for scene in labels)
    bright, dark = dataset.train_inputs[:, 0][labels > 0].mean(), dataset.train_inputs[:, 0][labels == 0].mean()
    assert bright > dark + 0.3


def test_text_is_cut_into_pieces_with_what_follows(monkeypatch):
    text = "to be, or not\nto be é " * 100
    monkeypatch.setattr(variants, "shakespeare_text", lambda data_dir: text)
    letters = variants.letters(length=7)
    inputs = torch.cat([letters.train_inputs, letters.test_inputs]).flatten()
    targets = torch.cat([letters.train_targets, letters.test_targets]).flatten()
    assert torch.equal(inputs[1:], targets[:-1])
    assert bytes(inputs[:14].tolist()).decode() == text[:14] and 0 in inputs  # é is not ASCII
    words = variants.words(length=5, vocabulary=4)
    inputs = torch.cat([words.train_inputs, words.test_inputs]).flatten()
    assert words.outputs == 4 and inputs.unique().tolist() == [0, 1, 2, 3]
    frequent = (inputs[:9] > 0).tolist()  # to be , or not ⏎ to be é: the two that come twice, and another one
    assert frequent[:2] == frequent[6:8] == [True, True] and sum(frequent) == 5


def test_descriptions_are_text():
    dataset = variants.descriptions()
    text = bytes(dataset.train_inputs.flatten().tolist()).decode()
    assert "breast" in text.lower() and dataset.outputs == 128


def test_a_photograph_is_split_like_a_chess_board(monkeypatch):
    image = torch.rand(1, 64, 64)
    monkeypatch.setattr(variants, "photographs", lambda data_dir: image)
    dataset = variants.pixels()
    assert len(dataset.train_inputs) == len(dataset.test_inputs) == 2048
    places = torch.cat([dataset.train_inputs, dataset.test_inputs])
    assert len(places.unique(dim=0)) == 4096
    where = ((dataset.train_inputs + 1) * 31.5).round().long()
    assert (where.sum(1) % 2 == 0).all()
    values, found = image[0][where[:, 0], where[:, 1]], dataset.train_targets[:, 0]
    assert torch.allclose((values - values.mean()) / values.std(), found, atol=1e-5)
