"""Inputs that are looked up: every contraction agrees with the same inputs written out."""

from dataclasses import replace

import pytest
import torch

from kronfisher.layers.activations import Dense
from kronfisher.layers.onehot import Indices
from kronfisher.layers.samples import Samples, join
from kronfisher.linalg import WORKSPACE, mirror
from tests.helpers.close import close

N, T, O, I = 5, 4, 3, 6


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def lookups(several, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(I - 1, (N, T, several), generator=generator)  # repeated ones, and one that never comes
    return Indices(values, torch.rand(N, T, several, generator=generator, dtype=torch.float64), I)


several = pytest.mark.parametrize("several", [1, 3])
workspaces = pytest.mark.parametrize("workspace", [WORKSPACE, 1], ids=["whole", "one by one"])


@several
def test_written_out_by_a_loop(several):
    inputs = lookups(several)
    truth = torch.zeros(1, N, T, I, dtype=torch.float64)
    for k in range(N):
        for t in range(T):
            for j in range(several):
                truth[0, k, t, inputs.values[k, t, j]] += inputs.weights[k, t, j]
    close(inputs.dense(), truth, 1e-12)
    close(inputs.dense(1, 3), truth[:, 1:3], 1e-12)
    assert inputs.shape == truth.shape
    matrix = randn(1, I, 2)
    close(inputs.times(matrix), truth @ matrix[:, None], 1e-12)
    close(inputs.times(matrix, 2, 4), truth[:, 2:4] @ matrix[:, None], 1e-12)
    close(inputs.part(1, 5).dense(), truth[:, 1:5], 1e-12)
    close(inputs.select(torch.tensor([4, 1])).dense(), truth[:, [4, 1]], 1e-12)
    copy = inputs.copy()
    assert copy.values.data_ptr() != inputs.values.data_ptr() and copy.numel == inputs.numel == 2 * N * T * several
    close(copy.dense(), truth, 1e-12)


@several
@workspaces
def test_second_moments(several, workspace):
    inputs = lookups(several)
    a = inputs.dense()
    total, diagonal = randn(1, I, I), randn(1, I)
    start, first = total.clone(), diagonal.clone()
    inputs.add_covariance_(total, workspace)
    inputs.add_squares_(diagonal, workspace)
    flat = a.flatten(1, 2)
    close(mirror(total - start), flat.mT @ flat, 1e-12)
    close(diagonal - first, flat.square().sum(1), 1e-12)
    close(inputs.reduce().dense(), a.sum(2, keepdim=True), 1e-12)
    close(inputs.sum_positions(workspace), a.sum(2, keepdim=True), 1e-12)


@several
@workspaces
def test_samples(several, workspace):
    inputs, g = lookups(several), randn(1, N, T, O)
    mask = torch.rand(N, T, generator=torch.Generator().manual_seed(3)) < 0.6
    looked_up = Samples(inputs, g, workspace=workspace)
    dense = replace(looked_up, activations=Dense(inputs.dense()))
    close(looked_up.squares(), dense.squares(), 1e-12)
    close(torch.cat(list(looked_up.per_sample()), 1), torch.cat(list(dense.per_sample()), 1), 1e-12)
    close(looked_up.inner(dense), dense.inner(looked_up), 1e-12)
    for one, other in ((looked_up, dense), (looked_up.apply_mask(mask), dense.apply_mask(mask))):
        close(one.masked_activations.dense(), other.masked_activations.dense(), 1e-12)
        close(one.reduce().activations.dense(), other.reduce().activations.dense(), 1e-12)
        close(one.reduce().squares(), other.reduce().squares(), 1e-12)
        for shape in ((1, I, I), (1, I)):
            sums = [torch.zeros(shape, dtype=torch.float64) for _ in range(2)]
            one.add_input_covariance_(sums[0])
            other.add_input_covariance_(sums[1])
            close(*(mirror(each) if len(shape) == 3 else each for each in sums), tolerance=1e-12)


@workspaces
@pytest.mark.parametrize("inputs", ["dense", "diagonal"])
@pytest.mark.parametrize("outputs", ["dense", "diagonal"])
def test_rotations(inputs, outputs, workspace):
    """Sides that are diagonal act as the matrices that they stand for, whatever the inputs are made of."""
    sides = {"inputs": randn(1, I, I), "outputs": randn(1, O, O)}
    kept = {"inputs": inputs, "outputs": outputs}
    given = {name: side if kept[name] == "dense" else side.diagonal(dim1=1, dim2=2) for name, side in sides.items()}
    full = {name: side if side.dim() == 3 else torch.diag_embed(side) for name, side in given.items()}
    for activations in (lookups(1), lookups(3), Dense(randn(1, N, T, I)), Dense(randn(1, N, T, I - 1), bias=True)):
        samples = Samples(activations, randn(1, N, T, O), workspace=workspace)
        G = torch.cat(list(samples.per_sample()), 1)
        found = torch.cat([G for part in samples.rotate(**given) for G in part.per_sample()], 1)
        close(found, full["outputs"].mT[:, None] @ G @ full["inputs"][:, None], 1e-12)


def test_joined():
    g = randn(1, N, T, O)
    one, two = Samples(lookups(1), g), Samples(lookups(1, seed=1), 2 * g)
    joined = join([one, two])
    assert isinstance(joined.activations, Indices) and joined.positions == 2 * T
    close(joined.activations.dense(), torch.cat([one.activations.dense(), two.activations.dense()], 2), 1e-12)
    mixed = join([one, Samples(lookups(3), g), Samples(Dense(randn(1, N, T, I)), g)])
    assert isinstance(mixed.activations, Dense) and mixed.positions == 3 * T
    assert isinstance(join([one, Samples(lookups(3), g)]).activations, Dense)
