"""FACES: 25×25 images made from the 400 Olivetti faces, the third classic auto-encoder problem."""

from math import pi
from pathlib import Path

import torch
from torch import Tensor

from kronfisher.errors import DataError
from kronfisher.experiments.data.dataset import Dataset, generator
from kronfisher.experiments.data.files import locate
from kronfisher.experiments.data.registry import register

SOURCE, SIDE = 64, 25
TRAIN_PEOPLE, TEST_PEOPLE, PER_PERSON = 25, 10, 10
ORIGIN = (
    "olivettifaces.mat, the Olivetti faces of AT&T Laboratories Cambridge as Sam Roweis published them "
    "(https://cs.nyu.edu/~roweis/data.html)"
)


@register("faces")
def faces(
    data_dir: str | Path | None = None, seed: int = 0, train_size: int = 103_500, test_size: int = 41_400
) -> Dataset:
    """Flattened images ``[N, 625]`` that are their own targets (values): 25 people to train on, 10 others to test.

    Every original is used equally often, each time turned by up to 90° either way, enlarged 1.4 to 1.8 times, cropped
    off-centre and subsampled to 25×25. The pixels of an image have mean zero, and one scale for all gives the training
    pixels unit variance.

    Args:
        data_dir: the folder of all data sets (default: KRONFISHER_DATA), with ``faces/olivettifaces.mat``.
        seed: of the transformations.
        train_size: images to train on; 103,500 are 414 of each original.
        test_size: images to test on.

    Raises:
        FileNotFoundError: the file is missing; the message says whose it is.
        DataError: the file is not what its name says.
    """
    images = photographs(data_dir)
    last = PER_PERSON * TRAIN_PEOPLE
    train = _transform(images[:last], train_size, generator(seed, 1))
    test = _transform(images[last : last + PER_PERSON * TEST_PEOPLE], test_size, generator(seed, 2))
    scale = train.square().mean().sqrt()
    train, test = train / scale, test / scale
    return Dataset("faces", train, train, test, test, "values", SIDE * SIDE)


def photographs(data_dir: str | Path | None = None) -> Tensor:
    """The Olivetti faces ``[400, 64, 64]`` in [0, 1], ten of each person; errors as those of `faces`."""
    path = locate(data_dir, "faces/olivettifaces.mat", ORIGIN)
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError('reading a MATLAB file needs scipy: pip install "kronfisher[experiments]"') from error
    pixels = loadmat(path).get("faces")
    people = TRAIN_PEOPLE + TEST_PEOPLE
    if pixels is None or pixels.shape[0] != SOURCE * SOURCE or pixels.shape[1] < PER_PERSON * people:
        raise DataError(f"{path} has no variable 'faces' of 4096 rows and at least {PER_PERSON * people} columns")
    # A column is one image in column-major order, so the transposed reading has x before y.
    return torch.from_numpy(pixels.astype("float32")).T.reshape(-1, SOURCE, SOURCE).mT.div(255)


def _transform(images: Tensor, number: int, random: torch.Generator, chunk: int = 10_000) -> Tensor:
    """`number` flattened images ``[number, 625]``, centred one by one; the originals take turns."""
    out = torch.empty(number, SIDE * SIDE)
    pixels = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1  # the centres of the new pixels within the crop [-1, 1]²
    grid = torch.stack(torch.meshgrid(pixels, pixels, indexing="xy"), dim=-1).reshape(1, -1, 2)
    for start in range(0, number, chunk):
        source = images[torch.arange(start, min(start + chunk, number)) % len(images)].unsqueeze(1)
        angle, zoom, shift = torch.rand(4, len(source), 1, generator=random).split((1, 1, 2))
        angle, crop = (angle[0] - 0.5) * pi, 1 / (1.4 + 0.4 * zoom[0])
        # The crop's centre moves at most a quarter of the way to the border, so that the face stays in sight.
        shift = (shift - 0.5) * (1 - crop) * 0.5
        x, y = (grid * crop[:, None]).unbind(-1)
        x, y = x * angle.cos() - y * angle.sin() + shift[0], x * angle.sin() + y * angle.cos() + shift[1]
        where = torch.stack([x, y], dim=-1).reshape(-1, SIDE, SIDE, 2)
        made = torch.nn.functional.grid_sample(source, where, padding_mode="border", align_corners=False)
        out[start : start + chunk] = made.flatten(1)
    return out - out.mean(1, keepdim=True)
