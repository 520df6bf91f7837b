"""Inverses that one rank makes and keeps for all, which get its natural gradients."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from kronfisher.distributed import Ranks, describe, owners, raise_described
from kronfisher.optim.largest_factor import CHOLESKY, EIGENVECTORS
from kronfisher.optim.layer_inverse import LayerInverse
from kronfisher.optim.layer_statistics import LayerStatistics

__all__ = ["Ownership", "Share", "require_share"]

Share = Literal["all", "owned"]


def require_share(share: str) -> None:
    """ValueError unless it is one of the two ways to share inverses."""
    if share not in ("all", "owned"):
        raise ValueError(f"share={share!r}: use 'all' or 'owned'.")


class Ownership:
    """Which rank makes, keeps and applies which inverse, and what the others get of it.

    All ranks have the same layers, and make the same calls. Which inverses there are, and when they are made, follows
    from statistics that all of them have, so that nothing is agreed on: the runs of numbers that travel have the same
    length everywhere.

    Args:
        ranks: that train together.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._owner: dict[LayerStatistics, int] = {}
        self._work: dict[LayerStatistics, float] = {}
        self._parts: list[dict[str, tuple[int, int]]] | None = None  # by rank, where in its run a parameter lies
        self._failure: Exception | None = None
        self._tried = False  # whether any rank may have failed since the last exchange

    @staticmethod
    def of(ranks: Ranks | None, share: Share) -> "Ownership | None":
        """None where every rank has all inverses, as one process alone has."""
        return Ownership(ranks) if ranks is not None and share == "owned" else None

    def assign(self, inverses: Sequence[LayerInverse]) -> None:
        """Find owners of layers that have none, the dearest first; layers that share a parameter have one owner.

        Args:
            inverses: of all layers; those without statistics are left out.
        """
        known = {one.layer for one in inverses}
        if self._owner.keys() - known:
            self._owner = {layer: rank for layer, rank in self._owner.items() if layer in known}
            self._parts = None
        ready = [one for one in inverses if one.ready]
        if all(one.layer in self._owner for one in ready):
            return
        self._parts = None
        self._work.update((one.layer, _work(one)) for one in ready if one.layer not in self._owner)
        loads, new = [0.0] * self._ranks.size, []
        for some in _sharing(ready):
            owned = [self._owner[one.layer] for one in some if one.layer in self._owner]
            if owned:  # a layer that joins two others takes the second from its owner
                for one in some:
                    if self._owner.setdefault(one.layer, owned[0]) != owned[0]:
                        self._owner[one.layer] = owned[0]
                        one.forget()
                    loads[owned[0]] += self._work[one.layer]
            else:
                new.append(some)
        costs = [sum(self._work[one.layer] for one in some) for some in new]
        for some, rank in zip(new, owners(costs, self._ranks.size, loads), strict=True):
            self._owner.update((one.layer, rank) for one in some)

    def holds(self, one: LayerInverse) -> bool:
        """Whether this rank is the owner."""
        return self._owner.get(one.layer) == self._ranks.rank

    # Making -----------------------------------------------------------------------------------------------------------

    @contextmanager
    def making(self, inverses: Iterable[LayerInverse], value: float, step: int) -> Iterator[list[LayerInverse]]:
        """While the owner makes inverses with λ = `value`; an error waits for `exchange`, where all ranks learn of it.

        Yields:
            Those that this rank owns.
        """
        self._tried, self._parts, inverses = True, None, list(inverses)
        own = [one for one in inverses if self.holds(one)]
        try:
            yield own
        except Exception as error:
            self._failure = self._failure or error
        for one in inverses:
            if self.holds(one):  # what could not be made anew counts as made, as the others have to think
                one.value, one.made = value, step
            else:
                one.leave(value, step)

    # Exchange ---------------------------------------------------------------------------------------------------------

    def exchange(
        self,
        inverses: Sequence[LayerInverse],
        natural: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """The natural gradients of all owners, by one collective for each dtype.

        What travels is of all parameters that inverses cover, whichever have a gradient.

        Args:
            inverses: of all layers.
            natural: by name, of the layers of this rank.
            gradients: alike on all ranks.
            parameters: all that may be trained.

        Raises:
            RankError: an inverse could not be made at its owner, on the others. The owner gets its own error.
        """
        if self._parts is None:
            self._parts = self._planned(inverses, parameters)
        kinds = dict.fromkeys(parameters[name].dtype for part in self._parts for name in part)
        out: dict[str, Tensor] = {}
        for kind in kinds:
            ends = [
                max((end for name, (_, end) in part.items() if parameters[name].dtype == kind), default=0)
                for part in self._parts
            ]
            device = next(p.device for part in self._parts for name in part if (p := parameters[name]).dtype == kind)
            run = torch.zeros(max(ends) + 1, dtype=kind, device=device)  # the last number tells that something failed
            for name, (begin, end) in self._parts[self._ranks.rank].items():
                if name in natural and parameters[name].dtype == kind:
                    run[begin:end] = natural[name].reshape(-1)
            if self._failure is not None:
                run[-1] = 1.0
            found = self._ranks.beside(run)
            if self._tried:  # which waited for the device already, at owners
                self._tried = False
                if bool(found[:, -1].any()):
                    self._raise(inverses)
            for part, numbers in zip(self._parts, found, strict=True):
                for name, (begin, end) in part.items():
                    if name in gradients and (p := parameters[name]).dtype == kind:
                        out[name] = numbers[begin:end].view(p.shape).to(p.device)
        return out

    def _planned(
        self, inverses: Sequence[LayerInverse], parameters: Mapping[str, Tensor]
    ) -> list[dict[str, tuple[int, int]]]:
        parts: list[dict[str, tuple[int, int]]] = [{} for _ in range(self._ranks.size)]
        ends: dict[tuple[int, torch.dtype], int] = {}
        for one in inverses:
            if one.made < 0:
                continue
            rank = self._owner[one.layer]
            for name in (name for block in one.blocks for name in block.parameters):
                if name not in parts[rank]:
                    kind = rank, parameters[name].dtype
                    begin = ends.get(kind, 0)
                    parts[rank][name] = begin, begin + parameters[name].numel()
                    ends[kind] = begin + parameters[name].numel()
        return parts

    def _raise(self, inverses: Sequence[LayerInverse]) -> None:
        """What went wrong, on all ranks, which are to try again."""
        error, self._failure = self._failure, None
        missing = [place for place, one in enumerate(inverses) if self.holds(one) and one.inverse is None]
        everywhere = self._ranks.gather((describe(error), missing), "tells that an inverse could not be made")
        for one in (inverses[place] for _, places in everywhere for place in places):
            one.forget()
        self._parts = None
        raise_described([failure for failure, _ in everywhere], error)

    # State ------------------------------------------------------------------------------------------------------------

    def gathered(self, inverses: Sequence[LayerInverse], device: torch.device) -> list[dict[str, Any]]:
        """The states of all inverses, each as its owner has it."""
        own = {place: one.state_dict() for place, one in enumerate(inverses) if self.holds(one)}
        found = {}
        for some in self._ranks.share(own, "brings its inverses, for the state of the optimiser", device):
            found |= some
        return [found[place] if place in found else one.state_dict() for place, one in enumerate(inverses)]

    def state_dict(self, inverses: Sequence[LayerInverse]) -> list[Any]:
        """Which rank owns what, so that as many ranks go on as they were."""
        return [self._ranks.size, [self._owner.get(one.layer, -1) for one in inverses]]

    def load_state_dict(self, state: Sequence[Any], inverses: Sequence[LayerInverse]) -> None:
        """Take over what `state_dict` gave, if that was of as many ranks; inverses of others are let go of."""
        self.__init__(self._ranks)
        size, own = state or (0, [])
        if size == self._ranks.size:
            for one, rank in zip(inverses, own, strict=True):
                if rank >= 0:
                    self._owner[one.layer], self._work[one.layer] = rank, _work(one)
        self.assign(inverses)
        for one in inverses:
            if one.made >= 0 and not self.holds(one):
                one.leave(one.value, one.made)


def _sharing(inverses: Sequence[LayerInverse]) -> list[list[LayerInverse]]:
    """Layers that share a parameter, directly or through others, in their order."""
    found: dict[str, list[LayerInverse]] = {}
    for one in inverses:
        names = [name for block in one.blocks for name in block.parameters]
        joined = [*{id(each): each for name in names for each in found.get(name, [])}.values(), one]
        found |= {name: joined for each in joined for block in each.blocks for name in block.parameters}
    return list({id(some): some for some in found.values()}.values())


def _work(one: LayerInverse) -> float:
    """Multiplications that are as dear as making the inverse, from the sums that it is made of."""
    each = EIGENVECTORS if one.layer.passes > 1 or one.other is not None else CHOLESKY
    average = one.layer.average
    sums = [] if average is None else [sum for state in average.states for sum in state.sums.values()]
    matrices = [sum for sum in sums if sum.dim() > 1 and sum.shape[-1] == sum.shape[-2]]
    return each * sum(float(matrix.numel() * matrix.shape[-1]) for matrix in matrices) + one.dim
