"""The 1,797 handwritten digits of 8×8 pixels that come with scikit-learn: real data with nothing to download."""

import torch

from kronfisher.experiments.data.dataset import Dataset, generator
from kronfisher.experiments.data.registry import register

TRAIN_SIZE = 1500


@register("digits")
def digits(seed: int = 0) -> Dataset:
    """Ten classes of ``[1, 8, 8]`` images in [0, 1], shuffled by `seed`: 1,500 to train on, 297 to test.

    Example:
        >>> digits().train_inputs.shape, digits().test_targets.shape
        (torch.Size([1500, 1, 8, 8]), torch.Size([297]))
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the digits come with scikit-learn: pip install "kronfisher[experiments]"') from error
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=generator(seed))
    inputs = torch.from_numpy(images).float().div_(16).reshape(-1, 1, 8, 8)[order]
    targets = torch.from_numpy(labels).long()[order]
    head, tail = slice(TRAIN_SIZE), slice(TRAIN_SIZE, None)
    return Dataset("digits", inputs[head], targets[head], inputs[tail], targets[tail], "classes", 10)
