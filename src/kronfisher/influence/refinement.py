"""Queries solved with the exact Gauss-Newton matrix, by conjugate gradients that the Fisher preconditions."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kronfisher.capture.batches import Batches, positions_of
from kronfisher.capture.forward import run
from kronfisher.capture.isolation import isolate
from kronfisher.errors import DataError, NumericalError, SingularError
from kronfisher.estimation.progress import Progress, writer
from kronfisher.fisher.layout import scatter
from kronfisher.influence.preconditioned import Damped
from kronfisher.influence.readings import Network, endless
from kronfisher.influence.vectors import Rows, Vectors
from kronfisher.likelihoods import Likelihood, along_outputs, masked_positions
from kronfisher.linalg import plain_arithmetic, promote

__all__ = ["refine"]


def refine(
    network: Network,
    likelihood: Likelihood,
    damped: Damped,
    vectors: Vectors,
    batches: Batches,
    steps: int,
    first: int = 0,
    progress: Progress = False,
) -> tuple[Vectors, Tensor]:
    """``(GGN + λ)⁻¹ v`` for K vectors, by some steps of conjugate gradients from zero; one reading of the data each.

    Args:
        network: the model, and how batches go through it.
        likelihood: whose Hessian of the outputs is taken.
        damped: F + λ, which preconditions; λ is that of each of its blocks.
        vectors: v.
        batches: the training data.
        steps: of conjugate gradients.
        first: number of the first of their readings that are made here.
        progress: as for `kronfisher.estimate`.

    Returns:
        Solutions, and their relative residuals ``[K]``.

    Raises:
        SingularError: λ is zero, and a direction has no curvature.
        NumericalError: something is not finite.
    """
    gradients = vectors.rows()
    shift = _shifts(damped, gradients)
    device = damped.fisher.device
    with plain_arithmetic(device):
        answer = {name: torch.zeros_like(v) for name, v in gradients.items()}
        residual = {name: v.clone() for name, v in gradients.items()}
        direction = damped.solve(residual)
        product, norm = _inner(residual, direction), _inner(residual, residual)
    for number in range(steps):
        image = _gauss_newton(network, likelihood, direction, batches, first + number, damped, progress)
        with plain_arithmetic(device):
            image = {name: image[name] + shift[name] * direction[name] for name in image}
            curvature = _inner(direction, image)
            active = product > 0
            if not bool(torch.isfinite(curvature).all()):
                raise NumericalError("refine: a product with the Gauss-Newton matrix holds NaN or Inf.")
            if bool((active & (curvature <= 0)).any()):
                raise SingularError("refine: a direction has no curvature, and λ is zero there; give a damping.")
            step = torch.where(active, product / curvature, 0)
            answer = _plus(answer, direction, step)
            residual = _plus(residual, image, -step)
            solved = damped.solve(residual)
            new = _inner(residual, solved)
            direction = _plus(solved, direction, torch.where(active, new / product, 0))
            product = new
    with plain_arithmetic(device):
        missing = _inner(residual, residual)
        return Vectors.of_rows(damped.fisher, answer), torch.where(norm > 0, missing / norm, 0).sqrt()


def _inner(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> Tensor:
    """``⟨x_k, y_k⟩`` ``[K]``."""
    return torch.stack([(x[name] * y[name]).reshape(len(x[name]), -1).sum(1) for name in x]).sum(0)


def _plus(x: Mapping[str, Tensor], y: Mapping[str, Tensor], factor: Tensor) -> Rows:
    """``x_k + factor_k · y_k``."""
    return {name: x[name] + y[name] * factor.reshape(-1, *[1] * (y[name].dim() - 1)) for name in x}


def _shifts(damped: Damped, like: Mapping[str, Tensor]) -> Rows:
    """λ of every parameter ``[1, *shape]``."""
    found = {name: v.new_zeros(1, *v.shape[1:]) for name, v in like.items()}
    some = next(iter(found.values()))
    for (blocks, operator), value in zip(damped.fisher.entries, damped.damping, strict=True):
        scatter(blocks, some.new_full((1, operator.dim), value), found)
    return found


def _gauss_newton(
    network: Network,
    likelihood: Likelihood,
    directions: Rows,
    batches: Batches,
    number: int,
    damped: Damped,
    progress: Progress,
) -> Rows:
    """The exact Gauss-Newton matrix, a mean over F's examples, times K directions; one reading of the data."""
    count = damped.fisher.count
    parameters = {name: p for name, p in network.model.named_parameters() if name in directions}
    device = next(iter(parameters.values())).device
    total, tell = {name: torch.zeros_like(d) for name, d in directions.items()}, writer(progress)
    leaves, size, seen = list(parameters.values()), len(next(iter(directions.values()))), 0.0
    for where, batch in batches.read(number):
        batches.recognise(batch)
        damped.agree_on_data(batch)
        with isolate(network.model, network.seed + batches.index), sdpa_kernel(SDPBackend.MATH):
            outputs, targets = run(network.model, batch, network.forward, device, where)
            likelihood.check(outputs.detach(), targets, where, "observed")  # as the scores will, readings later
            counts, kept = likelihood.positions(outputs.detach(), targets), None
            if network.mask is not None:
                joint = likelihood.joint_dim(outputs, targets)
                given = positions_of(batch, network.mask, outputs, where)
                counts, kept = masked_positions(given, counts, where), along_outputs(given, outputs, joint, where)
            seen += likelihood.count(outputs.detach()) if counts is None else float(counts.any(dim=1).sum())
            if seen > count and not batches.ends:
                raise endless(where, count)
            dummy = torch.zeros_like(outputs, requires_grad=True)
            slopes = torch.autograd.grad(outputs, leaves, dummy, create_graph=True, materialize_grads=True)
            for k in range(size):
                along = [directions[name][k].to(p.dtype) for name, p in parameters.items()]
                (tangent,) = torch.autograd.grad(slopes, dummy, along, retain_graph=True, materialize_grads=True)
                vector = likelihood.hessian_product(outputs.detach(), tangent.detach(), targets).to(outputs.dtype)
                vector = vector if kept is None else vector * kept
                found = torch.autograd.grad(outputs, leaves, vector, retain_graph=True, materialize_grads=True)
                for name, gradient in zip(parameters, found, strict=True):
                    total[name][k] += promote(gradient).to(total[name].dtype)
            del outputs, slopes, dummy
        tell(f"conjugate gradients, step {number + 1}, {batches.index} batches")
    tell("")
    damped.agree_on_data(None)
    batches.require_same_number()
    if not count or abs(seen - count) >= 0.5:
        raise DataError(
            f"refine: the training data have {seen:,.0f} examples, and the Fisher counts {count:,.0f}: the exact "
            "matrix needs all of them, and no others. Give those of the estimate, or leave out refine= where they are "
            "scored in parts."
        )
    return {name: value / count for name, value in total.items()}
