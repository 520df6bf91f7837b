"""From a model, data and a likelihood to its Fisher matrix."""

import time
from collections.abc import Iterator
from typing import Any, Literal

from torch import nn

from kronfisher.capture.batches import Mask
from kronfisher.capture.forward import Forward
from kronfisher.capture.per_sample import FALLBACK
from kronfisher.distributed import ProcessGroup, ranks_of, warn_of_padding, warn_of_ranks, whole
from kronfisher.estimation.accumulator import Accumulator
from kronfisher.estimation.error import Origin
from kronfisher.estimation.groups import Group
from kronfisher.estimation.progress import Progress
from kronfisher.estimation.recipe import Labels, Recipe
from kronfisher.fisher import Fisher
from kronfisher.fisher.blocks import Block, Window
from kronfisher.fisher.info import BlockInfo, Info
from kronfisher.fisher.layout import block_name
from kronfisher.fisher.parameters import fingerprint, unwrapped
from kronfisher.fisher.windows import left_over, swapped
from kronfisher.fits import Choice
from kronfisher.likelihoods import Likelihood
from kronfisher.linalg import plain_arithmetic, promote
from kronfisher.operators import Diagonal, Operator

__all__ = ["estimate"]


def estimate(
    model: nn.Module,
    data: Any,
    likelihood: Likelihood,
    *,
    fit: Choice = "kfoc",
    labels: Labels = "sampled",
    samples: int = 1,
    forward: Forward | None = None,
    mask: Mask | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    seed: int = 0,
    memory_budget: int | None = None,
    exact_limit: int = 1000,
    strict: bool = False,
    progress: Progress = False,
    group: ProcessGroup = None,
    share: Literal["all", "owned"] = "all",
) -> Fisher:
    """The Fisher matrix of a model's trainable parameters on some data, in the structure that `fit` gives it.

    ``F = (1/N) Σ_k vec(G_k) vec(G_k)ᵀ`` where G_k is the gradient of one example's own negative log-likelihood, summed
    over its positions and not divided by anything. The model is run as it is (call ``model.eval()`` first if dropout
    should be off); its parameters, gradients, buffers, hooks and modes and the global random state are the same
    afterwards as before. Its backward hooks are not called.

    Args:
        model: any module; parameters with ``requires_grad=False`` cost nothing and are left out. ``DataParallel``, DDP
            and ``torch.compile`` wrappers are removed, compiled parts run eagerly. What ``fully_shard`` spread over
            processes is whole on each of them while this runs.
        data: a loader (any iterable) of batches ``(inputs, targets)``, one such tuple, or a tensor of inputs. Inputs
            go in as ``model(x)`` (a tensor or array), ``model(*x)`` (a tuple) or ``model(**x)`` (a mapping). A batch
            may also be one mapping or data class, with targets under the key ``"labels"``. Of the outputs their tensor
            ``logits`` is taken, if they are none themselves. See ``docs/likelihoods.md``.
        likelihood: what the outputs mean, such as ``kf.Categorical()``.
        fit: a fit, its name, or a mapping from parameter-name patterns (as in `fnmatch`; the first match counts) to
            either.
        labels: ``"exact"``: all columns of the output Hessian's root (the GGN; one backward pass each); ``"sampled"``:
            labels drawn from the model, a Monte-Carlo estimate of the same; ``"observed"``: the given targets (the
            empirical Fisher, which is another matrix). The first two need no targets, except for masks and class
            weights.
        samples: label draws per example; F is their mean.
        forward: ``forward(model, batch) -> (outputs, targets)`` for batches of any other form.
        mask: which positions count, bool ``[N, P]``: a function of the batch, or the name of the key of the batch (or
            of its inputs) that holds it, such as ``"attention_mask"``. What does not count is left out of both factors
            and of the number of rows, as are positions whose target is ignored (``ignore_index``): padding a batch
            changes nothing (with sampled labels: but the numbers drawn). Layers with another number of positions, such
            as a head on pooled features, count for examples of which any position does. The model gets its
            inputs unchanged and must itself keep masked positions from affecting others.
        reduction: ``"mean"`` or ``"sum"`` over the N examples. An example whose positions are all ignored does not
            count.
        seed: of the label draws and of whatever the model and the loader draw (dropout, shuffling). The same seed and
            thread count give the same bits.
        memory_budget: bytes for matrices and temporaries; None: the free memory. Temporaries are chunked to fit,
            matrices that do not fit are refused early.
        exact_limit: backward passes per batch beyond which exact labels are refused.
        strict: raise where a parameter is used in a way that is not understood. Otherwise its diagonal is computed
            from per-example gradients, one backward pass each, and the report says so.
        progress: True writes a line to standard error; a function receives the same text.
        group: the processes that read a part of the data each (``kf.shard(loader)``), as a process group of
            torch.distributed or a one-dimensional device mesh: all of them call this, and get the same matrix, that of
            all data. None: this process alone.
        share: ``"all"``: every process holds the whole matrix; ``"owned"``: each block stays with the process that
            finished it, so that all of them together hold it once. Products, solutions, numbers and other matrices are
            then made by all processes together, which have to make the same calls.

    Returns:
        A symmetric positive semidefinite linear operator over the parameters.

    Raises:
        UnsupportedError: examples are coupled, or parts of the model are hidden; with ``strict=True`` also wherever
            a trainable parameter is used in a way that is not understood.
        DataError: no data, or a batch that does not fit the model or the likelihood; it names the batch.
        TypeError: `model` is no module or `likelihood` no likelihood.
        ValueError: another option makes no sense.
        NumericalError: NaN or Inf; it names the batch or the layer.
        MemoryBudgetError: the matrices do not fit; it says how many bytes they take.
        RankError: another rank of the group failed, or ranks have different models or settings.

    Example:
        >>> import torch, kronfisher as kf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> loader = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(3)]
        >>> fisher = kf.estimate(model, loader, kf.Categorical())
        >>> fisher.count, fisher.dim, list(fisher.blocks)
        (48.0, 67, ['0.weight', '2.weight'])
        >>> step = (fisher + 1e-3).solve({name: torch.ones_like(p) for name, p in model.named_parameters()})
        >>> step["0.weight"].shape
        torch.Size([8, 4])
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: use 'mean' or 'sum'.")
    if share not in ("all", "owned"):
        raise ValueError(f"share={share!r}: use 'all' or 'owned'.")
    began = time.perf_counter()
    model, ranks = unwrapped(model), ranks_of(group)
    if group is None:
        warn_of_ranks()
    warn_of_padding(data)
    recipe = Recipe(model, likelihood, labels, samples, forward, seed, memory_budget, exact_limit, mask, strict, ranks)
    with whole(model):
        fisher = _estimate(recipe, fit, data, progress, owned=share == "owned", began=began)
    return fisher if reduction == "mean" else fisher.reduced("sum")


def _estimate(recipe: Recipe, fit: Choice, data: Any, progress: Progress, *, owned: bool, began: float) -> Fisher:
    """The mean over data.

    Args:
        recipe: the settings.
        fit: as for `estimate`.
        data: as for `estimate`.
        progress: as for `estimate`.
        owned: whether blocks stay with their owners.
        began: time of the call.
    """
    ranks = recipe.ranks
    run = Accumulator(recipe, fit, score=True)
    run.read(data, progress, anew=True)
    count = float(run.count)
    with plain_arithmetic(run.device):
        if run.meeting is not None and owned:
            finished = run.meeting.kept_by_owners(run.groups, lambda group: _finish(run, group))
        else:
            finished = run.of(run.groups, lambda group: _finish(run, group))
        entries: list[Entry] = [(group.blocks, *own) for group, own in zip(run.groups, finished, strict=True)]
        entries = _merge_roles(entries)
        entries += [((block,), operator, BlockInfo("unused: zero")) for block, operator in _unused_blocks(run)]
    order = {name: place for place, name in enumerate(run.parameters)}
    entries.sort(key=lambda entry: order[entry[0][0].parameters[0]])
    info = Info(
        count=count,
        labels=recipe.labels,
        samples=recipe.samples,
        seed=recipe.seed,
        likelihood=repr(recipe.likelihood),
        seconds=time.perf_counter() - began,
        trainable=sum(p.numel() for p in run.parameters.values()),
        blocks={block_name(blocks): info for blocks, _, info in entries},
        log_likelihood=None if run.log_likelihood is None else float(run.log_likelihood),
        outputs=run.outputs,
        parameters=fingerprint(run.parameters),
        targets=run.targets,
        ranks=1 if ranks is None else ranks.size,
        sent=0 if ranks is None else ranks.sent,
        planned=0 if run.meeting is None else run.meeting.planned,
        collectives=0 if ranks is None else ranks.collectives,
    )
    shapes = {name: p.shape for name, p in run.parameters.items()}
    return Fisher(tuple((blocks, operator) for blocks, operator, _ in entries), shapes, info, Origin(recipe))


def _finish(run: Accumulator, group: Group) -> tuple[Operator, BlockInfo]:
    """The operator of a group and what the report says about it; its sums are let go of."""
    operator = group.fit.finish(group.state)
    alone = [block.name for block in group.blocks if block.operator == FALLBACK]
    method = f"fallback: {group.fit!r}" if len(alone) == len(group.blocks) else repr(group.fit)
    notes = [
        group.fit.notes(group.state),
        *run.notes(group.blocks),
        *(_fallback_note(name, run.known.fallback[name], len(group.blocks)) for name in alone),
    ]
    error = group.fit.error(group.state, operator)
    info = BlockInfo(method, float(group.state.rows), group.seconds, error, "; ".join(filter(None, notes)))
    group.state.release()  # so that the sums of all layers and all operators are never held at once
    return operator, info


def _fallback_note(name: str, reason: str, among: int) -> str:
    return "fallback: " + (reason if among > 1 else reason.removeprefix(f"{name}: "))


Entry = tuple[tuple[Block, ...], Operator, BlockInfo]


def _merge_roles(entries: list[Entry]) -> list[Entry]:
    """Merge the entries of a weight in two roles: the sum of one term each, without products between the roles."""
    merged: list[Entry] = []
    for blocks, operator, info in entries:
        for k, (others, other, before) in enumerate(merged):
            windows = [block.weight for block in (*others, *blocks) if block.weight and not block.bias]
            if len(windows) == len(others) + len(blocks) == 2 and swapped(windows):
                (_, *own), (_, *theirs) = blocks[0].shape, others[0].shape
                first = (others, other + operator.transposed(*own))
                chosen = first if windows[0].whole else (blocks, operator + other.transposed(*theirs))
                merged[k] = (*chosen, _merge_info(before, info))
                break
        else:
            merged.append((blocks, operator, info))
    return merged


def _merge_info(first: BlockInfo, second: BlockInfo) -> BlockInfo:
    """The merged info of both roles, without an error: neither role's covers the products left out."""
    methods, notes = (dict.fromkeys((getattr(first, key), getattr(second, key))) for key in ("method", "notes"))
    left_out = "a weight in two roles: each has a term of its own, products between them are left out"
    return BlockInfo(
        " + ".join(methods),
        first.rows + second.rows,
        first.seconds + second.seconds,
        None,
        "; ".join(filter(None, (left_out, *notes))),
    )


def _unused_blocks(run: Accumulator) -> Iterator[tuple[Block, Diagonal]]:
    """Parameters, or parts of them, that the outputs do not depend on: their Fisher matrix is exactly zero."""
    seen: dict[str, list[Window]] = {}
    for group in run.groups:
        for view in (view for block in group.blocks for view in block.views):
            seen.setdefault(view.parameter, []).append(view)
    for name, parameter in run.parameters.items():
        whole = Window.of(name, parameter).reshaped(1, *parameter.shape)
        for view in left_over(seen[name]) if name in seen else [whole]:
            zeros = promote(parameter.detach()).new_zeros(view.numel)
            yield Block(view.label, "unused", None, view), Diagonal(zeros, name=view.label)
