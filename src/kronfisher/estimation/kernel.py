"""The empirical neural tangent kernel between two data sets."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kronfisher.capture.batches import Batches
from kronfisher.capture.forward import Forward, run
from kronfisher.capture.isolation import isolate
from kronfisher.errors import DataError, NumericalError
from kronfisher.estimation.accumulator import Accumulator, LateError
from kronfisher.estimation.recipe import Recipe
from kronfisher.fisher.parameters import unwrapped
from kronfisher.fits import Gram
from kronfisher.likelihoods import Gaussian
from kronfisher.linalg import plain_arithmetic
from kronfisher.operators.rows import Rows

__all__ = ["kernel"]

Outputs = Literal["trace", "each", "sum"]


class _Sum(Gaussian):
    """One column of ones: the sum of an example's outputs."""

    def columns(self, outputs: Tensor, targets: Any = None) -> int:
        return 1

    def exact(self, outputs: Tensor, targets: Any = None) -> Iterator[Tensor]:
        yield torch.ones_like(outputs)


def kernel(
    model: nn.Module,
    data: Any,
    other: Any = None,
    *,
    outputs: Outputs = "trace",
    forward: Forward | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """``K(x, x') = J(x) J(x')ᵀ`` with the Jacobian J of the outputs by the trainable parameters.

    The rows of `data` are kept as inputs and output gradients where that is less than J; those of `other` are read
    batch by batch. The kernel of data with themselves is computed by half.

    Args:
        model: as for `kronfisher.estimate`; so are the batches, whose targets do not matter.
        data: N examples.
        other: M further ones; None: `data` again.
        outputs: ``"trace"``: summed over the C outputs, ``[N, M]``; ``"each"``: all pairs of outputs ``[N, M, C, C]``;
            ``"sum"``: the kernel of the sum of the outputs, ``[N, M]``.
        forward: ``forward(model, batch) -> (outputs, targets)`` for batches of any other form.
        memory_budget: bytes for the rows of `data`; None: what is free.

    Raises:
        ValueError: another `outputs`.
        UnsupportedError, DataError, NumericalError, MemoryBudgetError: as `kronfisher.estimate`.

    Example:
        >>> import kronfisher as kf
        >>> model = torch.nn.Linear(2, 3)  # J(x) J(x')ᵀ = (x·x' + 1) 1
        >>> kf.kernel(model, torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]]))
        tensor([[12.]])
    """
    if outputs not in ("trace", "each", "sum"):
        raise ValueError(f"outputs={outputs!r}: use 'trace', 'each' or 'sum'.")
    model = unwrapped(model)

    def alone(model: nn.Module, batch: Any) -> tuple[Tensor, None]:
        return run(model, batch, forward, next(model.parameters()).device, "the batch")[0], None

    likelihood = _Sum() if outputs == "sum" else Gaussian()
    reader = Accumulator(Recipe(model, likelihood, "exact", forward=alone, memory_budget=memory_budget), Gram())
    begun = reader.known
    while True:
        try:
            found = _filled(reader, data, other, outputs)
            break
        except LateError as late:  # a later batch uses more parameters: begin again, as estimates do
            if late.known == begun or not all(Batches(each).again for each in (data, other) if each is not None):
                raise
            begun = late.known
            reader.begin_again(begun)
    if not bool(torch.isfinite(found.sum())) and not bool(torch.isfinite(found).all()):
        raise NumericalError(
            "the kernel holds NaN or Inf though inputs and outputs are finite: gradients or their products overflow. "
            "Look at the scale of inputs and weights, or use float64."
        )
    return found


def _filled(reader: Accumulator, data: Any, other: Any, outputs: Outputs) -> Tensor:
    kept = list(_read(reader, data, keep=True))
    columns = []
    widths, others = {len(rows) for rows in kept}, set()
    _require_one_width(widths if outputs != "sum" else set())
    with plain_arithmetic(reader.device):
        if other is None:
            for k, mine in enumerate(kept):
                blocks = [_products(one, mine, outputs) for one in kept[: k + 1]]
                columns.append(blocks)
            lines = [
                torch.cat([columns[j][i] if j >= i else _turned(columns[i][j]) for j in range(len(kept))], dim=1)
                for i in range(len(kept))
            ]
            return torch.cat(lines)
    for theirs in _read(reader, other, keep=False):
        others.add(len(theirs))
        _require_one_width({"trace": widths | others, "each": others, "sum": set()}[outputs])
        with plain_arithmetic(reader.device):
            columns.append(torch.cat([_products(mine, theirs, outputs) for mine in kept]))
    return torch.cat(columns, dim=1)


def _require_one_width(widths: set[int]) -> None:
    if len(widths) > 1:
        raise DataError(
            f"examples have {' or '.join(map(str, sorted(widths)))} outputs, which cannot be paired; pad them, or use "
            "outputs='sum'."
        )


def _read(reader: Accumulator, data: Any, *, keep: bool) -> Iterator[list[Rows]]:
    """The rows of every batch, one entry for each output."""
    batches = Batches(data)
    with isolate(reader.model, reader.recipe.seed):
        for where, batch in batches.read(0):
            reader.add(batch, where)
            (state,) = (group.state for group in reader.groups)
            gathered: list[Rows] = state.rows_of_batches  # pyright: ignore[reportAttributeAccessIssue]
            rows = list(gathered)
            gathered.clear()
            if not keep:
                state.held = 0  # pyright: ignore[reportAttributeAccessIssue]
            yield rows
    if not batches.index:
        raise DataError("The data contain no batch; a generator can be read only once.")


def _products(mine: list[Rows], theirs: list[Rows], outputs: Outputs) -> Tensor:
    """``[n, m]``, or ``[n, m, C, C]`` for each pair of outputs."""
    if outputs != "each":
        pairs = zip(mine, theirs, strict=True)
        return torch.stack([x.gram if x is y else x.products(y) for x, y in pairs]).sum(0)
    return torch.stack([torch.stack([x.products(y) for y in theirs], dim=-1) for x in mine], dim=-2)


def _turned(block: Tensor) -> Tensor:
    return block.transpose(0, 1) if block.dim() == 2 else block.permute(1, 0, 3, 2)
