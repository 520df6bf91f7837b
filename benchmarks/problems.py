"""Tiny float64 problems on which matrices of different libraries are compared entry by entry, and the dense truth."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from unstructured import UNSTRUCTURED
from workloads import GPT, TOKENS, Block


@dataclass(frozen=True)
class Problem:
    """A model with all its data. Outputs are ``[N, C]``, or ``[N, R, C]`` for R positions."""

    name: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor
    likelihood: str
    ignore_index: int = -100
    weight: Tensor | None = None

    @property
    def classes(self) -> int:
        return self.model(self.inputs[:1]).shape[-1]

    @property
    def positions(self) -> int:
        return self.model(self.inputs[:1])[..., 0].numel()


def problem(name: str, model: nn.Module, data: tuple[int, ...] | Tensor, likelihood: str, **options) -> Problem:
    """Given inputs, or random ones of a shape, and targets of the right kind."""
    inputs = data if isinstance(data, Tensor) else torch.randn(data)
    outputs = model(inputs).detach()
    draw: dict[str, Callable[[], Tensor]] = {
        "gaussian": lambda: torch.randn_like(outputs),
        "bernoulli": lambda: torch.randint(2, outputs.shape).to(outputs.dtype),
        "categorical": lambda: torch.randint(outputs.shape[-1], outputs.shape[:-1]),
    }
    return Problem(f"{name}, {likelihood}", model, inputs, draw[likelihood](), likelihood, **options)


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def convolution() -> nn.Module:
    """Stride, padding, dilation and an even kernel."""
    layers = [nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 2, dilation=(1, 2)), nn.Tanh()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 3))


class Averaged(nn.Sequential):
    """Positions averaged before the last layer: many positions in the first, one in the output."""

    def forward(self, x: Tensor) -> Tensor:
        return self[2](self[1](self[0](x)).mean(dim=1))


class Complex(nn.Module):
    """A real parameter that meets the data as complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(4, 3, 2)), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x.to(torch.complex128) @ torch.view_as_complex(self.weight)).abs())


class Picked(nn.Module):
    """A matrix of weights for every example, picked by its first input, as experts are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(2, 3, 4)), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.bmm(self.weight[(x[:, 0] > 0).long()], x[..., None])[..., 0].tanh())


class Recurrent(nn.Module):
    """A fused recurrent kernel, whose last outputs are read."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.kernel, self.head = kind(3, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.kernel(x)[0][:, -1])


class ViT(nn.Module):
    """A small vision transformer of linear layers: embedded patches, a class token, blocks, a head on the token."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.patches, self.head = nn.Linear(4, width), nn.Linear(width, classes)
        self.register_buffer("token", torch.randn(1, width))
        self.blocks = nn.Sequential(*(Block(width, 2, causal=False) for _ in range(2)))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)

    def forward(self, images: Tensor) -> Tensor:
        patches = F.unfold(images, 2, stride=2).mT
        x = torch.cat([self.token.expand(len(images), -1, -1), self.patches(patches)], dim=1)
        return self.head(self.norm(self.blocks(x))[:, 0])


def transformers() -> Iterator[Problem]:
    """The linear layers of a GPT and of a ViT."""
    tokens = torch.randint(TOKENS, (5, 4))
    yield problem("sequence, GPT", GPT(width=6, depth=2, heads=2, length=4, classes=5), tokens, "categorical")
    yield problem("sequence, ViT", ViT(width=6, classes=3), (5, 1, 4, 4), "categorical")


def shared_problems() -> Iterator[Problem]:
    """Problems that other libraries can solve as well."""
    torch.manual_seed(0)
    for likelihood in ("gaussian", "categorical", "bernoulli"):
        yield problem("linear", linear(), (7, 4), likelihood)
    for likelihood in ("gaussian", "categorical"):
        yield problem("convolution", convolution(), (6, 2, 6, 5), likelihood)
    for likelihood in ("gaussian", "categorical"):
        yield problem("sequence", linear(), (5, 4, 4), likelihood)
        yield problem("sequence, averaged", Averaged(*linear()), (5, 4, 4), likelihood)
    yield from transformers()


def unstructured_problems() -> Iterator[Problem]:
    """Problems without layers that other libraries know: only those that take any model can give the full matrix."""
    torch.manual_seed(2)
    yield problem("complex numbers", Complex(), (5, 4), "gaussian")
    yield problem("weights picked by the data", Picked(), (5, 4), "categorical")
    yield problem("recurrent, LSTM", Recurrent(nn.LSTM), (5, 4, 3), "gaussian")
    yield problem("recurrent, GRU", Recurrent(nn.GRU), (5, 4, 3), "categorical")
    for name, made in UNSTRUCTURED.items():
        yield problem(name, made(), (5, 3, 4), "categorical")


def own_problems() -> Iterator[tuple[Problem, str, str]]:
    """Problems that other libraries get wrong or refuse: problem, the matrix of ours that is exact there, and why."""
    torch.manual_seed(1)
    by_definition, single = "exact by definition", "one example and one position"

    deep = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    yield problem("sequence, deep linear", deep, (5, 4, 4), "gaussian"), "kfac", "exact in deep linear networks"

    grouped = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten())
    yield problem("groups, one position", grouped, (1, 4, 3, 3), "categorical"), "kfac", f"{single}, within a group"
    layers = [nn.Conv2d(4, 6, 2, groups=2, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(54, 3)]
    for matrix in ("diagonal", "full"):
        strided = problem("groups, strided", nn.Sequential(*layers), (4, 4, 4, 5), "categorical")
        yield strided, matrix, by_definition

    ignored = problem("all but one position ignored", linear(), (1, 4, 4), "categorical", ignore_index=7)
    ignored.targets[0, 1:] = 7
    yield ignored, "kfac", f"{single} that counts"
    ignored = problem("some positions ignored", linear(), (5, 4, 4), "categorical", ignore_index=7)
    ignored.targets[torch.rand(5, 4) < 0.5] = 7
    yield ignored, "full", by_definition

    for matrix in ("diagonal", "full"):
        yield problem("complex numbers", Complex(), (5, 4), "gaussian"), matrix, by_definition
        yield problem("weights picked by the data", Picked(), (5, 4), "gaussian"), matrix, by_definition

    for matrix in ("diagonal", "full"):
        for kind in (nn.LSTM, nn.GRU):
            yield problem(f"recurrent, {kind.__name__}", Recurrent(kind), (5, 4, 3), "gaussian"), matrix, by_definition

    weight = torch.tensor([1.0, 3.0, 0.5])
    yield problem("class weights, one example", linear(), (1, 4), "categorical", weight=weight), "kfac", single


def truth(problem: Problem) -> Tensor:
    """The generalised Gauss–Newton matrix ``[P, P]``, a mean over data, from the Jacobian of every output."""
    parameters = {name: p.detach() for name, p in problem.model.named_parameters()}
    jacobians = jacrev(lambda p: functional_call(problem.model, p, (problem.inputs,)))(parameters)
    outputs = problem.model(problem.inputs).detach()
    classes = outputs.shape[-1]
    jacobian = torch.cat([j.reshape(-1, classes, parameters[name].numel()) for name, j in jacobians.items()], dim=-1)
    targets = problem.targets.flatten(end_dim=-2) if problem.targets.is_floating_point() else problem.targets.flatten()
    total = torch.zeros(jacobian.shape[-1], jacobian.shape[-1])
    for rows, output, target in zip(jacobian, outputs.flatten(end_dim=-2), targets, strict=True):

        def loss(f: Tensor, y: Tensor = target) -> Tensor:
            if problem.likelihood == "gaussian":
                return 0.5 * (f - y).square().sum()
            if problem.likelihood == "bernoulli":
                return F.binary_cross_entropy_with_logits(f, y, reduction="sum")
            options = {"ignore_index": problem.ignore_index, "weight": problem.weight, "reduction": "sum"}
            return F.cross_entropy(f[None], y[None], **options)

        total += rows.T @ torch.autograd.functional.hessian(loss, output) @ rows
    return total / len(problem.inputs)
