"""Chains of layers: which block follows which, for fits that treat neighbours together, and where a chain is cut.

Two blocks are neighbours where the first feeds the second and nothing else does or is fed, as the autograd graph
tells, and where row r of the one comes before row r of the other. The latter is tested: a gradient that is nonzero in
a few rows only is carried from the one back to the other and has to arrive in these rows. Shapes alone would not show
a transposition between the two, which would pair inputs of one position with inputs of another.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from kronfisher.capture.graph import Call
from kronfisher.capture.observation import Observation
from kronfisher.capture.parts import Part
from kronfisher.fisher.blocks import Block, Key
from kronfisher.layers import RowOrder

__all__ = ["Chains", "chains"]


@dataclass
class Chains:
    """The neighbours of one forward pass.

    Attributes:
        after: key of a block → key of the one after it.
        cuts: key of a block → why it does not continue the chain of the blocks before it.
    """

    after: dict[Key, Key] = field(default_factory=dict)
    cuts: dict[Key, str] = field(default_factory=dict)


def chains(
    observation: Observation,
    parts: Mapping[int, list[Part]],
    orders: Mapping[tuple[int, int], RowOrder],
    apart: Callable[[Block, Block], str],
) -> Chains:
    """The neighbours in a forward pass.

    Args:
        observation: of the forward pass.
        parts: index of a call → its blocks.
        orders: (index of a call, number of the part) → how rows are sorted.
        apart: why the fit of two blocks does not take them together; empty if it does.
    """
    graph, calls, answer = observation.graph, observation.calls, Chains()
    uses = Counter(part.block.key for several in parts.values() for part in several)
    windows = Counter(name for key in uses for name in {view.parameter for view in key if view is not None})
    following = Counter(graph.last)
    for before in graph.before.values():
        following.update(before)

    def names(indices: Iterable[int]) -> str:
        return ", ".join(dict.fromkeys(use.name for index in indices for use in calls[index].uses))

    def lone(index: int) -> str:
        own = parts.get(index, [])
        if len(own) != 1:
            why = "has several parameters that are treated apart" if own else "is left to the fallback"
            return f"{calls[index].operator} of {names((index,))} {why}"
        (part,) = own
        if uses[part.block.key] > 1:
            return f"{part.block.name} is used {uses[part.block.key]} times"
        if any(windows[view.parameter] > 1 for view in part.block.views):
            return f"{part.block.name} is used in several ways or in parts"
        return ""

    def reason(index: int) -> str:
        before = graph.before[index]
        if len(before) > 1:
            return f"its inputs come from {names(sorted(before))}"
        (earlier,) = before
        if following[earlier] > 1:
            every = names(sorted(k for k, several in graph.before.items() if earlier in several))
            return f"what {names(before)} gives goes to {every}{' and the outputs' if earlier in graph.last else ''}"
        if why := lone(earlier) or lone(index):
            return why
        first, second = parts[earlier][0], parts[index][0]
        if why := apart(first.block, second.block):
            return why
        return unlike(
            observation,
            (calls[earlier], first, orders[earlier, 0]),
            (calls[index], second, orders[index, 0]),
        )

    for index, several in sorted(parts.items()):
        if not several or not graph.before[index]:
            continue
        if why := reason(index):
            answer.cuts.update(dict.fromkeys((part.block.key for part in several), why))
        else:
            answer.after[parts[min(graph.before[index])][0].block.key] = several[0].block.key
    return answer


Place = tuple[Call, Part, RowOrder]


def unlike(observation: Observation, earlier: Place, later: Place) -> str:
    """Why rows of two uses do not belong together; empty if they do."""
    first, second = _rows(*earlier), _rows(*later)
    total = len(first)
    if total != len(second):
        return f"{earlier[1].block.name} has {total} rows, {later[1].block.name} {len(second)} (data times positions)"
    generator = torch.Generator("cpu").manual_seed(total)

    def alive(rows: Tensor) -> Tensor:
        """Rows of the earlier use at which a random gradient of some rows of the later one arrives."""
        places = second[rows].flatten()
        vector = torch.zeros(prod(later[0].shape), device="cpu")
        vector[places] = torch.randn(len(places), generator=generator, device="cpu")
        back = observation.between(later[0], earlier[0], vector.reshape(later[0].shape))
        return torch.zeros(total, dtype=torch.bool) if back is None else (back.flatten().cpu()[first] != 0).any(dim=1)

    order = torch.randperm(total, generator=generator, device="cpu")
    able, some = alive(order), max(1, total // _SHARE)  # units may be dead in a row
    hits = chances = 0
    for rows in order[: _PASSES * some].split(some):
        found = alive(rows)
        hits += int(found[rows].sum())
        chances += min(int(found.sum()), int(able[rows].sum()))
    if not chances:
        return f"no gradient passes from {later[1].block.name} to {earlier[1].block.name}"
    if hits < _SURE * chances:
        return f"between {earlier[1].block.name} and {later[1].block.name} rows change their order"
    return ""


_SHARE = 64  # one row of so many is looked at in a pass: where positions mix nearby, most others get nothing
_PASSES = 4
_SURE = 0.9  # the share of rows that have to arrive in their own places


def _rows(call: Call, part: Part, order: RowOrder) -> Tensor:
    """Places of the elements of ``g [R, O]`` in the call's output, for R = n·T rows and one group."""
    places = torch.arange(prod(call.shape), dtype=torch.float64, device="cpu").reshape(call.shape)
    return part.use.gradients(order, places).round().long().flatten(0, 2)
