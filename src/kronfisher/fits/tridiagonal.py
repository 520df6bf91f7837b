"""Block-tridiagonal K-FAC: layers that follow each other, tied by the cross moments of neighbours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import Tensor

from kronfisher.errors import UnsupportedError
from kronfisher.fisher.blocks import Block, Key
from kronfisher.fits.fit import Fit
from kronfisher.fits.kfac import KFAC
from kronfisher.fits.plan import Plan
from kronfisher.fits.registry import register, resolve
from kronfisher.fits.state import State, Totals, Uppers, reciprocal
from kronfisher.layers.samples import Samples
from kronfisher.linalg import mirror
from kronfisher.operators import Kronecker, Operator, Tridiagonal

__all__ = ["BlockTridiagonal"]


@dataclass(kw_only=True)
class Chain(State):
    """Second moments of the layers of a chain, and of neighbours with each other.

    Attributes:
        inputs: ``Σ a_i a_iᵀ`` of every layer, the upper triangle.
        outputs: ``Σ g_i g_iᵀ``, likewise.
        input_links: ``Σ a_i a_{i+1}ᵀ`` of every layer but the last.
        output_links: ``Σ g_i g_{i+1}ᵀ``.
    """

    inputs: Uppers
    outputs: Uppers
    input_links: Totals
    output_links: Totals


@dataclass(frozen=True)
class BlockTridiagonal(Fit):
    """K-FAC with a block-tridiagonal inverse (Martens & Grosse 2015, section 4.3).

    For layers i and i + 1 that follow each other it keeps ``F_{i,i+1} ≈ B_{i,i+1} ⊗ A_{i,i+1}`` beside K-FAC's own
    ``B_i ⊗ A_i``, where ``A_{i,i+1} = Σ a_i a_{i+1}ᵀ / rows`` and ``B_{i,i+1} = Σ g_i g_{i+1}ᵀ / N``. What is farther
    apart follows from these as in a Markov chain: the matrix is the one whose inverse is block-tridiagonal. It is exact
    where K-FAC is and the gradients of layers form such a chain, as for one layer.

    A chain is cut, and K-FAC's products stand alone there, where a layer's inputs come from several layers or its
    outputs go to several; between layers with another number of positions; where positions change their order in
    between; at parameters that are no matrices (scales and shifts of a normalisation), that are looked up, in groups,
    wider than ``basis.max_dim``, used several times, or that another fit treats. ``report()`` says where and why.

    The gradients of a whole chain are held until the last of them has arrived. Damping it exactly destroys the
    structure: use ``fisher + kf.FactoredTikhonov(λ)``, as the paper and the optimisers do.

    Args:
        basis: K-FAC with its settings, or a name of it.

    Raises:
        ValueError: `basis` is another fit: only K-FAC's factors are second moments, which neighbours share.

    Example:
        >>> import torch, kronfisher as kf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
        >>> fisher = kf.estimate(model, torch.randn(50, 4), kf.Gaussian(), fit=kf.BlockTridiagonal(), labels="exact")
        >>> fisher["0.weight"].structure
        'block-tridiagonal of 2 layers'
        >>> damped = fisher + kf.FactoredTikhonov(1e-2)
        >>> damped.solve(torch.ones(43)).shape
        torch.Size([43])
    """

    basis: KFAC = field(default_factory=KFAC)

    def __post_init__(self) -> None:
        object.__setattr__(self, "basis", resolve(self.basis))
        if not isinstance(self.basis, KFAC):
            raise ValueError(
                f"BlockTridiagonal(basis={self.basis!r}): the basis must be KFAC(...), whose factors are second "
                "moments; factors that are fitted to a layer say nothing of its neighbours."
            )

    @property
    def chained(self) -> bool:
        return True

    def alone(self, block: Block) -> str:
        groups, outputs, inputs = block.shape
        if block.weight is None:
            return f"{block.name} is no matrix but a vector"
        if groups > 1:
            return f"{block.name} has {groups} groups"
        if block.onehot:
            return f"{block.name} is looked up"
        if max(outputs, inputs) > self.basis.max_dim:
            return f"{block.name} has a factor of {max(outputs, inputs)}, kept as its diagonal"
        return ""

    def groups(self, blocks: Sequence[Block], after: Mapping[Key, Key]) -> list[tuple[Block, ...]]:
        given = {block.key: block for block in blocks}
        links = {key: later for key, later in after.items() if key in given and later in given}
        groups = []
        for key in given.keys() - set(links.values()):
            chain = [given[key]]
            while key in links:
                key = links[key]
                chain.append(given[key])
            groups.append(tuple(chain))
        return sorted(groups, key=lambda group: list(given).index(group[0].key))

    def plan(self, group: tuple[Block, ...], element: int) -> Plan:
        plans = [self.basis.plan((block,), element) for block in group]
        crosses = sum(x.shape[k] * y.shape[k] for x, y in pairwise(group) for k in (1, 2))
        return Plan(sum(plan.bytes for plan in plans) + 2 * element * crosses, by_example=plans[0].by_example)

    def init(self, group: tuple[Block, ...], plan: Plan, like: Tensor) -> State:
        if len(group) == 1:
            return self.basis.init(group, plan, like)
        shapes = [self.basis.sides((block,)) for block in group]
        links = [(x.shape, y.shape) for x, y in pairwise(group)]
        return Chain(
            group,
            plan,
            inputs=tuple(like.new_zeros(inputs) for inputs, _ in shapes),
            outputs=tuple(like.new_zeros(outputs) for _, outputs in shapes),
            input_links=tuple(like.new_zeros(x[2], y[2]) for x, y in links),
            output_links=tuple(like.new_zeros(x[1], y[1]) for x, y in links),
        )

    def update(self, state: Any, samples: tuple[Samples, ...]) -> State:
        if len(samples) == 1:
            return self.basis.update(state, samples)
        if len({(use.first, len(use) * use.positions) for use in samples}) > 1:
            raise UnsupportedError(
                f"{state.name}: not every layer of this chain got a gradient in the same backward pass, so rows of "
                "neighbours do not belong together. Choose a fit that treats layers apart, such as 'kfac'."
            )
        if self.basis.mode == "reduce":
            samples = tuple(use.reduce() for use in samples)
        for k, use in enumerate(samples):
            if use.first:
                use.add_input_covariance_(state.inputs[k])
            use.add_output_covariance_(state.outputs[k])
        for k, (use, later) in enumerate(pairwise(samples)):
            if use.first:
                use.add_input_products_with_(later, state.input_links[k])
            use.add_output_products_with_(later, state.output_links[k])
        if samples[0].first:
            state.rows = state.rows + samples[0].rows
        return state

    def finish(self, state: Any) -> Operator:
        if len(state.blocks) == 1:
            return self.basis.finish(state)
        state.check()
        rows, count = reciprocal(state.rows), reciprocal(state.count)
        layers = tuple(
            Kronecker(mirror(inputs, rows), mirror(outputs, count), block.name)
            for inputs, outputs, block in zip(state.inputs, state.outputs, state.blocks, strict=True)
        )
        return Tridiagonal(
            layers,
            tuple(link * rows for link in state.input_links),
            tuple(link * count for link in state.output_links),
            state.name,
        )


register(
    "block-tridiagonal",
    BlockTridiagonal,
    "K-FAC, neighbouring layers tied: of a whole chain",
    "block-tridiagonal K-FAC",
)
