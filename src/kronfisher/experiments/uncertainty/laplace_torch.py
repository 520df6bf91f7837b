"""laplace-torch on the same networks, where it is installed: it is no dependency."""

import time
import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["AT_ONCE", "available", "classifier", "regression"]

AT_ONCE = 25  # data to predict in one call: dense Jacobians of 250 images of LeNet-5 take more than 20 GiB


def available() -> bool:
    """Whether laplace-torch can be imported."""
    return find_spec("laplace") is not None


def regression(model: nn.Module, x: Tensor, y: Tensor, new: Tensor, structure: str, steps: int = 100) -> dict[str, Any]:
    """Its predictive variance of new targets, prior and noise by marginal likelihood with Adam as its manual shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = import_module("laplace")
        start = time.process_time()
        loader = DataLoader(TensorDataset(x, y), batch_size=512)
        posterior: Any = library.Laplace(model, "regression", subset_of_weights="all", hessian_structure=structure)
        posterior.fit(loader)
        fitted = time.process_time()
        logs = [torch.zeros(1, dtype=x.dtype, requires_grad=True) for _ in range(2)]
        optimizer = torch.optim.Adam(logs, lr=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            (-posterior.log_marginal_likelihood(logs[0].exp(), logs[1].exp())).backward()
            optimizer.step()
        tuned = time.process_time()
        _, variance = posterior(new)
        noise = float(posterior.sigma_noise) ** 2
        return {
            "variance": variance[:, :, 0].detach() + noise,
            "prior_precision": float(posterior.prior_precision),
            "noise": noise,
            "evidence": float(posterior.log_marginal_likelihood()),
            "estimate": fitted - start,
            "seconds": [tuned - fitted, time.process_time() - tuned],
        }


def classifier(model: nn.Module, batches: list[tuple[Tensor, Tensor]], structure: str) -> tuple[Any, float, float]:
    """Its posterior of all weights with the prior of the largest marginal likelihood; seconds of fitting and tuning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = import_module("laplace")
        start = time.process_time()
        inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
        loader = DataLoader(TensorDataset(inputs, targets), batch_size=len(batches[0][0]))
        posterior: Any = library.Laplace(model, "classification", subset_of_weights="all", hessian_structure=structure)
        posterior.fit(loader)
        fitted = time.process_time()
        posterior.optimize_prior_precision(method="marglik", n_steps=100)
        return posterior, fitted - start, time.process_time() - fitted
