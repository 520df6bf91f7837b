"""What an estimate of a drawn network comes to, against the truth by one backward pass for every output."""

from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

import kronfisher as kf
from kronfisher.capture.jacobian import Jacobian
from kronfisher.errors import DataError, MemoryBudgetError, NumericalError, UnsupportedError
from kronfisher.fisher.layout import gather
from kronfisher.fisher.vectors import read
from tests.helpers.drawn.batches import Batch
from tests.helpers.drawn.networks import Case, draw
from tests.helpers.truth import kept

__all__ = ["count", "faults", "outcome", "rows_read_off", "truth"]

_OURS = (UnsupportedError, DataError, NumericalError, MemoryBudgetError)
_ROUNDING = {True: 1e-8, False: 1e-4}  # relative distances, where everything is in float64 and elsewhere


def truth(model: nn.Module, batches: Iterable, labels: str = "exact", masks: Iterable[Tensor] | None = None) -> Tensor:
    """``Σ_k g_k g_kᵀ / N`` of a Gaussian likelihood; observed targets are the cosines of the outputs.

    Args:
        model: called with each batch.
        batches: what it is called with.
        labels: "exact" or "observed".
        masks: of each batch, ``[N, P]``: positions of the outputs that count.
    """
    batches = list(batches)
    parameters, total, count = [p for p in model.parameters() if p.requires_grad], torch.zeros(()), 0
    for batch, mask in zip(batches, masks or [None] * len(batches), strict=True):
        outputs = model(batch)
        counted = torch.ones_like(outputs) if mask is None else mask[..., None].expand_as(outputs).to(outputs)
        if labels == "exact":
            numbers = outputs[counted > 0]
        else:
            numbers = (outputs * (counted * (outputs - outputs.cos()).detach())).flatten(1).sum(1)
        rows = []
        for number in numbers.flatten():
            found = torch.autograd.grad(number, parameters, retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([gradient.flatten() for gradient in found]))
        stacked = torch.stack(rows).double()
        total = total + stacked.T @ stacked
        count += len(outputs)
    return total / count


def _compare(case: Case, fisher: kf.Fisher, true: Tensor, batches: list[Batch]) -> Iterator[tuple[float, str]]:
    """Relative distances that have to vanish, with what they are of."""
    dense = fisher.to_dense()
    if not isinstance(case.fit, str):
        yield float((dense - true).norm() / true.norm()), "matrix"
        return
    if case.fit in ("full", "diagonal"):
        true = true * kept(fisher)
        if case.fit == "diagonal" or float(true.norm()) > 1e-12:
            yield float((dense - true).norm() / true.norm()), "matrix"
        return
    positions, _ = read(torch.arange(fisher.dim), fisher.shapes)
    error, norm = fisher.error(list(batches)), true.norm()
    for name, (blocks, operator) in zip(fisher.blocks, fisher.entries, strict=True):
        index = gather(blocks, positions)[0]
        own, given = true[index[:, None], index], operator.to_dense()
        yield abs(error.norms[name] - float(own.norm())) / float(norm), f"norm of {name}"
        yield abs(error.distances[name] - float((own - given).norm())) / float(norm), f"error of {name}"
        keeps = case.fit in ("tkfac", "ekfac") or operator.kind == "diagonal"
        if keeps and "two roles" not in fisher.info.blocks[name].notes:  # whose products with each other are left out
            yield abs(float(given.trace() - own.trace())) / float(true.trace()), f"trace of {name}"


def outcome(case: Case) -> Iterator[tuple[str, str]]:
    """("right" | "refused" | "wrong" | "raw" | "void", words) for the two orders of the batches and the first alone."""
    model, masks = case.model, case.masks

    def forward(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        outputs = model(batch)
        return outputs, outputs.detach().cos() if case.labels == "observed" else None

    try:
        both = truth(model, case.batches, case.labels, masks)
        first = truth(model, case.batches[:1], case.labels, masks and masks[:1])
    except Exception as error:  # the network itself does not take both batches
        yield "void", f"{type(error).__name__}"
        return
    if not all(bool(torch.isfinite(each).all()) and 1e-12 < float(each.norm()) < 1e12 for each in (both, first)):
        yield "void", "not finite"
        return
    for some, true in ((case.batches, both), (case.batches[::-1], both), (case.batches[:1], first)):
        try:
            fisher = kf.estimate(
                model,
                list(some),
                kf.Gaussian(),
                fit=case.fit,
                labels=case.labels,  # type: ignore[arg-type]
                forward=forward,
                mask=case.mask if masks is not None else None,
            )
            distances = list(_compare(case, fisher, true, some))
        except _OURS as error:
            yield "refused", str(error)
            continue
        except Exception as error:
            yield "raw", f"{type(error).__name__}: {error}"
            continue
        wrong = [f"{what} {distance:.1e}" for distance, what in distances if not distance < _ROUNDING[model.exact]]
        if wrong and _rounding_decides(case, list(some), true):
            yield "void", "rounding decides"
            continue
        yield ("wrong" if wrong else "right"), ", ".join(wrong)


def _rounding_decides(case: Case, batches: list[Batch], true: Tensor) -> bool:
    """Whether the truth itself is another one where weights differ by a rounding, so that there is nothing to compare.

    Seen: least squares of a singular matrix, which torch solves otherwise from call to call.
    """
    parameters, generator = list(case.model.parameters()), torch.Generator().manual_seed(0)
    before, masks = [p.detach().clone() for p in parameters], case.masks and [case.mask(batch) for batch in batches]
    try:
        for _ in range(8):
            with torch.no_grad():
                for p, value in zip(parameters, before, strict=True):
                    noise = torch.rand(value.shape, generator=generator).to(value) - 0.5
                    p.copy_(value * (1 + 4 * torch.finfo(value.dtype).eps * noise))
            moved = truth(case.model, batches, case.labels, masks)
            if not float((moved - true).norm() / true.norm()) < _ROUNDING[case.model.exact]:
                return True
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)
    return False


def rows_read_off(case: Case) -> Iterator[str]:
    """What is wrong about the gradients of numbers that `Jacobian` reads off the graphs of both batches, in turns."""
    named = {name: p for name, p in case.model.named_parameters() if p.requires_grad}
    jacobian = Jacobian(named)
    for batch in (*case.batches, case.batches[0]):
        try:
            outputs = case.model(batch)
            numbers = (outputs * torch.randn(outputs.shape[1:]).to(outputs)).flatten(1).sum(1)
            passes = [
                torch.autograd.grad(n, [*named.values()], retain_graph=True, materialize_grads=True) for n in numbers
            ]
            true = torch.stack([torch.cat([gradient.flatten() for gradient in each]) for each in passes])
            together = torch.autograd.grad(numbers.sum(), [*named.values()], retain_graph=True, materialize_grads=True)
        except Exception:  # the network itself does not take the batch
            return
        if not all(bool(gradient.isfinite().all()) for gradient in (true, *together)) or float(true.norm()) < 1e-12:
            continue
        try:
            distance = float((jacobian.rows(numbers) - true).norm() / true.norm())
        except Exception as error:
            yield f"raw, {type(error).__name__}: {error}: {case}"
            continue
        if not distance < _ROUNDING[case.model.exact]:
            yield f"relative distance {distance:.1e}: {case}"


def faults(seed: int) -> Iterator[str]:
    """What is wrong, or no error of ours, about the network of a seed."""
    case = draw(seed)
    for kind, words in outcome(case):
        if kind in ("wrong", "raw"):
            yield f"{seed}: {kind}, {words}: {case}"


def count(seeds: Iterable[int]) -> tuple[Counter, list[str]]:
    """How often each outcome occurred, and what was wrong or no error of ours."""
    outcomes, bad = Counter(), []
    for seed in seeds:
        case = draw(seed)
        for kind, words in outcome(case):
            outcomes[kind] += 1
            bad += [f"{seed}: {kind}, {words}: {case}"] if kind in ("wrong", "raw") else []
    return outcomes, bad
