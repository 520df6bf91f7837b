"""Merging models: every parameter where the curvatures of all models together put it."""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from kronfisher.errors import DataError
from kronfisher.fisher.damping import Damping
from kronfisher.fisher.fisher import Fisher
from kronfisher.fisher.parameters import unwrapped
from kronfisher.fisher.penalty import Parameters, values
from kronfisher.operators.operator import Operator

__all__ = ["merge"]

SHARE = 0.1  # of each block's mean eigenvalue, as in influence: structured blocks are not to be trusted far below


def merge(
    models: Sequence[Parameters],
    fishers: Sequence[Fisher],
    *,
    weights: Sequence[float] | None = None,
    damping: float | Damping | None = None,
    strict: bool = True,
) -> dict[str, Tensor]:
    """One set of parameters for several models of the same shape: each direction from those that are certain of it.

    With the weighted mean ``F = Σ w_i F_i`` of the Fisher matrices and ``θ̄ = Σ w_i θ_i`` of the parameters, the answer
    ``θ̄ + (F + λ)⁻¹ Σ w_i F_i (θ_i − θ̄)`` minimises ``Σ w_i ½ (θ − θ_i)ᵀ F_i (θ − θ_i) + ½ λ ‖θ − θ̄‖²``: to second
    order the loss on the data of all models. It takes one solve, with the matrices as they are and not only their
    diagonals (Matena & Raffel 2022, arXiv:2111.09832). Units that
    do the same must stand at the same place in all models, as where they were fine-tuned from one start.

    Args:
        models: at the parameters of the estimates, or name → tensor.
        fishers: one of each model, over the same parameters in the same blocks; means or sums.
        weights: of the models, which are divided by their sum. Default: the numbers of examples of the matrices.
        damping: λ, in the units of the eigenvalues of the mean F, or a rule such as ``kf.Tikhonov(λ)``. Directions in
            which F is well below λ keep the mean of the models. Default: a tenth of each block's mean eigenvalue.
        strict: refuse models that differ in parameters or buffers that no matrix covers.

    Returns:
        ``{name: [*shape]}`` of the covered parameters, to be read with ``load_state_dict(merged, strict=False)``.

    Raises:
        DataError: there are not as many matrices as models, a matrix belongs to another model, matrices differ in their
            blocks, or models differ where no matrix says anything.
        ValueError: weights are negative or all zero, or λ is out of range.
        SingularError: λ is zero and F has no inverse.

    Example:
        >>> import kronfisher as kf
        >>> _ = torch.manual_seed(0)
        >>> x, truth = torch.randn(200, 3), torch.tensor([[1.0, -2.0, 3.0]])
        >>> x[:100, 0], x[100:, 1] = 0, 0  # each half is blind to one of the inputs
        >>> models, fishers = [], []
        >>> for half in (x[:100], x[100:]):
        ...     model = torch.nn.Linear(3, 1, bias=False)
        ...     model.weight.data = torch.linalg.lstsq(half, half @ truth.T, driver="gelsd").solution.T
        ...     models.append(model), fishers.append(kf.estimate(model, half, kf.Gaussian(), labels="exact"))
        (None, None)
        (None, None)
        >>> kf.merge(models, fishers, damping=1e-6)["weight"].round(decimals=3)
        tensor([[ 1., -2.,  3.]])
    """
    if not models or len(models) != len(fishers):
        raise DataError(f"{len(models)} models and {len(fishers)} Fisher matrices; give one matrix for each model")
    shares = _shares(weights, fishers)
    # shares of sums over data: these add up whatever the numbers of examples are
    weighted = [f.reduced("sum").scaled(share / f.count) for share, f in zip(shares, fishers, strict=True)]
    total = reduce(lambda one, other: one + other, weighted)
    thetas = [
        values(fisher.shapes, model, fisher.device, fisher.info.parameters)
        for model, fisher in zip(models, fishers, strict=True)
    ]
    if strict:
        _require_one_rest([unwrapped(model) for model in models if isinstance(model, nn.Module)], total.names)
    wide = [{name: tensor.to(total.dtype) for name, tensor in theta.items()} for theta in thetas]
    pairs = list(zip(shares, wide, strict=True))
    centre = {
        name: sum((share * theta[name] for share, theta in pairs[1:]), pairs[0][0] * pairs[0][1][name])
        for name in total.names
    }
    pull = {name: torch.zeros_like(tensor) for name, tensor in centre.items()}
    for matrix, theta in zip(weighted, wide, strict=True):
        for name, product in (matrix @ {name: theta[name] - centre[name] for name in centre}).items():
            pull[name] += product
    damped = total.mapped(_raised, "damped") if damping is None else total + damping
    step = damped.solve(pull)
    return {name: (centre[name] + step[name])[0].to(thetas[0][name].dtype) for name in total.names}


def _raised(operator: Operator) -> Operator:
    mean = float(operator.trace()) / operator.dim
    return operator.shifted(SHARE * mean or 1.0)  # a block without curvature stays at the mean whatever λ is


def _shares(weights: Sequence[float] | None, fishers: Sequence[Fisher]) -> list[float]:
    given = [fisher.count for fisher in fishers] if weights is None else [float(weight) for weight in weights]
    if len(given) != len(fishers) or not all(0 <= weight < float("inf") for weight in given) or not sum(given):
        raise ValueError(f"weights={weights!r}: give {len(fishers)} finite numbers of at least 0, not all of them 0.")
    return [weight / sum(given) for weight in given]


def _require_one_rest(models: Sequence[nn.Module], names: Sequence[str]) -> None:
    """DataError where models differ in anything that is not merged."""
    rests = [dict(model.named_parameters()) | dict(model.named_buffers()) for model in models]
    for rest in rests[1:]:
        for name in rests[0].keys() | rest.keys():
            if name in names:
                continue
            one, other = rests[0].get(name), rest.get(name)
            if one is None or other is None or one.shape != other.shape or not torch.equal(one, other.to(one.device)):
                raise DataError(
                    f"the models differ in {name}, which no Fisher matrix covers: nothing says how to merge it. "
                    "Estimate with it (requires_grad), give all models the same, or leave it out of the answer with "
                    "strict=False (running statistics of normalisations are to be renewed on data then)."
                )
