"""A posterior in a file: its Fisher matrix with a few tensors and numbers more."""

from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kronfisher.capture.forward import Forward
from kronfisher.errors import DataError
from kronfisher.fisher import files
from kronfisher.laplace.posterior import Posterior
from kronfisher.likelihoods import Likelihood

__all__ = ["load", "save"]

_PREFIX = "laplace."

P = TypeVar("P", bound=Posterior)


def save(posterior: Posterior, path: str | Path) -> None:
    """See `Laplace.save`."""
    tensors: dict[str, Tensor] = {f"mean.{name}": mean for name, mean in posterior.mean.items()}
    tensors |= {f"prior_mean.{name}": mean for name, mean in posterior.prior_mean.items()}
    tensors |= {f"prior.{k}": precision.prior for k, precision in enumerate(posterior.precisions.values())}
    notes = {
        "temperature": posterior.temperature,
        "noise": posterior.noise,
        "calibrated_for": posterior.calibrated_for,
        "likelihood": repr(posterior.likelihood),
    }
    files.save(posterior.fisher, path, {_PREFIX + key: tensor for key, tensor in tensors.items()}, {"laplace": notes})


def load(kind: type[P], path: str | Path, model: nn.Module, likelihood: Likelihood, forward: Forward | None) -> P:
    """A posterior of this class; see `Laplace.load`."""
    fisher, more, header = files.read(path, model)
    notes: dict[str, Any] | None = header.get("laplace")
    if notes is None:
        raise DataError(f"{path} holds a Fisher matrix, not a posterior; read it with kronfisher.load(path, model).")
    if repr(likelihood) != notes["likelihood"]:
        raise DataError(f"{path}: the posterior has the likelihood {notes['likelihood']}, not {likelihood!r}.")

    def named(prefix: str) -> dict[str, Tensor]:
        prefix = f"{_PREFIX}{prefix}."
        return {key.removeprefix(prefix): tensor for key, tensor in more.items() if key.startswith(prefix)}

    parameters = dict(model.named_parameters())
    for name, mean in named("mean").items():
        if not torch.equal(parameters[name].detach(), mean.to(parameters[name])):
            raise DataError(
                f"{path}: {name} of the model is not the one that the posterior is around; load the state that "
                "the model had then."
            )
    posterior = kind(
        model,
        fisher,
        1.0,
        notes["temperature"],
        prior_mean=named("prior_mean"),
        noise=notes["noise"],
        likelihood=likelihood,
        forward=forward,
    )
    priors = named("prior")
    posterior.restore([priors[str(k)] for k in range(len(priors))], notes["calibrated_for"])
    return posterior
