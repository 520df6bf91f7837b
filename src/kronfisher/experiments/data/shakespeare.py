"""Tiny Shakespeare: text, one character after another."""

from pathlib import Path

import torch

from kronfisher.errors import DataError
from kronfisher.experiments.data.dataset import Dataset
from kronfisher.experiments.data.files import locate, read
from kronfisher.experiments.data.registry import register

LENGTH = 32
ORIGIN = (
    "input.txt, the 40,000 lines of Shakespeare that come with Karpathy's char-rnn "
    "(https://github.com/karpathy/char-rnn, data/tinyshakespeare)"
)


@register("shakespeare")
def shakespeare(data_dir: str | Path | None = None) -> Dataset:
    """Pieces of 32 characters ``[N, 32]`` (int64), and the character that follows each: the last tenth is to test on.

    Characters are numbered in the order of their code points. Nine tenths of the text are in pieces one after another,
    so that no character is in two of them.

    Args:
        data_dir: the folder of all data sets (default: KRONFISHER_DATA).

    Raises:
        FileNotFoundError: the file is missing; the message says whose it is.
        DataError: the file is not text, or too short.
    """
    text = shakespeare_text(data_dir)
    alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([alphabet[character] for character in text])
    pieces = (len(tokens) - 1) // LENGTH
    inputs, targets = (tokens[k : k + pieces * LENGTH].view(pieces, LENGTH) for k in (0, 1))
    last = pieces - pieces // 10
    parts = inputs[:last], targets[:last], inputs[last:], targets[last:]
    return Dataset("shakespeare", *parts, task="classes", outputs=len(alphabet))


def shakespeare_text(data_dir: str | Path | None = None) -> str:
    """The whole text; errors as those of `shakespeare`."""
    path = locate(data_dir, "shakespeare/input.txt", ORIGIN)
    try:
        text = read(path).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}): fetch it again") from error
    if len(text) <= 10 * LENGTH:
        raise DataError(f"{path} has {len(text)} characters and needs more than {10 * LENGTH}: fetch it again")
    return text
