"""MNIST and Fashion-MNIST, from the idx files as they were published."""

from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kronfisher.errors import DataError
from kronfisher.experiments.data.dataset import Dataset
from kronfisher.experiments.data.files import locate, read
from kronfisher.experiments.data.registry import register

ORIGINS = {
    "mnist": "one of the four idx files of MNIST by LeCun, Cortes and Burges (https://yann.lecun.com/exdb/mnist)",
    "fashion-mnist": "one of the four idx files of Fashion-MNIST by Zalando Research "
    "(https://github.com/zalandoresearch/fashion-mnist)",
}


@register(*ORIGINS)
def mnist(name: str = "mnist", data_dir: str | Path | None = None) -> Dataset:
    """Ten classes of ``[1, 28, 28]`` images in [0, 1]: 60,000 to train on and 10,000 to test, in the published order.

    Args:
        name: "mnist" or "fashion-mnist", also the folder with the four files.
        data_dir: the folder of all data sets (default: KRONFISHER_DATA).

    Raises:
        FileNotFoundError: a file is missing; the message says which, and whose it is.
        DataError: a file is not what its name says.
    """
    parts = []
    for part in ("train", "t10k"):
        images = _idx(locate(data_dir, f"{name}/{part}-images-idx3-ubyte", ORIGINS[name]), dimensions=3)
        labels = _idx(locate(data_dir, f"{name}/{part}-labels-idx1-ubyte", ORIGINS[name]), dimensions=1)
        if len(images) != len(labels):
            raise DataError(f"{name}: {len(images)} {part} images and {len(labels)} labels: fetch the files again")
        parts += [images.unsqueeze(1).float().div_(255), labels.long()]
    return Dataset(name, *parts, task="classes", outputs=10)


def _idx(path: Path, dimensions: int) -> Tensor:
    """An idx file: two zero bytes, the type (8: unsigned bytes), the rank, big-endian sizes, then the data."""
    raw = read(path)
    header = 4 + 4 * dimensions
    if len(raw) < header or raw[:4] != bytes([0, 0, 8, dimensions]):
        raise DataError(f"{path} is not an idx file of unsigned bytes with {dimensions} dimensions")
    shape = [int.from_bytes(raw[k : k + 4], "big") for k in range(4, header, 4)]
    if len(raw) != header + prod(shape):
        raise DataError(f"{path} holds {len(raw) - header} values where its header says {prod(shape)}: fetch it again")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy())
