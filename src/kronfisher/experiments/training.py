"""A few epochs of Adam: enough to measure curvature where networks live, not at their random start."""

from collections.abc import Callable
from copy import deepcopy
from math import inf, isfinite

import torch
from torch import nn

from kronfisher.errors import NumericalError
from kronfisher.experiments.data.dataset import Dataset, generator
from kronfisher.likelihoods import Likelihood


def train(
    model: nn.Module,
    dataset: Dataset,
    likelihood: Likelihood | None = None,
    *,
    epochs: int = 5,
    batch_size: int = 64,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    patience: int | None = None,
    seed: int = 0,
    on_step: Callable[[int, int, float], None] | None = None,
) -> list[float]:
    """Train `model` in place on the training data with Adam and the negative log-likelihood; leaves it in eval mode.

    Args:
        model: takes ``[n, *input_shape]`` and gives ``[n, outputs]``.
        dataset: whose training data are used.
        likelihood: whose negative ``log_prob``, averaged over data, is the loss (default: that of the data set).
        epochs: passes over the training data, each in another order.
        batch_size: data in a step.
        lr: Adam's learning rate.
        weight_decay: added to the gradient, times the weights.
        patience: stop after so many epochs in a row without a lower loss on the test data, and go back to the weights
            of the best epoch; None: train all epochs and keep the last weights.
        seed: of the order of the data.
        on_step: called after every step with the number of steps done, of steps in all, and the mean loss of the step.

    Returns:
        The mean loss of every epoch that was trained.

    Raises:
        NumericalError: the loss is no longer finite.

    Example:
        >>> from kronfisher.experiments import data, networks
        >>> digits = data.load("digits")
        >>> model = networks.for_data("mlp", digits)
        >>> first, *_, last = train(model, digits, epochs=5, lr=0.01)
        >>> last < 0.5 * first
        True
    """
    likelihood = likelihood or dataset.likelihood
    random, device = generator(seed), next(model.parameters()).device
    inputs, targets = dataset.train_inputs, dataset.train_targets
    steps_per_epoch = -(-len(inputs) // batch_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay)
    history, best, at, weights = [], inf, 0, model.state_dict()
    for epoch in range(epochs):
        losses = []
        model.train()
        for indices in torch.randperm(len(inputs), generator=random).split(batch_size):
            x, y = inputs[indices].to(device), targets[indices].to(device)
            optimizer.zero_grad()
            loss = -likelihood.log_prob(model(x), y).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            step = epoch * steps_per_epoch + len(losses)
            if not isfinite(losses[-1]):
                raise NumericalError(f"the training loss is {losses[-1]} after {step} steps: lower lr (now {lr:g})")
            if on_step is not None:
                on_step(step, epochs * steps_per_epoch, losses[-1])
        history.append(sum(losses) / len(losses))
        if patience is None:
            continue
        loss = evaluate(model.eval(), dataset, likelihood=likelihood)["loss"]
        if loss < best:
            best, at, weights = loss, epoch, deepcopy(model.state_dict())
        if epoch - at >= patience:
            break
    model.load_state_dict(weights)
    optimizer.zero_grad()
    model.eval()
    return history


@torch.no_grad()
def evaluate(
    model: nn.Module, dataset: Dataset, batch_size: int = 500, *, likelihood: Likelihood | None = None
) -> dict[str, float]:
    """The mean negative log-likelihood of the test data and, for classes, the share that is classified correctly.

    Args:
        model: in the mode that is meant (eval, as a rule).
        dataset: whose test data are used.
        batch_size: data in a forward pass.
        likelihood: as for `train`.

    Returns:
        ``{"loss": …}``, with ``"accuracy"`` for classes; the loss is summed over outputs (of a
        text, over characters) and averaged over data.
    """
    likelihood = likelihood or dataset.likelihood
    device, loss, correct = next(model.parameters()).device, 0.0, 0
    for x, y in dataset.batches(batch_size, test=True):
        outputs, y = model(x.to(device)), y.to(device)
        loss += -likelihood.log_prob(outputs, y).sum().item()
        if dataset.task == "classes":
            correct += int((outputs.argmax(-1) == y).sum()) / y[0].numel()  # of a text, its share of the characters
    number = len(dataset.test_inputs)
    return {"loss": loss / number} | ({"accuracy": correct / number} if dataset.task == "classes" else {})
