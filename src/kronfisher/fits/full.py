"""The exact block, dense: the truth that everything else approximates, affordable for small parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kronfisher.fisher.blocks import Block, Key
from kronfisher.fits.fit import Fit
from kronfisher.fits.plan import Plan
from kronfisher.fits.registry import register
from kronfisher.fits.state import State, Upper, reciprocal
from kronfisher.layers.samples import Samples
from kronfisher.linalg import add_symmetric_product_, mirror
from kronfisher.operators import Dense

__all__ = ["Full"]


@dataclass(kw_only=True)
class Products(State):
    """``Σ_k vec(G_k) vec(G_k)ᵀ`` ``[D, D]``, the upper triangle."""

    products: Upper

    @property
    def triangles(self) -> set[str]:
        """That of all products."""
        return {"products"}


@dataclass(frozen=True)
class Full(Fit):
    """``F = Σ_k vec(G_k) vec(G_k)ᵀ``, a layer's weight and bias whole and dense.

    Groups of a convolution and chunks of a packed parameter stay together, with their cross terms.

    Args:
        across_layers: one matrix over all parameters that this fit is given, with the cross terms between layers.

    Example:
        >>> import torch, kronfisher as kf
        >>> layer = torch.nn.Linear(2, 3)
        >>> fisher = kf.estimate(layer, torch.randn(50, 2), kf.Gaussian(), fit=kf.Full(), labels="exact")
        >>> fisher.to_dense().shape
        torch.Size([9, 9])
    """

    across_layers: bool = False
    exact = True
    largest_tried = 1024

    def groups(self, blocks: Sequence[Block], after: Mapping[Key, Key]) -> list[tuple[Block, ...]]:
        if self.across_layers:
            return [tuple(blocks)] if blocks else []
        groups: list[tuple[Block, ...]] = []
        for block in blocks:
            shared = [
                group for group in groups if any(set(block.parameters) & set(other.parameters) for other in group)
            ]
            for group in shared:
                groups.remove(group)
            groups.append((*(other for group in shared for other in group), block))
        return groups

    def plan(self, group: tuple[Block, ...], element: int) -> Plan:
        return Plan(2 * element * sum(block.dim for block in group) ** 2)

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> Products:
        dim = sum(block.dim for block in group)
        return Products(group, plan, products=like.new_zeros(dim, dim))

    def update(self, state: Products, samples: tuple[Samples, ...]) -> Products:
        if len(samples) == 1:
            for gradients in samples[0].per_sample():
                add_symmetric_product_(state.products, gradients.transpose(0, 1).flatten(1))
            return state
        rows = [torch.cat([part.transpose(0, 1).flatten(1) for part in use.per_sample()]) for use in samples]
        joint = torch.cat(rows, dim=1)  # of the widest dtype among the layers
        state.products = state.products.to(torch.promote_types(state.products.dtype, joint.dtype))
        add_symmetric_product_(state.products, joint.to(state.products.dtype))
        return state

    def finish(self, state: Products) -> Dense:
        state.check()
        return Dense(mirror(state.products, reciprocal(state.count)), name=state.name)


register("full", Full, "each layer's dense matrix: the truth", "exact block")
