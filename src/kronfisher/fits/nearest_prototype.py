"""The prototype ``b_c ⊗ a_c`` nearest to the gradient of each sample, and the two parts it splits the gradient into."""

from dataclasses import replace

import torch
from torch import Tensor

from kronfisher.layers.activations import Dense
from kronfisher.layers.samples import Samples

__all__ = ["assign", "gather_rows", "project", "split"]


def project(a: Tensor, g: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """``⟨G_k, z_c⟩`` ``[H, n, m]``."""
    return ((a.flatten(1, 2) @ A.mT) * (g.flatten(1, 2) @ B.mT)).unflatten(1, a.shape[1:3]).sum(2)


def assign(a: Tensor, g: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """``⟨G_k, z⟩`` with the prototype nearest to each sample, and which one that is; ``[H, n]`` both."""
    along = project(a, g, A, B)
    nearest = along.abs().argmax(-1)
    return along.gather(-1, nearest[..., None])[..., 0], nearest


def gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Rows ``[H, m, n]`` of an index ``[H, k]``: ``[H, k, n]``."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2]))


def split(samples: Samples, A: Tensor, B: Tensor) -> tuple[Samples, Tensor, Tensor]:
    """Samples of ``Δ_k``, the prototype's part as one more position; and what `assign` gives."""
    a, g = samples.activations.dense(), samples.gradients
    along, nearest = assign(a, g, A, B)
    a = torch.cat([a, gather_rows(A, nearest)[:, :, None]], dim=2)
    g = torch.cat([g, -(along[..., None] * gather_rows(B, nearest))[:, :, None]], dim=2)
    return replace(samples, activations=Dense(a), gradients=g, mask=None), along, nearest
