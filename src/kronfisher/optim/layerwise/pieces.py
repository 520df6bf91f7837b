"""Parameters cut into pieces that stay in a processor's cache while one operation after the other goes over them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kronfisher.optim.foreach import add_products_, differences, norms
from kronfisher.optim.layerwise.rates import Paths
from kronfisher.optim.layerwise.units import Unit

__all__ = ["Pieces"]

MOST = 2**16  # elements of a piece; on an accelerator a parameter is one
EVERYTHING = 2**62


class Pieces:
    """Some parameters, those of natural units first, as pieces ``[E]``, and which unit each of them belongs to.

    Attributes:
        members: unit and name of each parameter.
        names: of the parameters.
        own: whether each parameter is of a natural unit.
        most: elements of a piece.
        border: the number of pieces of natural units.
        firsts: parameter → its first piece.
        turns: pieces that are treated at once, all natural or none.
        moving: units with any of these parameters, ``[U]``.
        natural: units that follow the natural gradient, ``[U]``; `adaptive` the others.
        root: the root of the number of elements of these parameters by unit, ``[U]``.
        table: units that move at the full rate though they are no matrices of layers, ``[U]``.
        nothing: zero, 0-dim.
        paths: the averages that units move along; for whoever moves them.
        size: steps of natural units of rate one ``[U]``; likewise.
        relative: the rates of adaptive units ``[U]``, relative to the rate; likewise.
    """

    paths: Paths
    size: Tensor
    relative: Tensor

    def __init__(
        self, members: list[tuple[int, str]], units: Sequence[Unit], numel: list[int], device: torch.device
    ) -> None:
        self.members, self.names = members, [name for _, name in members]
        self.own = [units[place].natural for place, _ in members]
        self.most = MOST if device.type == "cpu" else EVERYTHING
        self._shares: Tensor | None = None
        self._digits: list[str] = []
        self._lasting: dict[str, tuple[list[int], list[Tensor]]] = {}
        index, sizes, self.firsts, self.turns = [], [], [], []
        self.border = waiting = 0
        for (place, _), size, own in zip(members, numel, self.own, strict=True):
            self.firsts.append(len(index))
            for low in range(0, max(size, 1), self.most):
                piece = min(size - low, self.most)
                if waiting + piece > self.most or not self.turns or (not own and len(index) == self.border):
                    self.turns.append(slice(len(index), len(index)))
                    waiting = 0
                index.append(place)
                sizes.append(float(piece))
                waiting += piece
                self.turns[-1] = slice(self.turns[-1].start, len(index))
                self.border += own
        self._count, self.index = len(index), torch.tensor(index, device=device)
        count = torch.zeros(len(units), device=device).index_add_(0, self.index, torch.tensor(sizes, device=device))
        self.moving, self.root, self.nothing = count > 0, count.sqrt(), count.new_zeros(())
        self.natural, self.table = (
            torch.tensor([getattr(unit, key) for unit in units], device=device) for key in ("natural", "table")
        )
        self.adaptive = ~self.natural

    def cut(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The pieces of tensors of these parameters; copies where they do not lie in row-major order."""
        flat = [tensor if tensor.dim() == 1 else tensor.reshape(-1) for tensor in tensors]
        if self._count == len(flat):
            return flat
        return [piece for one in flat for piece in (one.split(self.most) if one.numel() > self.most else (one,))]

    def lasting(self, key: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The same of tensors that are changed in place from step to step: views that are made once.

        They hold on to the memory, so that whatever lies at the same address is the same.
        """
        if not all(tensor.is_contiguous() for tensor in tensors):
            return self.cut([tensor.detach() for tensor in tensors])
        places = [tensor.data_ptr() for tensor in tensors]
        known = self._lasting.get(key)
        if known is None or known[0] != places:
            known = self._lasting[key] = places, self.cut([tensor.detach() for tensor in tensors])
        return known[1]

    def measure(self, given: list[Tensor], momenta: list[Tensor], directions: list[Tensor]) -> Sequence[Tensor]:
        """``⟨g, m⟩``, ``⟨g, d⟩`` and ``‖d‖²`` of units ``[U]``."""
        along, across, lengths = [], [], []
        for some in self.turns:
            along += map(torch.dot, given[some], momenta[some])
            across += map(torch.dot, given[some], directions[some])
            lengths += norms(directions[some])
        values = self._stacked([*along, *across, *lengths]).view(3, -1)
        values[2].square_()
        return self.moving.new_zeros(3, len(self.moving), dtype=values.dtype).index_add_(1, self.index, values).unbind()

    def product_with_differences(self, given: list[Tensor], tensors: list[Tensor], others: list[Tensor]) -> Tensor:
        """``⟨g, x − y⟩`` over all natural units, 0-dim."""
        products = []
        for some in self.turns:
            if some.start < self.border:
                products += map(torch.dot, given[some], differences(tensors[some], others[some]))
        return self._stacked(products).sum()

    def lengths(self, each: list[Tensor]) -> Tensor:
        """Norms of units ``[U]`` from those of pieces."""
        return torch.zeros_like(self.root).index_add_(0, self.index, self._stacked(each).square_()).sqrt_()

    def _stacked(self, values: list[Tensor]) -> Tensor:
        """0-dim tensors as one."""
        if not values:
            return self.root.new_zeros(0)
        kind = values[0].dtype
        alike = all(value.dtype == kind for value in values)
        return torch.stack(values if alike else [value.float() for value in values]).to(self.root.dtype)

    def share_rates(self, shares: Sequence[float]) -> None:
        """Take over shares of the largest learning rate; schedules that scale all rates alike leave them alone."""
        if all(share == 1.0 for share in shares):
            self._shares = None
            return
        digits = [f"{share:.6g}" for share in shares]  # beyond these, quotients of scheduled rates are noise
        if self._shares is None or digits != self._digits:
            counts = [b - a for a, b in zip(self.firsts, [*self.firsts[1:], len(self.index)], strict=True)]
            each = [float(digit) for digit, count in zip(digits, counts, strict=True) for _ in range(count)]
            self._digits, self._shares = digits, torch.tensor(each, device=self.index.device)

    def spread(self, values: Tensor, like: Sequence[Tensor], places: Sequence[int] | None = None) -> Sequence[Tensor]:
        """The values ``[U]`` of their units, one 0-dim tensor for each piece, or for the pieces at some places."""
        each = values[self.index].unbind()
        return _typed(each if places is None else [each[place] for place in places], like)

    def add_to(self, parameters: Sequence[Tensor], updates: Sequence[Tensor], factors: Tensor) -> None:
        """Add updates times the factors of their units ``[U]`` and the shares of the learning rate."""
        chosen = factors[self.index]
        each = _typed((chosen if self._shares is None else chosen * self._shares).unbind(), updates)
        pieces = self.lasting("parameters", parameters)
        for some in self.turns:
            add_products_(pieces[some], updates[some], each[some])
        for parameter, first, last in zip(parameters, self.firsts, [*self.firsts[1:], len(pieces)], strict=True):
            if not parameter.is_contiguous():  # the pieces were copies
                parameter.detach().copy_(torch.cat(pieces[first:last]).view(parameter.shape))


def _typed(values: Sequence[Tensor], like: Sequence[Tensor]) -> Sequence[Tensor]:
    """The values in the dtypes of some tensors."""
    if all(value.dtype == tensor.dtype for value, tensor in zip(values, like, strict=True)):
        return values
    return [value.to(tensor.dtype) for value, tensor in zip(values, like, strict=True)]
