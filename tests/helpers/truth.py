"""Dense float64 truth of Fisher matrices and posteriors, by automatic differentiation one example at a time.

Nothing here uses the capture. `dense_fisher` differentiates ``-log_prob`` twice and needs nothing of a likelihood but
that; `exact_fisher` takes the likelihood's own columns and any form of input.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import kronfisher as kf
from kronfisher.fisher.layout import gather
from kronfisher.fisher.vectors import read
from kronfisher.likelihoods import Draws, Likelihood


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def positions(model: nn.Module) -> dict[str, Tensor]:
    """Name → places in the flat vector of the trainable parameters, shaped like the parameter."""
    found, start = {}, 0
    for name, p in trainable(model).items():
        found[name] = torch.arange(start, start + p.numel()).reshape(p.shape)
        start += p.numel()
    return found


def derivative(loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of x, and the gradient of the loss there, which can be differentiated again."""
    x = x.detach().requires_grad_()
    return x, torch.autograd.grad(loss(x, y), x, create_graph=True)[0]


def second_derivative(loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """``[*shape, *shape]``, row by row: for few numbers several times as fast as functions of functions."""
    x, gradient = derivative(loss, x, y)
    rows = [torch.autograd.grad(g, x, retain_graph=True, materialize_grads=True)[0] for g in gradient.flatten()]
    return torch.stack(rows).reshape(*x.shape, *x.shape)


def output_vectors(
    likelihood: Likelihood,
    outputs: Tensor,
    targets: Tensor,
    labels: str,
    samples: int = 1,
    seed: int = 0,
    averaged: Callable[[Tensor, Tensor], Sequence[Tensor]] | None = None,
) -> Tensor:
    """What to back-propagate, ``[V, N, *shape]``: a root of autograd's Hessian, drawn labels, or the gradient.

    Where the Hessian depends on the label, `averaged` gives the labels over which to take its mean.
    """
    outputs = outputs.detach()
    if labels == "sampled":
        draws = [likelihood.sampled(outputs, targets, Draws(seed, stream)) for stream in range(samples)]
        return torch.stack(draws) / samples**0.5

    def loss(datum: Tensor, target: Tensor) -> Tensor:
        return -likelihood.log_prob(datum[None], target[None])[0]

    if labels == "observed":
        pairs = zip(outputs, targets, strict=True)
        return torch.stack([derivative(loss, x, y)[1].detach() for x, y in pairs])[None]
    size = outputs[0].numel()
    roots = []
    several = averaged(outputs, targets) if averaged else [targets]
    for x, *ys in zip(outputs, *several, strict=True):
        hessian = torch.stack([second_derivative(loss, x, y).reshape(size, size) for y in ys]).mean(0)
        values, vectors = torch.linalg.eigh(hessian)
        roots.append((vectors * values.clamp_min(0).sqrt()).T.reshape(size, *x.shape))
    return torch.stack(roots, dim=1)


def gradients(model: nn.Module, x: Tensor, vectors: Tensor) -> Tensor:
    """``vec(G_k)`` of every datum and vector, ``[V, N, P]``, by one backward pass each."""
    parameters = list(trainable(model).values())
    found = []
    for k in range(len(x)):
        outputs = model(x[k : k + 1])
        for v in vectors[:, k]:
            parts = torch.autograd.grad(outputs, parameters, v[None], retain_graph=True, materialize_grads=True)
            found.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(found).unflatten(0, (len(x), -1)).transpose(0, 1)


def dense(rows: Tensor, count: float) -> Tensor:
    """``Σ_k vec(G_k) vec(G_k)ᵀ / N`` of ``[V, N, P]``."""
    rows = rows.flatten(0, 1)
    return rows.T @ rows / count


def dense_fisher(
    model: nn.Module,
    x: Tensor,
    targets: Tensor,
    likelihood: Likelihood,
    labels: str = "exact",
    samples: int = 1,
    seed: int = 0,
) -> Tensor:
    """The whole Fisher matrix of the mean over data, every datum counted."""
    vectors = output_vectors(likelihood, model(x), targets, labels, samples, seed)
    return dense(gradients(model, x, vectors), len(x))


def exact_fisher(model, batches, likelihood=None, targets=None):
    """``[P, P]`` in float64: mean over data of ``Jᵀ H J``, a sum over columns of each datum's output Hessian root."""
    likelihood = likelihood or kf.Gaussian()
    parameters = [p for p in model.parameters() if p.requires_grad]
    total, count = 0.0, 0
    for inputs in batches if isinstance(batches, list) else [batches]:
        outputs = model(inputs)
        count += len(outputs)
        for column in likelihood.exact(outputs.detach(), targets):
            for k in range(len(outputs)):
                alone = torch.zeros_like(column)
                alone[k] = column[k]
                found = torch.autograd.grad(outputs, parameters, alone, retain_graph=True, allow_unused=True)
                parts = [
                    p.new_zeros(p.numel()) if g is None else g.to_dense().flatten()
                    for p, g in zip(parameters, found, strict=True)
                ]
                row = torch.cat(parts).double()
                total = total + torch.outer(row, row)
    return total / count


def completed(diagonal, links):
    """The matrix of given diagonal and neighbouring blocks whose inverse is zero elsewhere, built block by block."""
    blocks = {(k, k): block for k, block in enumerate(diagonal)}
    for j in range(1, len(diagonal)):
        for i in reversed(range(j)):
            between = torch.linalg.inv(diagonal[i + 1])
            blocks[i, j] = links[i] if j == i + 1 else links[i] @ between @ blocks[i + 1, j]
            blocks[j, i] = blocks[i, j].T
    size = range(len(diagonal))
    return torch.cat([torch.cat([blocks[i, j] for j in size], dim=1) for i in size])


def kept(fisher):
    """``[P, P]``: 1 where the structure keeps an element of the exact matrix, for fits that are exact there."""
    positions, _ = read(torch.arange(fisher.dim), fisher.shapes)
    mask = torch.zeros(fisher.dim, fisher.dim, dtype=torch.float64)
    for blocks, operator in fisher.entries:
        index = gather(blocks, positions)[0]
        mask[index[:, None], index] = torch.eye(len(index), dtype=torch.float64) if operator.kind == "diagonal" else 1.0
    return mask


def jacobian(model, x, names):
    """``[n, C, P]``."""
    outputs = model(x)
    parameters = [p for name, p in model.named_parameters() if name in names]
    rows = []
    for value in outputs.flatten():
        found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    torch.zeros_like(p).flatten() if g is None else g.flatten()
                    for p, g in zip(parameters, found, strict=True)
                ]
            )
        )
    return torch.stack(rows).reshape(len(outputs), -1, len(rows[0])).detach()


def precision(fisher, prior, scale=1.0):
    """``N·F·scale + diag(prior)`` for a flat or a single prior."""
    n = fisher.count if fisher.reduction == "mean" else 1
    dense = fisher.to_dense()
    return n * scale * dense + torch.as_tensor(prior, dtype=dense.dtype).expand(len(dense)).diag()
