"""Statistics of one step, put together by the ranks of a process group before they enter the averages."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kronfisher.distributed import Ranks, batches_trained_on
from kronfisher.errors import RankError
from kronfisher.estimation.accumulator import Accumulator
from kronfisher.estimation.meeting import LateKnowledge, Meeting, Said, facts_of
from kronfisher.optim.layer_statistics import LayerStatistics
from kronfisher.optim.moving_average import AverageState

__all__ = ["Sharing"]


class Sharing:
    """The meetings of one training: at every step that is to bring statistics, none in between.

    All ranks get the same sums, bit by bit, and so the same averages, inverses and steps.

    Args:
        ranks: of the process group.
        device: of the model.
    """

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self._meeting = Meeting(ranks, device)
        self._meetings = 0

    def share(
        self,
        run: Accumulator,
        layers: Callable[[], list[LayerStatistics]],
        step: int,
        *,
        brought: bool,
        numbers: Mapping[str, float | Tensor],
        only: Callable[[LayerStatistics], bool] = lambda layer: True,
    ) -> dict[str, float] | None:
        """Sum the statistics of this step over all ranks; None if any of them has none, or none that are finite.

        Args:
            run: which holds those of this rank.
            layers: finds the layers, again after the groups of other ranks are known.
            step: its number.
            brought: whether this rank has any.
            numbers: others to be summed.
            only: whose statistics are meant; those of other layers stay those of this rank.

        Returns:
            The sums of the other numbers.

        Raises:
            RankError: ranks differ in their weights, their settings or their layers; on all ranks.
        """
        facts: dict[str, Any] = {"the number of the step": step}
        if self._meetings.bit_count() <= 1:  # the first, the second, the third, the fifth, the ninth …
            facts |= facts_of(run.recipe, run.parameters, buffers=False)  # forward passes may have changed them
        ends = {layer.name: (layer.reads_data, layer.makes_outputs) for layer in layers()} if brought else {}
        said = Said(
            facts=facts,
            known=run.known,
            count=float(run.count),
            order=batches_trained_on(),
            brought=brought,
            remarks=ends,
        )
        try:
            everywhere, _ = self._meeting.agree(said, run.groups, pack=False)
        except LateKnowledge as error:
            raise RankError(str(error)) from None
        self._meetings += 1
        if not all(other.brought for other in everywhere):
            return None
        run.known = self._meeting.complete(everywhere, run.fits, run.groups, run.count)
        found = layers()
        for layer in found:
            said_of = [other.remarks.get(layer.name, (False, False)) for other in everywhere]
            layer.reads_data, layer.makes_outputs = map(any, zip(*said_of, strict=True))
        found = [layer for layer in found if only(layer)]
        self._sum(found, sums := _Numbers(numbers, found, run.device))
        return sums.others

    def _sum(self, layers: list[LayerStatistics], numbers: "_Numbers") -> None:
        self._meeting.merge_everywhere([layer.group for layer in layers], numbers.tensor)
        numbers.hand_out(layers)


class _Numbers:
    """Counts and rows of layers, and other numbers, as one tensor."""

    def __init__(self, others: Mapping[str, float | Tensor], layers: list[LayerStatistics], device: Any) -> None:
        self._names = list(others)
        values = [*others.values(), *(value for layer in layers for value in _counted(layer))]
        self.tensor = torch.tensor([float(value) for value in values], dtype=torch.float64, device=device)

    @property
    def others(self) -> dict[str, float]:
        """The other numbers by name."""
        return dict(zip(self._names, self.tensor.tolist(), strict=False))

    def hand_out(self, layers: list[LayerStatistics]) -> None:
        """Give counts and rows back to the states that add; those that do not have theirs."""
        values = iter(self.tensor.tolist()[len(self._names) :])
        for layer in layers:
            state = layer.group.state
            assert isinstance(state, AverageState)
            state.count = next(values)
            for one in state.states:
                rows = next(values)
                one.rows = rows if state.adds else one.rows


def _counted(layer: LayerStatistics) -> list[float | Tensor]:
    state = layer.group.state
    assert isinstance(state, AverageState)
    return [state.count, *(one.rows for one in state.states)]
