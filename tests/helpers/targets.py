"""Batches that every entry accepts or every one refuses, with models and likelihoods for them."""

from collections import namedtuple

import numpy as np
import torch
from torch import nn

import kronfisher as kf


class Named(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.layer = nn.Linear(3, outputs).double()

    def forward(self, x):
        return self.layer(x)


Answer = namedtuple("Answer", "logits")


class Wrapped(Named):
    def forward(self, x):
        return Answer(self.layer(x))


class TinyForCausalLM(nn.Module):
    """Its labels come unshifted, as the name says."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4).double(), nn.Linear(4, 7).double()

    def forward(self, input_ids):
        return self.head(self.table(input_ids))


torch.manual_seed(0)
X = torch.randn(6, 3, dtype=torch.float64)
IDS = torch.randint(7, (2, 5))
NUMBERS, LABELS = torch.randn(6, 1, dtype=torch.float64), torch.randint(3, (6,))
CATEGORICAL, TOKENS = kf.Categorical(), kf.Categorical(class_dim=-1)
Pair = namedtuple("Pair", "x labels")

# Name → model, likelihood, batch, and the error of all entry points, or None where all accept.
CASES = {
    "numbers": (Named(1), kf.Gaussian(), (X, NUMBERS), None),
    "numbers of float32": (Named(1), kf.Gaussian(), (X, NUMBERS.float()), None),
    "integers for numbers": (Named(1), kf.Gaussian(), (X, NUMBERS.long()), None),
    "a missing dimension": (Named(1), kf.Gaussian(), (X, NUMBERS[:, 0]), r"targets of shape \[6, 1\], found \[6\]"),
    "one number for all": (Named(1), kf.Gaussian(), (X, NUMBERS[:1]), "differ in the number of examples"),
    "a number": (Named(1), kf.Gaussian(), (X, 1.0), "needs the targets to be a tensor, found float"),
    "not finite": (Named(1), kf.Gaussian(), (X, NUMBERS / 0), "needs real, finite targets"),
    "a mask for numbers": (Named(1), kf.Gaussian(), (X, NUMBERS > 0), "targets that are numbers, found torch.bool"),
    "a mask for means": (Named(2), kf.HeteroscedasticGaussian(), (X, NUMBERS > 0), "numbers, found torch.bool"),
    "a mask for counts": (Named(1), kf.Poisson(), (X, NUMBERS > 0), "numbers, found torch.bool"),
    "means": (Named(2), kf.HeteroscedasticGaussian(), (X, NUMBERS), None),
    "means without their dimension": (Named(2), kf.HeteroscedasticGaussian(), (X, NUMBERS[:, 0]), None),
    "counts": (Named(1), kf.Poisson(), (X, NUMBERS.square().round()), None),
    "negative counts": (Named(1), kf.Poisson(), (X, -NUMBERS.square()), "targets that are counts"),
    "booleans": (Named(1), kf.Bernoulli(), (X, NUMBERS > 0), None),
    "binary, a missing dimension": (Named(1), kf.Bernoulli(), (X, (NUMBERS > 0)[:, 0]), r"found \[6\]"),
    "binary, -1 and 1": (Named(1), kf.Bernoulli(), (X, NUMBERS.sign()), r"Bernoulli needs targets in \[0, 1\]"),
    "classes": (Named(3), CATEGORICAL, (X, LABELS), None),
    "classes in a row": (Named(3), CATEGORICAL, (X, LABELS[:, None]), r"targets of shape \[6\], found \[6, 1\]"),
    "classes as floats": (Named(3), CATEGORICAL, (X, LABELS.double()), "needs integer class indices"),
    "a mask for classes": (Named(3), CATEGORICAL, (X, LABELS > 0), "needs integer class indices, found torch.bool"),
    "out of range": (Named(3), CATEGORICAL, (X, LABELS + 1), "label 3 is out of range"),
    "negative": (Named(3), CATEGORICAL, (X, LABELS * 0 - 1), "label -1 is out of range"),
    "ignored": (Named(3), CATEGORICAL, (X, LABELS.where(LABELS > 0, -100)), None),
    "probabilities": (Named(3), CATEGORICAL, (X, torch.rand(6, 3).softmax(1)), None),
    "not normalised": (Named(3), CATEGORICAL, (X, torch.ones(6, 3)), "sum to one"),
    "weights": (Named(3), kf.Weighted(CATEGORICAL), (X, (LABELS, torch.rand(6))), None),
    "no weights": (Named(3), kf.Weighted(CATEGORICAL), (X, LABELS), r"targets \(targets, weight\)"),
    "too few weights": (Named(3), kf.Weighted(CATEGORICAL), (X, (LABELS, torch.rand(5))), "do not fit outputs"),
    "arrays": (Named(3), CATEGORICAL, (X.numpy(), LABELS.numpy()), None),
    "arrays of float32": (Named(1), kf.Gaussian(), (X.numpy().astype(np.float32), NUMBERS.numpy()), None),
    "an array that does not fit": (Named(1), kf.Gaussian(), (X.numpy(), NUMBERS.numpy()[:, 0]), r"found \[6\]"),
    "a list": (Named(3), CATEGORICAL, [X, LABELS], None),
    "a mapping": (Named(3), CATEGORICAL, {"x": X, "labels": LABELS}, None),
    "a named tuple": (Named(3), CATEGORICAL, Pair(X, LABELS), None),
    "a mapping without labels": (Named(3), CATEGORICAL, {"x": X}, "needs? targets|no targets"),
    "an output object": (Wrapped(3), CATEGORICAL, (X, LABELS), None),
    "no targets": (Named(3), CATEGORICAL, (X, None), "needs? targets|no targets"),
    "inputs alone": (Named(3), CATEGORICAL, X, "needs? targets|no targets"),
    "tokens": (TinyForCausalLM(), TOKENS, {"input_ids": IDS, "labels": IDS}, None),
    "tokens of another length": (
        TinyForCausalLM(),
        TOKENS,
        {"input_ids": IDS, "labels": IDS[:, 1:]},
        r"found \[2, 4\]",
    ),
    "three parts": (Named(3), CATEGORICAL, (X, LABELS, X), r"pass \(inputs, targets\)"),
}
