"""The forms in which a user may write a vector over the parameters, and the way back."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from kronfisher.errors import DataError

__all__ = ["Form", "Shapes", "Vector", "flatten", "read"]

Vector = Tensor | Mapping[str, Tensor]
Shapes = Mapping[str, torch.Size]


@dataclass(frozen=True)
class Form:
    """Flat or by parameter; one vector or K of them."""

    flat: bool
    many: bool

    def write(self, rows: dict[str, Tensor]) -> Vector:
        """``{name: [K, *shape]}`` in this form."""
        if self.flat:
            vectors = flatten(rows)
            return vectors.mT if self.many else vectors[0]
        return rows if self.many else {name: tensor[0] for name, tensor in rows.items()}


def flatten(rows: Mapping[str, Tensor]) -> Tensor:
    """``{name: [K, *shape]}`` as ``[K, P]``."""
    return torch.cat([t.reshape(len(t), prod(t.shape[1:])) for t in rows.values()], dim=1)  # a number's t is [K]


def read(v: Vector, shapes: Shapes) -> tuple[dict[str, Tensor], Form]:
    """Any form of vector as ``{name: [K, *shape]}`` in the order of `shapes`.

    Raises:
        DataError: names, shapes or numbers do not fit; the message lists what is missing or unknown.
    """
    if isinstance(v, Tensor):
        rows, form = _from_flat(v, shapes)
    elif isinstance(v, Mapping):
        rows, form = _from_names(v, shapes)
    else:
        raise DataError(f"a vector is a dict of tensors by parameter name or one flat tensor, not {type(v).__name__}")
    return rows, form


def _from_flat(v: Tensor, shapes: Shapes) -> tuple[dict[str, Tensor], Form]:
    sizes = [prod(shape) for shape in shapes.values()]
    if v.dim() not in (1, 2) or v.shape[0] != sum(sizes):
        raise DataError(f"a flat vector here is [{sum(sizes)}] or [{sum(sizes)}, K], not {list(v.shape)}")
    rows = v[None] if v.dim() == 1 else v.mT
    parts = rows.split(sizes, dim=1)
    named = {n: part.reshape(len(rows), *shape) for part, (n, shape) in zip(parts, shapes.items(), strict=True)}
    return named, Form(flat=True, many=v.dim() == 2)


def _from_names(v: Mapping[str, Tensor], shapes: Shapes) -> tuple[dict[str, Tensor], Form]:
    missing, unknown = [n for n in shapes if n not in v], [n for n in v if n not in shapes]
    if missing or unknown:
        raise DataError(
            "a vector must name exactly the parameters that the Fisher covers"
            + (f"; missing: {', '.join(missing)}" if missing else "")
            + (f"; unknown: {', '.join(unknown)}" if unknown else "")
        )
    if odd := [f"{name} is {type(v[name]).__name__}" for name in shapes if not isinstance(v[name], Tensor)]:
        raise DataError(
            f"a vector holds a tensor for every parameter, and {', '.join(odd)}. A parameter whose .grad is None did "
            "not act on the loss: give it zeros, such as torch.zeros_like(p)."
        )
    counts = {}  # None for one vector without the leading axis
    for name, shape in shapes.items():
        if v[name].shape != shape and v[name].shape[1:] != shape:
            expected = f"{list(shape)}, or [K{''.join(f', {n}' for n in shape)}] for K vectors"
            raise DataError(f"the vector at {name} has shape {list(v[name].shape)}; expected {expected}")
        counts[name] = None if v[name].shape == shape else len(v[name])
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} has {'one' if n is None else f'[{n}, ...]'}" for name, n in counts.items())
        raise DataError(f"all parameters must hold the same number of vectors; {listed}")
    many = None not in counts.values()
    return {name: v[name] if many else v[name][None] for name in shapes}, Form(flat=False, many=many)
