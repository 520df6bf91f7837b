"""The prior in any of the forms accepted: a precision for every block of a Fisher, a mean for every parameter."""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from kronfisher.errors import DataError
from kronfisher.fisher import Fisher
from kronfisher.fisher.blocks import Block
from kronfisher.fisher.layout import gather
from kronfisher.fisher.vectors import read
from kronfisher.operators.algebra import as_number

__all__ = ["PriorPrecision", "entries", "read_mean", "read_prior"]

PriorPrecision = float | Tensor | Sequence[float] | Mapping[str, float | Tensor]


def entries(fisher: Fisher) -> Iterator[tuple[str, tuple[Block, ...], Any]]:
    """Name, blocks and operator of every entry of a Fisher."""
    for name, (blocks, operator) in zip(fisher.blocks, fisher.entries, strict=True):
        yield name, blocks, operator


def read_prior(value: PriorPrecision, fisher: Fisher) -> list[Tensor]:
    """For every entry of the Fisher its prior precision: 0-dim where it is one number, else ``[D]`` in canonical order.

    Args:
        value: a number for all; ``[blocks]`` in the order of ``fisher.blocks``; a flat ``[P]``; or a mapping from block
            names or parameter names to a number or a tensor of the parameter's shape, for each of them.
        fisher: whose blocks they are.

    Returns:
        Tensors of the Fisher's dtype and device; differentiable in the tensors given.

    Raises:
        DataError: a name is unknown or missing, or a shape does not fit.
        ValueError: a precision is negative or not finite.
    """
    parts = list(entries(fisher))
    like = torch.empty((), dtype=fisher.dtype, device=fisher.device)
    if isinstance(value, Mapping):
        priors = _from_names(value, fisher, like)
    else:
        given = (
            value.to(like) if isinstance(value, Tensor) else torch.as_tensor(value, dtype=like.dtype).to(like.device)
        )
        if given.dim() == 0:
            priors = [given] * len(parts)
        elif given.dim() == 1 and len(given) == len(parts):
            priors = list(given)
        elif given.dim() == 1 and len(given) == fisher.dim:
            rows, _ = read(given, fisher.shapes)
            priors = [gather(blocks, rows)[0] for _, blocks, _ in parts]
        else:
            raise DataError(
                f"prior_precision {list(given.shape)}: give one number, one for each of the {len(parts)} blocks, one "
                f"for each of the {fisher.dim} parameters, or a mapping by name."
            )
    for (name, _, _), tensor in zip(parts, priors, strict=True):
        least = tensor.detach()
        if not bool(((least >= 0) & torch.isfinite(least)).all()):
            raise ValueError(f"prior_precision of {name}: it must be finite and at least 0 everywhere.")
    return priors


def read_mean(value: float | Mapping[str, float | Tensor], means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The prior mean of every parameter, ``{name: [*shape]}``.

    Args:
        value: a number for all, or a number or a tensor for each of them by name.
        means: parameters whose names, shapes, dtypes and devices they take.

    Raises:
        DataError: a name is unknown or missing.
    """
    given = value if isinstance(value, Mapping) else dict.fromkeys(means, value)
    if odd := given.keys() ^ means.keys():
        raise DataError(
            f"prior_mean must name exactly the parameters of the posterior; it differs in {', '.join(sorted(odd))}."
        )
    return {name: torch.as_tensor(given[name]).to(mean).expand(mean.shape) for name, mean in means.items()}


def _from_names(value: Mapping[str, Any], fisher: Fisher, like: Tensor) -> list[Tensor]:
    known = {*fisher.blocks, *fisher.shapes}
    if unknown := [name for name in value if name not in known]:
        raise DataError(
            f"prior_precision names {', '.join(unknown)}, which the Fisher does not cover; it has the blocks "
            f"{', '.join(fisher.blocks)} and the parameters {', '.join(fisher.shapes)}."
        )
    priors, missing = [], []
    for name, blocks, _ in entries(fisher):
        parameters = list(dict.fromkeys(p for block in blocks for p in block.parameters))
        # A block has the name of its weight: the name alone stands for all of the block.
        whole = (
            value.get(name) if name in fisher.blocks and not any(p in value for p in parameters if p != name) else None
        )
        if whole is not None and (not isinstance(whole, Tensor) or whole.dim() == 0):
            priors.append(_number(whole, like))
            continue
        if lacking := [p for p in parameters if p not in value]:
            missing += lacking
            continue
        numbers = [as_number(value[p]) if not isinstance(value[p], Tensor) else None for p in parameters]
        if None not in numbers and len(set(numbers)) == 1:
            priors.append(_number(numbers[0], like))
            continue
        rows = {}
        for p in parameters:
            tensor, shape = _number(value[p], like), fisher.shapes[p]
            if tensor.dim() and tensor.shape != shape:
                raise DataError(f"prior_precision of {p} has shape {list(tensor.shape)}; expected {list(shape)}.")
            rows[p] = tensor.expand(shape)[None] if prod(shape) else tensor.new_zeros((1, *shape))
        priors.append(gather(blocks, rows)[0])
    if missing:
        raise DataError(f"prior_precision leaves out {', '.join(missing)}; name every block or parameter.")
    return priors


def _number(value: Any, like: Tensor) -> Tensor:
    return value.to(like) if isinstance(value, Tensor) else torch.tensor(float(value), dtype=like.dtype).to(like.device)
