"""Targets of batches that a posterior is judged by, read and refused as an estimate does."""

from typing import Any, NamedTuple

from kronfisher.capture.batches import positions_of, split
from kronfisher.capture.containers import as_tensors
from kronfisher.capture.forward import run
from kronfisher.capture.isolation import isolate
from kronfisher.errors import DataError
from kronfisher.laplace.posterior import Posterior
from kronfisher.likelihoods import Likelihood, Weighted, along_outputs

__all__ = ["Labelled", "read_targets"]


class Labelled(NamedTuple):
    """Targets and the likelihood that reads them.

    It is that of the posterior, with the layout that the targets show, and weighted where the estimate had a mask.

    Attributes:
        likelihood: of the targets.
        targets: as it takes them.
    """

    likelihood: Likelihood
    targets: Any


def read_targets(posterior: Posterior, batch: Any, where: str, targets: Any = None) -> tuple[Any, Labelled]:
    """The inputs of a batch, as predictions take it, and its targets once they are known to fit the outputs.

    The batch goes through the model once as it does in an estimate: arrays become tensors, labels of causal language
    models are shifted, and what does not fit is refused. Positions outside the mask of the estimate do not count.

    Args:
        posterior: whose model, likelihood and `forward` are meant.
        batch: as for `estimate`.
        where: name of the batch, for messages.
        targets: in place of those of the batch.

    Raises:
        DataError: there are no targets, or they do not fit.
        NumericalError: the outputs are not finite.
    """
    model, forward, likelihood = posterior.model, posterior.forward, posterior.likelihood
    with isolate(model, 0):  # with gradients: the forward pass may take derivatives of its own
        outputs, own = run(model, batch, forward, posterior.fisher.device, where)
    outputs = outputs.detach()
    targets = own if targets is None else as_tensors(targets, next(model.parameters()))
    if targets is None:
        raise DataError(f"{where} has no targets; give (inputs, targets).")
    likelihood.check(outputs, targets, where, "observed")
    likelihood = likelihood.with_layout(outputs, targets)
    inputs = batch if forward is not None else (split(batch, where)[0], None)
    mask = getattr(getattr(posterior.fisher.context, "recipe", None), "mask", None)
    if mask is None:
        return inputs, Labelled(likelihood, targets)
    joint = likelihood.joint_dim(outputs, targets)
    counts = along_outputs(positions_of(batch, mask, outputs, where), outputs, joint, where)
    places = [size for d, size in enumerate(outputs.shape) if d != joint]
    weight = (counts if joint is None else counts.squeeze(joint)).expand(places).to(outputs.dtype)
    if not isinstance(likelihood, Weighted):
        return inputs, Labelled(Weighted(likelihood), (targets, weight))
    labels, given = targets
    return inputs, Labelled(
        likelihood, (labels, weight * given.reshape(*given.shape, *[1] * (len(places) - given.ndim)))
    )
