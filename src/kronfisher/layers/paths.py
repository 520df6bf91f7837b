"""Several weights in one contraction: each is a layer on the path from the data to the output."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kronfisher.errors import UnsupportedError
from kronfisher.fisher.blocks import Window
from kronfisher.layers.computed import MappedUse
from kronfisher.layers.contraction import Labels, contraction
from kronfisher.layers.use import Use

__all__ = ["PathUse", "paths"]


@dataclass(frozen=True)
class Operand:
    """A factor of a product.

    Attributes:
        tensor: its value.
        letters: of its axes.
        version: of the tensor, which tells whether it was changed in place since.
    """

    tensor: Tensor
    letters: str
    version: int


@dataclass
class PathUse(MappedUse):
    """A use whose output is multiplied by others before it is the output of the call.

    Attributes:
        output: the letters of the call's output.
        own: those of the output of this use.
        sizes: of the axes.
        others: what it is multiplied by.
    """

    output: str = ""
    own: str = ""
    sizes: dict[str, int] = field(default_factory=dict)
    others: Sequence[Operand] = ()

    def _shape(self) -> tuple[int, ...]:
        return tuple(self.sizes[c] for c in self.own)

    def _mapped(self, gradient: Tensor) -> Tensor:
        if any(other.tensor._version != other.version for other in self.others):
            raise UnsupportedError(
                f"{self.name}: an operand of this contraction was modified in place after it had been used, so its "
                "values are gone. Replace that in-place operation by one that returns a new tensor."
            )
        equation = ",".join([self.output, *(other.letters for other in self.others)]) + "->" + self.own
        pulled = torch.einsum(equation, gradient, *(other.tensor.to(gradient) for other in self.others))
        return pulled.expand(self._shape())

    def lead(self, output: tuple[int, ...]) -> tuple[int, ...]:
        return self.inner.lead(self._shape())

    def forget(self) -> None:
        super().forget()
        self.others = ()


@dataclass(frozen=True, eq=False)
class Value:
    """A product of some of the operands.

    Attributes:
        tensor: its value.
        letters: of its axes.
        made_of: places of the operands.
    """

    tensor: Tensor
    letters: str
    made_of: frozenset[int]


def paths(
    weights: Mapping[int, tuple[Window, str]],
    data: Sequence[int],
    operands: Sequence[Tensor],
    names: Sequence[str],
    output: str,
    sizes: dict[str, int],
) -> Iterator[Use]:
    """The uses of several weights, by data with which weights and constants are multiplied one after the other.

    Args:
        weights: place of an operand → the window on a weight that it is, and the letters of its axes.
        data: places of operands that depend on the data; the others are constants.
        operands: all of them.
        names: of each the letters of its axes.
        output: the letters of the output's axes.
        sizes: of the axes.
    """
    values = [Value(operands[k], names[k], frozenset([k])) for k in data]
    of_parameters = [k in weights or operand.grad_fn is not None for k, operand in enumerate(operands)]
    operands = [operand.detach() for operand in operands]
    left, uses = [k for k in range(len(operands)) if k not in data], []
    while values:
        place, value = min(
            ((k, value) for k in left for value in values), key=lambda pair: _distance(names, output, *pair)
        )
        made_of = value.made_of | {place}
        others = [Operand(t, names[k], t._version) for k, t in enumerate(operands) if k not in made_of]
        needed = output + "".join(other.letters for other in others)
        own = "".join(c for c in dict.fromkeys(value.letters + names[place]) if c in needed)
        if place in weights:
            window, letters = weights[place]
            inner = next(contraction(window, value.tensor, Labels(value.letters, letters, own), sizes), None)
            if inner is None:
                return
            inner.reads_data = not any(of_parameters[k] for k in value.made_of)
            uses.append(PathUse(inner.weight, inner.bias, None, inner, output, own, sizes, others))
        left.remove(place)
        if weights.keys().isdisjoint(left):
            break
        equation = f"{value.letters},{names[place]}->{own}"
        made = torch.einsum(equation, value.tensor.detach(), operands[place])
        values[values.index(value)] = Value(made, own, made_of)
    yield from uses


def _distance(names: Sequence[str], output: str, place: int, value: Value) -> int:
    """Zero where a value and an operand have an axis in common that nothing else has, one where others have it."""
    rest = output + "".join(name for k, name in enumerate(names) if k != place and k not in value.made_of)
    common = [c for c in names[place] if c in value.letters]
    return 0 if any(c not in rest for c in common) else 1 if common else 2
