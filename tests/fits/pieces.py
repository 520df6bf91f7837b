"""Random samples of one block, the best Kronecker product of them by a dense SVD, and what a fit makes of them."""

import torch

from kronfisher.fisher.blocks import Block, Window
from kronfisher.layers.activations import Dense
from kronfisher.layers.samples import Samples

SHARP = {"tolerance": 1e-13, "iterations": 5000}


def rearranged_matrix(G):
    """``ℛ(F) [O², I²]`` of ``[n, O, I]``."""
    return torch.einsum("koi,kpj->opij", G, G).flatten(2).flatten(0, 1)


def best(G, diagonal=False):
    """The best product ``[O·I, O·I]`` for gradients ``[n, O, I]``, and the singular values; perhaps with diagonal A."""
    outputs, inputs = G.shape[1:]
    matrix = rearranged_matrix(G)
    if diagonal:
        matrix = matrix.view(-1, inputs, inputs) * torch.eye(inputs, dtype=G.dtype)
    U, S, V = torch.linalg.svd(matrix.view(outputs**2, inputs**2))
    B, A = U[:, 0].view(outputs, outputs), V[0].view(inputs, inputs)
    return S[0] * torch.kron(B, A), S


def samples_of(a, g):
    return Samples(Dense(a), g)


def random_samples(n=40, T=1, I=7, O=5, H=1, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(H, n, T, I, generator=generator, dtype=torch.float64) ** 2
    g = torch.randn(H, n, T, O, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 1, O)
    return samples_of(a.to(dtype), g.to(dtype))


def gradients_of(samples):
    return samples.gradients.mT @ samples.activations.dense()


def excess(operator, samples):
    """By how much the relative error exceeds that of the best product."""
    G = gradients_of(samples)[0]
    rows, sigma = G.flatten(1), torch.linalg.svdvals(rearranged_matrix(G))
    block = rows.mT @ rows
    return float(((block - operator.to_dense()).norm() - (block.norm() ** 2 - sigma[0] ** 2).sqrt()) / block.norm())


def fitted(fit, *batches, count=None):
    """The operator that a fit makes of batches of samples, of their sum."""
    groups, outputs, inputs = batches[0].shape
    block = Block("w", "linear", Window.of("w", torch.zeros(groups, outputs, inputs)))
    state = fit.init((block,), fit.plan((block,), 8), batches[0].gradients)
    passes = 0
    while state is not None:
        for batch in batches:
            state.count += len(batch)
            state = fit.update(state, (batch,))
        last, state, passes = state, fit.next_pass(state), passes + 1
    operator = fit.finish(last)
    return operator * last.count, last, passes
