"""Data sets made from others, for tasks of more kinds: counts, categories, scenes, words, coordinates."""

import re
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from kronfisher.experiments.data.dataset import Dataset, generator
from kronfisher.experiments.data.faces import photographs
from kronfisher.experiments.data.mnist import mnist
from kronfisher.experiments.data.shakespeare import shakespeare_text
from kronfisher.experiments.data.uci import uci

__all__ = ["binned", "descriptions", "ink", "letters", "pixels", "scenes", "words"]


def ink(data_dir: str | Path | None = None) -> Dataset:
    """The black pixels in each 4×4 block of the lower part of a digit ``[N, 21]``, from its upper part ``[N, 448]``."""
    digits = mnist("mnist", data_dir)
    parts = []
    for images in (digits.train_inputs, digits.test_inputs):
        black = (images[:, 0] > 0.5).float()
        counts = torch.nn.functional.avg_pool2d(black[:, None, 16:], 4, divisor_override=1)
        parts += [black[:, :16].flatten(1), counts.flatten(1)]
    return Dataset("ink", *parts, task="counts", outputs=21)


def binned(data_dir: str | Path | None = None, categories: int = 32, classes: int = 10) -> Dataset:
    """The protein table as categories: each feature by its quantiles ``[N, 9]`` (int64), the target's as the class."""
    table = uci("protein-tertiary-structure", data_dir)

    def codes(train: Tensor, test: Tensor, number: int) -> tuple[Tensor, Tensor]:
        edges = torch.quantile(train, torch.linspace(0, 1, number + 1)[1:-1])
        return torch.bucketize(train.contiguous(), edges), torch.bucketize(test.contiguous(), edges)

    columns = [
        codes(table.train_inputs[:, k], table.test_inputs[:, k], categories) for k in range(table.train_inputs.shape[1])
    ]
    train, test = (torch.stack(part, dim=1) for part in zip(*columns, strict=True))
    labels = codes(table.train_targets[:, 0], table.test_targets[:, 0], classes)
    return Dataset("binned", train, labels[0], test, labels[1], task="classes", outputs=classes)


def scenes(
    data_dir: str | Path | None = None, train_size: int = 6_000, test_size: int = 1_000, side: int = 40
) -> Dataset:
    """Noisy images ``[N, 1, side, side]`` with two digits; each pixel is of no digit (0) or of digit d (d + 1)."""
    digits = mnist("mnist", data_dir)

    def draw(images: Tensor, labels: Tensor, number: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        canvas, target = torch.zeros(number, side, side), torch.zeros(number, side, side, dtype=torch.long)
        chosen = torch.randint(len(images), (number, 2), generator=random)
        places = torch.randint(side - 27, (number, 2, 2), generator=random)
        for k in range(number):
            for index, (y, x) in zip(chosen[k].tolist(), places[k].tolist(), strict=True):
                image, where = images[index, 0], (k, slice(y, y + 28), slice(x, x + 28))
                canvas[where] = canvas[where].maximum(image)
                target[where] = torch.where(image > 0.3, labels[index] + 1, target[where])
        return canvas.unsqueeze(1) + 0.2 * torch.randn(number, 1, side, side, generator=random), target

    train = draw(digits.train_inputs, digits.train_targets, train_size, generator(0, 1))
    test = draw(digits.test_inputs, digits.test_targets, test_size, generator(0, 2))
    return Dataset("scenes", *train, *test, task="classes", outputs=11)


def letters(data_dir: str | Path | None = None, length: int = 64) -> Dataset:
    """Tiny Shakespeare in pieces of `length` ASCII characters ``[N, length]``, and the same one character later."""
    return _pieces("letters", _ascii(shakespeare_text(data_dir)), length, 128)


def words(data_dir: str | Path | None = None, length: int = 32, vocabulary: int = 1_024) -> Dataset:
    """Tiny Shakespeare in pieces of `length` words, signs and ends of lines; the rare ones are all one token."""
    tokens = re.findall(r"\w+|[^\w\s]|\n", shakespeare_text(data_dir))
    frequent = Counter(tokens).most_common(vocabulary - 1)
    number = {token: k for k, (token, _) in enumerate(sorted(frequent), start=1)}
    return _pieces("words", [number.get(token, 0) for token in tokens], length, vocabulary)


def descriptions(length: int = 64) -> Dataset:
    """The descriptions of scikit-learn's data sets as ASCII characters, cut as `letters`."""
    files = resources.files("sklearn.datasets.descr").iterdir()
    texts = [file.read_text() for file in sorted(files, key=lambda file: file.name) if file.name.endswith(".rst")]
    return _pieces("descriptions", _ascii("\n".join(texts)), length, 128)


def pixels(data_dir: str | Path | None = None) -> Dataset:
    """One photograph of a face: grey levels of unit variance ``[2048, 1]`` at places in [−1, 1]² ``[2048, 2]``.

    The black squares of a chess board of 64×64 pixels are to train on, the white ones to test on.
    """
    image = photographs(data_dir)[0]
    grid = torch.linspace(-1, 1, len(image))
    places = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), dim=-1).flatten(0, 1)
    values, black = (
        image.flatten(),
        torch.arange(image.numel()) % len(image) % 2 == torch.arange(image.numel()) // len(image) % 2,
    )
    values = ((values - values[black].mean()) / values[black].std()).unsqueeze(1)
    return Dataset("pixels", places[black], values[black], places[~black], values[~black], task="values", outputs=1)


def _ascii(text: str) -> list[int]:
    return [code if code < 128 else 0 for code in map(ord, text)]


def _pieces(name: str, tokens: Sequence[int], length: int, vocabulary: int) -> Dataset:
    """Pieces one after another, the last tenth to test on."""
    whole, number = torch.tensor(tokens), (len(tokens) - 1) // length
    inputs, targets = (whole[k : k + number * length].view(number, length) for k in (0, 1))
    last = number - number // 10
    return Dataset(
        name, inputs[:last], targets[:last], inputs[last:], targets[last:], task="classes", outputs=vocabulary
    )
