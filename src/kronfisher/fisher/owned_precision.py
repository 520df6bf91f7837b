"""The precision of a block that one rank holds: what it gives, all ranks get."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from kronfisher.distributed import Ranks
from kronfisher.errors import RankError
from kronfisher.fisher.parameters import fingerprint
from kronfisher.fisher.precision import Group, Precision, logdet
from kronfisher.operators import Operator
from kronfisher.operators.owned import Owned

__all__ = ["OwnedPrecision", "agree", "determinant", "own_parts", "precision_of"]


@dataclass(frozen=True, eq=False)
class OwnedPrecision(Precision):
    """As `Precision`, of a matrix at one rank. Every method is a collective: all ranks call it, in the same order.

    Attributes:
        own: the precision at the owner; elsewhere None.
    """

    own: Precision | None = None

    def __post_init__(self) -> None:
        """The owner has checked the prior."""

    @classmethod
    def of(cls, operator: Owned, scale: float, prior: Tensor, name: str) -> "OwnedPrecision":
        """That of a matrix."""
        made: list[Precision] = []

        def make() -> None:
            made.append(Precision(operator.held, scale, prior, name))

        operator.ranks.of(operator.owner, make, operator.where)
        return cls(operator, scale, prior, name, True, made[0] if made else None)

    @property
    def at(self) -> Owned:
        """The matrix."""
        assert isinstance(self.operator, Owned)
        return self.operator

    def where_held(self, function: Callable[[Precision], Any]) -> Any:
        return self.at.ranks.of(self.at.owner, lambda: function(self._held()), self.at.where)

    def _held(self) -> Precision:
        assert self.own is not None, "only the owner computes"
        return self.own

    def solves(self, rows: Tensor) -> Tensor:
        return self.at.ranks.fill(rows, self.at.owner, lambda: self._held().solves(rows))

    def noise_dim(self) -> int:
        return self.where_held(lambda own: own.noise_dim())

    def colour(self, noise: Tensor) -> Tensor:
        like = noise.new_empty(len(noise), self.operator.dim)
        return self.at.ranks.fill(like, self.at.owner, lambda: self._held().colour(noise))

    def inverse_diagonal(self) -> Tensor:
        return self.where_held(lambda own: own.inverse_diagonal())

    @cached_property
    def flat_directions(self) -> int | None:
        return self.where_held(lambda own: own.flat_directions)

    def logdet(self, scale: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
        c = self._number(self.scale if scale is None else scale)
        f = self._number(1.0 if factor is None else factor)
        return _AtOwner.apply(c, f, self.at, lambda c, f: self._held().logdet(c, f))

    def times(self, factor: float) -> Precision:
        own = None if self.own is None else self.own.times(factor)
        return replace(self, prior=self.prior * factor, own=own)

    def with_scale(self, scale: float) -> Precision:
        return replace(self, scale=scale, own=None if self.own is None else self.own.with_scale(scale))


def precision_of(operator: Operator, scale: float, prior: Tensor, name: str) -> Precision:
    """``c·X + diag(p)``, wherever X is."""
    if isinstance(operator, Owned):
        return OwnedPrecision.of(operator, scale, prior, name)
    return Precision(operator, scale, prior, name)


def determinant(operator: Operator, scale: Tensor, prior: Tensor, name: str) -> Tensor:
    """`kronfisher.fisher.precision.logdet`, wherever X is."""
    if isinstance(operator, Owned):
        return _AtOwner.apply(scale, prior, operator, lambda c, p: logdet(operator.held, c, p, name))
    return logdet(operator, scale, prior, name)


def own_parts(
    entries: Mapping[Group, Sequence[Precision]],
) -> tuple[Ranks | None, Mapping[Group, Sequence[Precision] | None]]:
    """Of a sum over blocks what this rank computes, None for blocks that others do, and the ranks that add it up.

    So a sum over blocks takes one exchange, however many blocks and candidates there are. Where ranks hold nothing
    apart, this one computes all by itself.

    Args:
        entries: blocks → candidates of their precision.
    """
    every = (one for several in entries.values() for one in several)
    first = next((one for one in every if isinstance(one, OwnedPrecision)), None)
    if first is None:
        return None, entries
    ranks, own = first.at.ranks, {}
    for group, several in entries.items():
        held = [one.own if isinstance(one, OwnedPrecision) else one if ranks.rank == 0 else None for one in several]
        own[group] = None if None in held else held
    return ranks, own


def agree(precisions: Iterable[Precision], what: str, value: Any) -> None:
    """Where ranks hold precisions apart, require that all of them ask the same.

    Raises:
        RankError: they do not; on all ranks.
    """
    owned = next((one for one in precisions if isinstance(one, OwnedPrecision)), None)
    if owned is None:
        return
    digests = owned.at.ranks.gather(_digest(value), "compares what ranks ask together")
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise RankError(
                f"{what}: rank {rank} has another than rank 0. Blocks stay with their owners (share='owned'), so that "
                "all ranks answer together: give them the same, or estimate with share='all'."
            )


def _digest(value: Any) -> str:
    if isinstance(value, Tensor):
        return fingerprint({"": value})
    if isinstance(value, dict):
        return str({key: _digest(inner) for key, inner in value.items()})
    return str([_digest(inner) for inner in value]) if isinstance(value, list | tuple) else repr(value)


class _AtOwner(Function):
    """A number that the owner of a matrix computes from two tensors, and its derivatives by them."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, at: Owned, function: Callable[..., Tensor]) -> Tensor:
        def compute() -> tuple[Tensor, ...]:
            leaves = [one.detach().requires_grad_() for one in (first, second)]
            with torch.enable_grad():
                value = function(*leaves)
            return value.detach(), *torch.autograd.grad(value, leaves)

        value, *slopes = at.ranks.of(at.owner, compute, at.where)
        ctx.save_for_backward(*slopes)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return *(grads[0] * slope for slope in ctx.saved_tensors), None, None
