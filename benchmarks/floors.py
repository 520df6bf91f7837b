"""The bare cost of the work: the yardsticks that every library is divided by."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workloads import Workload

PANEL = 192  # columns; from 96 to 256 the time is the same within a twentieth
PIECE, STEPS, DIRECTIONS = 512, 4, 16  # samples at once, double steps to a change of 1e-3, and directions of a factor


def mean_loss(likelihood: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """The ordinary training loss."""
    if likelihood == "bernoulli":
        return F.binary_cross_entropy_with_logits(outputs, targets)
    return F.cross_entropy(outputs.flatten(end_dim=-2), targets.flatten())


def rows_of(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Inputs as ``[rows, I]`` with a last column of ones, the patches written out for a convolution."""
    if isinstance(layer, nn.Conv2d):
        patches = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        inputs = patches.transpose(1, 2)
    rows = inputs.flatten(end_dim=-2)
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


class Floor:
    """The bare work, on a workload of its own: libraries leave hooks and flags on the model and the data they see."""

    def __init__(self, workload: Workload) -> None:
        self.model, self.batches, self.likelihood = workload.model, workload.batches, workload.likelihood

    def forward_backward(self) -> None:
        """Forward and backward with the gradients of the parameters, as in training."""
        for inputs, targets in self.batches:
            self.model.zero_grad(set_to_none=True)
            mean_loss(self.likelihood, self.model(inputs), targets).backward()

    def write_out(self) -> None:
        """Keep every layer's inputs and output gradients as matrices, for `products` and `solve`."""
        self.rows: list[tuple[Tensor, Tensor]] = []

        def hook(layer: nn.Module, inputs: tuple[Tensor], outputs: Tensor) -> None:
            a = rows_of(layer, inputs[0].detach())

            def keep(gradient: Tensor) -> None:
                channels = gradient.flatten(2).transpose(1, 2) if isinstance(layer, nn.Conv2d) else gradient
                self.rows.append((a, channels.flatten(end_dim=-2).contiguous()))

            outputs.register_hook(keep)

        layers = [layer for layer in self.model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        handles = [layer.register_forward_hook(hook) for layer in layers]
        self.forward_backward()
        for handle in handles:
            handle.remove()

    def products(self) -> list[tuple[Tensor, Tensor]]:
        """The bare ``AᵀA`` and ``GᵀG`` of every layer and batch."""
        return [(a.t() @ a, g.t() @ g) for a, g in self.rows]

    def least(self) -> list[Tensor]:
        """The least work for factors of linear layers: labels drawn, gradients of outputs, half of the products.

        One forward pass, one backward pass without gradients of parameters, and upper triangles in panels straight
        into their sums: plain torch, with nothing looked at, counted, scaled or mirrored.
        """
        sums = [(torch.zeros(a, a), torch.zeros(g, g)) for a, g in self._sizes()]
        for calls in self._passes():
            for totals, pair in zip(sums, calls, strict=True):
                for total, rows in zip(totals, pair, strict=True):
                    _add_upper_triangle_(total, rows.flatten(end_dim=-2))
        return [total for totals in sums for total in totals]

    def least_kfoc(self) -> list[Tensor]:
        """The least work for the best products of linear layers, in the same style.

        The passes of `least`; then, for pieces of the samples, `STEPS` double steps in their span (or by their weights,
        where that is fewer multiplications), and one product a factor. Where positions share the weight: one double
        step over everything through `DIRECTIONS` given directions, of whose rows the products are made.
        """
        sums = [(torch.zeros(a, a), torch.zeros(g, g)) for a, g in self._sizes()]
        directions = [(torch.randn(a, DIRECTIONS), torch.randn(g, DIRECTIONS)) for a, g in self._sizes()]
        waiting: list[list[tuple[Tensor, Tensor]]] = [[] for _ in sums]
        for calls in self._passes():
            for place, (a, g) in enumerate(calls):
                if a.dim() > 2:
                    right, left = directions[place]
                    _add_upper_triangle_(sums[place][1], ((a @ right).mT @ g).flatten(end_dim=-2))
                    _add_upper_triangle_(sums[place][0], ((g @ left).mT @ a).flatten(end_dim=-2))
                    continue
                waiting[place].append((a, g))
                if sum(len(rows) for rows, _ in waiting[place]) >= PIECE:
                    _add_pair_(sums[place], waiting[place])
        for totals, samples in zip(sums, waiting, strict=True):
            if samples:
                _add_pair_(totals, samples)
        return [total for totals in sums for total in totals]

    def _sizes(self) -> list[tuple[int, int]]:
        layers = [layer for layer in self.model.modules() if isinstance(layer, nn.Linear)]
        return [(layer.in_features, layer.out_features) for layer in layers]

    def _passes(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Inputs and output gradients of every linear layer, for every batch, without gradients of parameters."""
        layers = [layer for layer in self.model.modules() if isinstance(layer, nn.Linear)]
        calls: list[tuple[Tensor, Tensor]] = []

        def hook(layer: nn.Module, inputs: tuple[Tensor], outputs: Tensor) -> None:
            calls.append((inputs[0].detach(), outputs if outputs.requires_grad else outputs.requires_grad_()))

        handles = [layer.register_forward_hook(hook) for layer in layers]
        self.model.requires_grad_(False)
        for inputs, _ in self.batches:
            calls.clear()
            outputs = self.model(inputs)
            loss = _sampled_loss(self.likelihood, outputs)
            gradients = torch.autograd.grad(loss, [out for _, out in calls])
            yield [(a, g) for (a, _), g in zip(calls, gradients, strict=True)]
        self.model.requires_grad_(True)
        for handle in handles:
            handle.remove()

    def write_out_factors(self) -> None:
        """Keep the factors of every layer, for `solve`."""
        self.batches = self.batches[:1]
        self.write_out()
        self.factors = [
            (ata / len(a), gtg * len(a)) for (a, _), (ata, gtg) in zip(self.rows, self.products(), strict=True)
        ]

    def solve(self, damping: float) -> list[Tensor]:
        """Damp, factorise and invert every factor with Cholesky, and apply the inverse to one matrix a layer."""
        solved = []
        for a, g in self.factors:
            left, right = (_inverse(f, damping) for f in (g, a))
            solved.append(left @ torch.ones(len(left), len(right)) @ right)
        return solved


def _sampled_loss(likelihood: str, outputs: Tensor) -> Tensor:
    if likelihood == "bernoulli":
        labels = torch.bernoulli(outputs.detach().sigmoid())
        return F.binary_cross_entropy_with_logits(outputs, labels, reduction="sum")
    logits = outputs.flatten(end_dim=-2)
    labels = torch.multinomial(logits.detach().softmax(-1), 1).squeeze(-1)
    return F.cross_entropy(logits, labels, reduction="sum")


def _add_upper_triangle_(total: Tensor, x: Tensor) -> None:
    width = len(total)
    for low in range(0, width, PANEL):
        high = min(low + PANEL, width)
        total[low:high, low:].addmm_(x[:, low:high].t(), x[:, low:])


def _add_pair_(totals: tuple[Tensor, Tensor], samples: list[tuple[Tensor, Tensor]]) -> None:
    """Add weighted products of the samples that wait to both factors, after double steps for the weights."""
    a, g = (torch.cat(rows) for rows in zip(*samples, strict=True))
    samples.clear()
    n, work = len(a), a.shape[1] ** 2 + g.shape[1] ** 2
    u = w = a.square().sum(1)
    if n * (a.shape[1] + g.shape[1] + 4 * STEPS) / 2 < 2 * STEPS * work:
        inputs, outputs = (a @ a.t()).square_(), (g @ g.t()).square_()
        for _ in range(STEPS):
            w = outputs @ u
            w /= w.norm()
            u = inputs @ w
            u /= u.norm()
    else:
        for _ in range(STEPS):
            w = ((g @ ((g * u[:, None]).t() @ g)) * g).sum(1)
            w /= w.norm()
            u = ((a @ ((a * w[:, None]).t() @ a)) * a).sum(1)
            u /= u.norm()
    _add_upper_triangle_(totals[0], a * w.sqrt()[:, None])
    _add_upper_triangle_(totals[1], g * u.sqrt()[:, None])


def _inverse(factor: Tensor, damping: float) -> Tensor:
    damped = factor.clone()
    damped.diagonal().add_(damping**0.5)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))
