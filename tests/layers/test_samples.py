"""Contractions of samples against Python loops over samples and positions."""

import pytest
import torch

from kronfisher.layers.activations import Dense, Masked, Ones
from kronfisher.layers.convolution import Geometry, Patches
from kronfisher.layers.samples import Samples, join
from kronfisher.layers.transposed import FlippedPatches
from kronfisher.linalg import WORKSPACE, chunks, mirror
from tests.helpers.close import close

H, N, O, I = 2, 5, 3, 4
TINY = 1  # a workspace that holds one sample


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def mask(positions):
    """Every sample counts another number of positions, one of them none."""
    lengths = torch.arange(N) % (positions + 1)
    return (torch.arange(positions) < lengths[:, None]).double()


KINDS = {
    "dense": lambda T: Dense(randn(H, N, T, I)),
    "dense with bias": lambda T: Dense(randn(H, N, T, I), bias=True),
    "ones": lambda T: Ones(randn(1), (H, N, T)),
    "masked": lambda T: Masked(Dense(randn(H, N, T, I), bias=True), mask(T)),
    "masked ones": lambda T: Masked(Ones(randn(1), (H, N, T)), mask(T)),
    "patches": lambda T: patches(T, bias=False),
    "patches with bias": lambda T: patches(T, bias=True),
}


def patches(positions, bias):
    window = Geometry((2,), (2,), ((1, 1),), (2,))  # kernel, stride, padding, dilation
    return Patches(randn(N, 2 * H, 2 * positions), window, H, N, bias)


kinds = pytest.mark.parametrize("kind", KINDS)
lengths = pytest.mark.parametrize("positions", [1, 3])
workspaces = pytest.mark.parametrize("workspace", [WORKSPACE, TINY], ids=["whole", "one by one"])


def make(kind, positions, workspace=WORKSPACE):
    """Samples of a kind, and their gradients ``G [H, n, O, I]`` by loops."""
    activations = KINDS[kind](positions)
    g = randn(H, N, positions, O)
    a = activations.dense()
    assert a.shape == activations.shape == (H, N, positions, a.shape[-1])
    G = torch.zeros(H, N, O, a.shape[-1], dtype=torch.float64)
    for h in range(H):
        for k in range(N):
            for t in range(positions):
                G[h, k] += torch.outer(g[h, k, t], a[h, k, t])
    return Samples(activations, g, workspace=workspace), G


def gathered(parts):
    return torch.cat(list(parts), dim=1)


@kinds
@lengths
@pytest.mark.parametrize("workspace", [WORKSPACE, TINY])
def test_inputs(kind, positions, workspace):
    activations = KINDS[kind](positions)
    a = activations.dense()
    assert torch.equal(torch.cat([activations.dense(k, k + 1) for k in range(N)], dim=1), a)
    assert torch.equal(activations.dense(3), a[:, 3:])
    close(activations.sum_positions(workspace), a.sum(2, keepdim=True), 1e-12)
    start = randn(H, a.shape[-1], a.shape[-1])
    total = start.clone()
    activations.add_covariance_(total, workspace)
    flat = a.flatten(1, 2)
    close(mirror(total - start), flat.mT @ flat, 1e-12)


def test_patches_are_what_the_kernel_sees():
    activations = patches(3, bias=True)
    weight = randn(2 * H, 2, 2)
    truth = torch.nn.functional.conv1d(activations.images, weight, stride=2, padding=1, dilation=2, groups=H)
    rows = weight.reshape(H, 2, 4)
    found = torch.einsum("hnti,hoi->nhot", activations.dense()[..., :-1], rows).flatten(1, 2)
    close(found, truth, 1e-12)
    assert (activations.dense()[..., -1] == 1).all()


def test_a_bias_is_one_where_it_counts():
    inputs, counted = Dense(randn(H, N, 3, I), bias=True), mask(3)
    assert (inputs.dense()[..., -1] == 1).all()
    assert torch.equal(Masked(inputs, counted).dense()[0, :, :, -1], counted)
    assert torch.equal(inputs.sum_positions()[..., -1], torch.full((H, N, 1), 3.0, dtype=torch.float64))


@kinds
@lengths
@workspaces
def test_contractions(kind, positions, workspace):
    samples, G = make(kind, positions, workspace)
    assert len(samples) == N and samples.positions == positions and samples.shape == (H, O, G.shape[-1])
    close(gathered(samples.per_sample()), G, 1e-12)
    close(samples.squares(), G.square().sum(1), 1e-12)
    close(gathered(part for piece in samples.pieces() for part in piece.per_sample()), G, 1e-12)

    inputs, outputs = randn(H, G.shape[-1], G.shape[-1]), randn(H, O, O)
    turned = outputs.mT.unsqueeze(1) @ G @ inputs.unsqueeze(1)
    close(gathered(part for piece in samples.rotate(inputs, outputs) for part in piece.per_sample()), turned, 1e-12)

    other, G2 = make(kind, positions, workspace)
    assert float(samples.inner(other)) == pytest.approx(float((G * G2).sum()), rel=1e-12)

    total = torch.zeros(H, O, O, dtype=torch.float64)
    samples.add_output_covariance_(total)
    flat = samples.gradients.flatten(1, 2)
    close(mirror(total), flat.mT @ flat, 1e-12)


@kinds
@workspaces
@pytest.mark.parametrize("positions", [1, 3, 4, 7], ids=["one", "rows", "inputs after the sum", "both after the sum"])
def test_rotated_gradients_and_their_squares(kind, positions, workspace):
    samples, G = make(kind, positions, workspace)
    inputs, outputs = randn(H, G.shape[-1], G.shape[-1]), randn(H, O, O)
    for A, B in ((inputs, outputs), (inputs.diagonal(dim1=1, dim2=2), outputs.diagonal(dim1=1, dim2=2))):
        wide, tall = (factor if factor.dim() == 3 else torch.diag_embed(factor) for factor in (A, B))
        turned = tall.mT.unsqueeze(1) @ G @ wide.unsqueeze(1)
        close(gathered(samples.rotated(A, B)), turned, 1e-12)
        close(samples.rotated_squares(A, B), turned.square().sum(1), 1e-12)


def test_chunks_cover_everything_within_the_workspace():
    for total in (1, 2, 7):
        for each in (0, 1, 3, 100):
            for workspace in (1, 6, 10**9):
                ranges = list(chunks(total, each, workspace))
                assert [k for low, high in ranges for k in range(low, high)] == list(range(total))
                assert all(high - low == 1 or (high - low) * each <= workspace for low, high in ranges)
    assert list(chunks(5, 1, 100)) == [(0, 5)] and list(chunks(5, 2, 4)) == [(0, 2), (2, 4), (4, 5)]


# Masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "dense with bias", "ones", "patches with bias"])
def test_masks_count_inputs_and_rows_but_leave_the_gradients_whole(kind):
    samples, G = make(kind, 3)
    positions = mask(3).bool()
    masked = samples.apply_mask(positions)
    close(gathered(masked.per_sample()), G, 1e-12)
    close(masked.squares(), G.square().sum(1), 1e-12)
    assert int(masked.rows) == int(positions.sum()) and samples.rows == 3 * N
    total = torch.zeros(H, G.shape[-1], G.shape[-1], dtype=torch.float64)
    masked.add_input_covariance_(total)
    a = samples.activations.dense() * positions[:, :, None]
    close(mirror(total), a.flatten(1, 2).mT @ a.flatten(1, 2), 1e-12)


@pytest.mark.parametrize("other", [1, 2, 5])
def test_masks_of_another_length_count_samples_whole(other):
    samples, _ = make("dense", 3)
    positions = torch.zeros(N, other, dtype=torch.bool)
    positions[[0, 3], -1] = True
    masked = samples.apply_mask(positions)
    assert int(masked.rows) == 6
    assert (
        masked.masked_activations.dense()[:, [0, 3]].ne(0).all()
        and masked.masked_activations.dense()[:, [1, 2, 4]].eq(0).all()
    )


@pytest.mark.parametrize("kind", ["dense with bias", "ones", "patches"])
def test_reduced(kind):
    samples, _ = make(kind, 3)
    reduced = samples.reduce()
    close(reduced.activations.dense(), samples.activations.dense().sum(2, keepdim=True), 1e-12)
    close(reduced.gradients, samples.gradients.mean(2, keepdim=True), 1e-12)
    assert reduced.rows == N

    positions = mask(3).bool()
    reduced = samples.apply_mask(positions).reduce()
    count = positions.sum(1)
    a = (samples.activations.dense() * positions[:, :, None]).sum(2, keepdim=True)
    close(reduced.masked_activations.dense(), a, 1e-12)
    close(reduced.gradients, samples.gradients.sum(2, keepdim=True) / count.clamp_min(1)[:, None, None], 1e-12)
    assert int(reduced.rows) == int((count > 0).sum()) == 3


# Several uses of one weight ----------------------------------------------------------------------------------------


def test_joined_uses_add_their_gradients():
    (one, G1), (two, G2) = make("dense", 3), make("dense", 1)
    joined = join([one, two])
    assert joined.positions == 4 and joined.mask is None
    close(gathered(joined.per_sample()), G1 + G2, 1e-12)
    assert join([one]) is one


def test_joined_masks():
    one, two = make("dense", 3)[0], make("dense", 2)[0]
    positions = mask(3).bool()
    for uses in ([one.apply_mask(positions), two], [two, one.apply_mask(positions)]):
        assert int(join(uses).rows) == int(positions.sum()) + 2 * N
    both = join([one.apply_mask(positions), two.apply_mask(positions[:, :1])])
    assert int(both.rows) == int(positions.sum() + 2 * positions[:, 0].sum())
    close(both.masked_activations.dense()[:, :, :3], one.activations.dense() * positions[:, :, None], 1e-12)


@kinds
@pytest.mark.parametrize("positions", [1, 2, 3, 20])
@workspaces
def test_products_with_themselves(kind, positions, workspace, monkeypatch):
    samples, G = make(kind, positions, workspace)
    outputs, inputs = G @ G.mT, G.mT @ G
    for shorter in (None, True, False) if positions > 1 else (None,):  # as costs say, and both ways
        if shorter is not None:
            monkeypatch.setattr(Samples, "_shorter", lambda *_, shorter=shorter: shorter)
        for add, truth in ((samples.add_output_products_, outputs), (samples.add_input_products_, inputs)):
            total = torch.zeros_like(truth.sum(1))
            for _ in range(2):
                add(total)
            close(mirror(total), 2 * truth.sum(1), 1e-12)


def test_long_products_are_taken_of_written_out_gradients():
    for positions, shorter in ((2, True), (200, False)):
        samples = Samples(Dense(randn(1, 1, positions, 30)), randn(1, 1, positions, 20))
        assert samples._shorter(20, 30, False) == samples._shorter(30, 20, False) == shorter


def test_products_with_patches_of_transposed_convolutions():
    """Their kernels lie the other way round, in every product alike."""
    window = Geometry((3, 2), (1, 1), ((2, 2), (1, 1)), (1, 1))
    images = torch.randn(4, 2, 4, 3, dtype=torch.float64)
    for patches in (Patches(images, window, 1, 4, True), FlippedPatches(images, window, 1, 4, True, (1, 1))):
        M = torch.randn(1, patches.shape[-1], 3, dtype=torch.float64)
        torch.testing.assert_close(patches.times(M), patches.dense() @ M)
        torch.testing.assert_close(patches.times(M, 1, 3), patches.dense(1, 3) @ M)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 3])
def test_combined_positions(kind, T):
    activations, weights = KINDS[kind](T), randn(H, N, T, 2)
    truth = torch.einsum("hntr,hnti->hnri", weights, activations.dense().expand(H, N, T, -1))
    torch.testing.assert_close(activations.weighted_sums(weights), truth)
    torch.testing.assert_close(activations.weighted_sums(weights[:, 1:3], 1, 3), truth[:, 1:3])
