"""Where outputs hold the classes, and refusals of logits and labels that do not fit each other."""

from typing import TypeGuard

import torch
from torch import Tensor

from kronfisher.errors import require
from kronfisher.likelihoods.checks import fail, refusal, require_shape
from kronfisher.likelihoods.softmax import without
from kronfisher.linalg import promote

__all__ = ["check_classes", "check_logits", "find_classes", "is_soft"]


def is_soft(targets: Tensor | None) -> TypeGuard[Tensor]:
    """Whether the targets are class probabilities."""
    return targets is not None and targets.is_floating_point()


def find_classes(outputs: Tensor, targets: Tensor | None, class_dim: int | None, where: str) -> int:
    """The dimension of the classes, counted from 0.

    Args:
        outputs: Logits `[N, C]`, `[N, T, C]` or `[N, C, d1, …]`.
        targets: Their shape decides where `class_dim` does not.
        class_dim: 1, -1 or None.
        where: Name of the batch, for the message.

    Raises:
        DataError: Neither `class_dim` nor the shape of the targets decides it.
    """
    if outputs.ndim == 2:
        return 1
    if class_dim is not None:
        return class_dim % outputs.ndim
    choices = {axis: without(outputs, axis) for axis in (1, outputs.ndim - 1)}
    matching = [axis for axis, shape in choices.items() if targets is not None and tuple(targets.shape) == shape]
    if len(matching) == 1:
        return matching[0]
    given = "no targets" if targets is None else f"targets {list(targets.shape)}"
    fail(
        where,
        f"outputs {list(outputs.shape)} with {given} do not show which dimension holds the classes: class "
        f"indices would be {list(choices[1])} for class_dim=1, {list(choices[outputs.ndim - 1])} for class_dim=-1",
        "say Categorical(class_dim=1) or Categorical(class_dim=-1), or correct the targets",
    )


def check_logits(outputs: Tensor, where: str) -> None:
    """Refuses outputs that have no dimension of classes, by a `DataError`."""
    if outputs.ndim < 2:
        fail(
            where,
            f"Categorical needs logits [N, C], [N, T, C] or [N, C, ...], found {list(outputs.shape)}",
            "for one logit per example use Bernoulli",
        )


def check_classes(
    outputs: Tensor, targets: Tensor | None, axis: int, weight: Tensor | None, ignore_index: int, where: str
) -> None:
    """Refuses too few classes, weights of another number of classes, and labels that are out of range.

    Args:
        outputs: Logits.
        targets: Class indices, class probabilities or None.
        axis: The dimension of the classes.
        weight: Of every class, `[C]`, or None.
        ignore_index: The label of positions that do not count.
        where: Name of the batch, for the message.

    Raises:
        DataError: As said.
    """
    classes = outputs.shape[axis]
    if classes < 2:
        fail(
            where,
            f"Categorical needs at least two classes, found {classes} in dimension {axis} of {list(outputs.shape)}",
            "for one logit per example use Bernoulli",
        )
    if weight is not None and len(weight) != classes:
        fail(
            where,
            f"Categorical has {len(weight)} class weights for {classes} classes in dimension {axis} "
            f"of outputs {list(outputs.shape)}",
            "give one weight per class",
        )
    if targets is None:
        if weight is not None:
            fail(
                where,
                "Categorical with class weights needs targets, found none",
                "give (inputs, targets) batches, or leave out weight",
            )
        return
    if targets.is_floating_point() and targets.ndim == outputs.ndim:
        require_shape(targets, outputs.shape, "Categorical with class probabilities", where)
        error = (promote(targets).sum(axis) - 1).abs()
        what = f"class probabilities in the targets must be non-negative and sum to one over dimension {axis}"
        require(
            (targets >= 0).all() & (error < 1e-2).all(),
            lambda: refusal(where, what, "normalise them, or give class indices"),
        )
        return
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        fail(
            where,
            f"Categorical needs integer class indices, found {targets.dtype} of shape {list(targets.shape)}",
            "convert them with targets.long()",
        )
    labels = require_shape(targets, without(outputs, axis), "Categorical", where).long()
    fine = (labels >= 0) & (labels < classes) | (labels == ignore_index)
    require(
        fine.all(),
        lambda: refusal(
            where,
            f"label {int(labels[~fine][0])} is out of range for {classes} classes (0 to {classes - 1})",
            f"labels start at 0; positions to skip are marked by ignore_index={ignore_index}",
        ),
    )
