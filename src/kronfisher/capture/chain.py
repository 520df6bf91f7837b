"""Chains of layers: which block follows which, for fits that treat neighbours together, and where a chain is cut.

Two blocks are neighbours if, in the autograd graph, the output of the first is the only input of the second and goes
nowhere else, and if row r of the first feeds row r of the second. The latter is tested: a gradient that is nonzero in
a few rows only is carried back from the second to the first and has to arrive in the same rows. Shapes alone would not
reveal a transposition between the two, which would pair inputs of one position with inputs of another.
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

__all__ = ["Chains", "find_chains"]


@dataclass
class Chains:
    """The neighbours of one forward pass.

    Attributes:
        after: key of a block → key of the one after it.
        cuts: key of a block → why it does not continue the chain of the blocks before it.
    """

    after: dict[Key, Key] = field(default_factory=dict)
    cuts: dict[Key, str] = field(default_factory=dict)


def find_chains(
    observation: Observation,
    parts: Mapping[int, list[Part]],
    orders: Mapping[tuple[int, int], RowOrder],
    why_apart: Callable[[Block, Block], str],
) -> Chains:
    """Find the neighbours in a forward pass.

    Args:
        observation: of the forward pass.
        parts: index of a call → its blocks.
        orders: (index of a call, number of the part) → which example each row belongs to.
        why_apart: why no fit treats two blocks together; empty if one does.
    """
    graph, calls, answer = observation.graph, observation.calls, Chains()
    uses = Counter(part.block.key for members in parts.values() for part in members)
    windows = Counter(name for key in uses for name in {view.parameter for view in key if view is not None})
    following = Counter(graph.last)
    for before in graph.before.values():
        following.update(before)

    def names(indices: Iterable[int]) -> str:
        return ", ".join(dict.fromkeys(use.name for index in indices for use in calls[index].uses))

    def obstacle(index: int) -> str:
        own = parts.get(index, [])
        if len(own) != 1:
            why = "has several parameters that are treated separately" if own else "is left to the fallback"
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
            every = names(sorted(k for k, sources in graph.before.items() if earlier in sources))
            return f"the output of {names(before)} goes to {every}{' and the outputs' if earlier in graph.last else ''}"
        if why := obstacle(earlier) or obstacle(index):
            return why
        first, second = parts[earlier][0], parts[index][0]
        if why := why_apart(first.block, second.block):
            return why
        return order_difference(
            observation,
            (calls[earlier], first, orders[earlier, 0]),
            (calls[index], second, orders[index, 0]),
        )

    for index, members in sorted(parts.items()):
        if not members or not graph.before[index]:
            continue
        if why := reason(index):
            answer.cuts.update(dict.fromkeys((part.block.key for part in members), why))
        else:
            answer.after[parts[min(graph.before[index])][0].block.key] = members[0].block.key
    return answer


Place = tuple[Call, Part, RowOrder]


def order_difference(observation: Observation, earlier: Place, later: Place) -> str:
    """Why row r of one use does not feed row r of the other; empty if it does."""
    first, second = _rows(*earlier), _rows(*later)
    total = len(first)
    if total != len(second):
        return (
            f"{earlier[1].block.name} has {total} rows, {later[1].block.name} {len(second)} (examples times positions)"
        )
    generator = torch.Generator("cpu").manual_seed(total)

    def arrivals(rows: Tensor) -> Tensor:
        """Rows of the earlier use that a random gradient at some rows of the later use reaches."""
        places = second[rows].flatten()
        vector = torch.zeros(prod(later[0].shape), device="cpu")
        vector[places] = torch.randn(len(places), generator=generator, device="cpu")
        back = observation.carry_back(later[0], earlier[0], vector.reshape(later[0].shape))
        return torch.zeros(total, dtype=torch.bool) if back is None else (back.flatten().cpu()[first] != 0).any(dim=1)

    order = torch.randperm(total, generator=generator, device="cpu")
    able, some = arrivals(order), max(1, total // _SHARE)  # a row may have dead units only
    hits = chances = 0
    for rows in order[: _PASSES * some].split(some):
        reached = arrivals(rows)
        hits += int(reached[rows].sum())
        chances += min(int(reached.sum()), int(able[rows].sum()))
    if not chances:
        return f"no gradient passes from {later[1].block.name} to {earlier[1].block.name}"
    if hits < _SURE * chances:
        return f"rows are reordered between {earlier[1].block.name} and {later[1].block.name}"
    return ""


_SHARE = 64  # a pass tests one row in this many, so that rows mixed with nearby positions seldom interfere
_PASSES = 4
_SURE = 0.9  # the share of gradients that must arrive in their own rows


def _rows(call: Call, part: Part, order: RowOrder) -> Tensor:
    """Places of the elements of ``g [R, O]`` in the call's output, for R = n·T rows and one group."""
    places = torch.arange(prod(call.shape), dtype=torch.float64, device="cpu").reshape(call.shape)
    return part.use.gradients(order, places).round().long().flatten(0, 2)
