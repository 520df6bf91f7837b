"""What numbers in a file depend on besides the training data, as hashes and texts by name."""

from collections.abc import Sequence
from typing import Any

from kronfisher.capture.batches import Batches, checksum
from kronfisher.capture.containers import as_tensors, tensors_in
from kronfisher.errors import DataError
from kronfisher.fisher import Fisher
from kronfisher.fisher.parameters import fingerprint
from kronfisher.influence.files import digest
from kronfisher.influence.identity import identity, modes
from kronfisher.influence.measurements import Measurement
from kronfisher.influence.readings import Network, endless
from kronfisher.likelihoods import Likelihood
from kronfisher.operators.owned import Owned

__all__ = ["asked", "provenance"]


def provenance(network: Network, fisher: Fisher, likelihood: Likelihood, damping: Sequence[float]) -> dict[str, str]:
    """Of a model, how batches go through it, and its matrix."""
    model = network.model
    return {
        "model": fingerprint({**dict(model.named_parameters()), **dict(model.named_buffers())}),
        "training mode": digest(modes(model)),
        "seed": str(network.seed),
        "forward": identity(network.forward),
        "mask": identity(network.mask),
        "Fisher": _fingerprint(fisher),
        "likelihood": f"{type(likelihood).__name__} {identity(likelihood)}",
        "damping": repr(tuple(damping)),
        "examples of the Fisher": repr(fisher.count),
    }


def _fingerprint(fisher: Fisher) -> str:
    if not any(isinstance(operator, Owned) for operator in fisher.blocks.values()):
        operators = {f"{k} {key}": t for k, (_, op) in enumerate(fisher.entries) for key, t in op.tensors().items()}
        return fingerprint(operators)
    held = [op for _, op in fisher.entries if isinstance(op, Owned)]  # all of them are, or none
    return digest(*(op.value(lambda own: fingerprint(own.tensors())) for op in held))


def asked(queries: Any, measurement: Measurement, at_most: float) -> dict[str, str]:
    """Of the queries and what is asked of them.

    Args:
        queries: batches in a fixed order.
        measurement: of their outputs.
        at_most: examples that are read of a loader without a length: one that never ends gives more.

    Raises:
        DataError: the queries can be read only once, or may never end.
    """
    if not (data := Batches(queries)).again:
        raise DataError("queries are read twice for a file (path=), and a generator only once: pass a list.")
    batches, size = [], 0
    for where, batch in data.read(0):
        size += _examples(batch)
        if not data.ends and size > at_most:
            raise endless(where.replace("batch", "query batch", 1), at_most, "queries")
        batches.append(checksum(batch))
    known = isinstance(measurement, str | tuple)
    return {
        "queries": digest(*batches),
        "measurement": repr(measurement) if known else identity(measurement),
    }


def _examples(batch: Any) -> int:
    """How many examples a batch has at least, as nothing but its tensors tells it."""
    return min((len(tensor) for tensor in tensors_in(as_tensors(batch)) if tensor.dim()), default=1)
