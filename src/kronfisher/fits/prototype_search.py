"""Prototypes that are near to the gradients of samples: greedy seeds, then alternating assignment and update."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kronfisher.fits.nearest_prototype import assign, gather_rows, project
from kronfisher.layers.samples import Samples
from kronfisher.linalg import chunks

__all__ = ["find_prototypes"]


def find_prototypes(samples: Samples, number: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Unit vectors A ``[H, m, I]`` and B ``[H, m, O]`` whose products are near to the gradients of samples."""
    a, g = samples.activations.dense(), samples.gradients
    A, B = _seeds(samples, number)
    for _ in range(iterations):
        along, nearest = assign(a, g, A, B)
        mine = along[..., None, None] * (a @ gather_rows(A, nearest)[..., None]) * g  # c (a·a_c) g at each position
        B = _directions(B, nearest, mine.sum(2))
        mine = along[..., None, None] * (g @ gather_rows(B, nearest)[..., None]) * a
        A = _directions(A, nearest, mine.sum(2))
    return A, B


def _directions(old: Tensor, nearest: Tensor, rows: Tensor) -> Tensor:
    """Directions of the sums of rows by prototype; the old one where no sample is near."""
    sums = torch.zeros_like(old).scatter_add_(1, nearest[..., None].expand_as(rows), rows)
    return torch.where(sums.norm(dim=2, keepdim=True) > 0, normalize(sums, dim=2, eps=0), old)


def _seeds(samples: Samples, number: int) -> tuple[Tensor, Tensor]:
    """Gradients of samples as products of unit vectors, each the one that takes most from what is left of all."""
    a, g = samples.activations.dense(), samples.gradients
    norms = torch.cat([G.square().sum(dim=(2, 3)) for G in samples.per_sample()], dim=1)
    strength = (a.square().sum(-1) * g.square().sum(-1)).argmax(2)[..., None, None]  # the position to begin with
    inputs = a.gather(2, strength.expand(-1, -1, 1, a.shape[3]))
    for _ in range(1 if a.shape[2] == 1 else 5):  # powers of G_k: its best rank one
        outputs = normalize((a @ inputs.mT * g).sum(2, keepdim=True), dim=3)
        inputs = normalize((g @ outputs.mT * a).sum(2, keepdim=True), dim=3)
    inputs, outputs = inputs[:, :, 0], outputs[:, :, 0]
    size = 3 * len(a) * a.shape[1] * a.shape[2] * a.element_size()
    ranges = list(chunks(a.shape[1], size, samples.workspace))
    explained = torch.cat([project(a[:, i:j], g[:, i:j], inputs, outputs).square() for i, j in ranges], dim=1)
    index = torch.stack([_greedy(*each, number) for each in zip(norms, explained, strict=True)])
    return gather_rows(inputs, index), gather_rows(outputs, index)


def _greedy(norms: Tensor, explained: Tensor, number: int) -> Tensor:
    """Which of n candidates ``[number]``: the next is the one that lowers ``Σ_k min_c (‖G_k‖² − ⟨G_k, z_c⟩²)`` most.

    Args:
        norms: ``‖G_k‖²`` ``[n]``.
        explained: ``⟨G_k, z_c⟩²`` ``[n, n]``.
        number: how many.
    """
    left, chosen = norms.clone(), []
    gain = explained.sum(0)
    for _ in range(number):
        chosen.append(gain.argmax())
        now = torch.minimum(left, norms - explained[:, chosen[-1]])
        lower = (now < left).nonzero()[:, 0]
        rest = explained[lower] - norms[lower, None]
        gain -= ((left[lower, None] + rest).clamp_min(0) - (now[lower, None] + rest).clamp_min(0)).sum(0)
        gain[chosen[-1]] = -torch.inf  # each is taken once
        left = now
    return torch.stack(chosen)
