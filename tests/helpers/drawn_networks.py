"""Random networks whose operators come from torch's own list of functions, pairs of different batches, and the truth.

`torch.overrides.get_overridable_functions` names everything that may be called on tensors; a function is called in each
of some forms until one gives a tensor that still has the examples in front. Nothing is drawn from what is registered
in the library. Batches differ in the number of examples, in positions and in settings: sizes, masks, orders and
matrices that decide how the rows of a batch are cut, chosen and combined.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import get_overridable_functions

import kronfisher as kf
from kronfisher.errors import DataError, MemoryBudgetError, NumericalError, UnsupportedError

__all__ = ["Drawn", "draw", "outcome"]

OURS = (UnsupportedError, DataError, NumericalError, MemoryBudgetError)
# Functions that are about memory, devices, graphs, randomness or the tensor itself, not its numbers.
AVOIDED = (
    "backward", "hook", "grad", "set_", "resize", "share_memory", "pin_memory", "cuda", "xpu", "cpu", "mtia", "ipu",
    "data", "storage", "stream", "detach", "apply_", "map", "quant", "module_load", "numpy", "tolist", "item",
    "pickle", "reduce_ex", "sparse", "to_", "mkldnn", "rand", "dropout", "bernoulli", "poisson", "normal",
    "multinomial", "uniform", "exponential", "geometric", "cauchy", "rrelu", "gumbel", "fractional", "empty",
    "deepcopy", "array", "dlpack", "names", "align", "rename", "refine", "cudnn", "miopen", "fbgemm", "put_",
    "fill", "zero", "requires", "dim_order", "setstate", "nested", "is_", "subclass", "new_", "copy", "vmap",
    "compile", "choose", "svd", "eig", "lobpcg", "qr",
)  # fmt: skip
N, T, D = 4, 3, 4


@cache
def functions() -> list[Callable]:
    """Functions of torch on tensors, in a fixed order."""
    found = {}
    for place, members in get_overridable_functions().items():
        if place in (torch, F, torch.special, torch.linalg, torch.functional) or place is Tensor:
            for function in members:
                name = getattr(function, "__name__", "")
                if name and not any(word in name for word in AVOIDED):
                    found.setdefault((getattr(place, "__name__", str(place)), name), function)
    return [found[key] for key in sorted(found)]


Form = Callable[[random.Random, Tensor], tuple[Any, ...]]
# Ways to call a function on activations `h`; what is drawn here is a constant of the network, and "p" a parameter.
FORMS: dict[str, Form] = {
    "h": lambda r, h: ("h",),
    "h h": lambda r, h: ("h", "h'"),
    "h p": lambda r, h: ("h", ("p", (h.shape[-1],))),
    "p h": lambda r, h: (("p", (h.shape[-1],)), "h"),
    "h dim": lambda r, h: ("h", r.randrange(-h.dim(), h.dim())),
    "h dims": lambda r, h: ("h", (r.randrange(1, h.dim()),)),
    "h number": lambda r, h: ("h", r.choice([2, 0.5, 1])),
    "h matrix": lambda r, h: ("h", ("p", (h.shape[-1], 3))),
    "h rows": lambda r, h: ("h", ("p", (3, h.shape[-1]))),
    "h rows p": lambda r, h: ("h", ("p", (3, h.shape[-1])), ("p", (3,))),
    "h dim dim": lambda r, h: ("h", *r.sample(range(-h.dim(), h.dim()), 2)),
    "h number dim": lambda r, h: ("h", r.choice([1, 2]), r.randrange(-h.dim(), h.dim())),
    "h p p": lambda r, h: ("h", ("p", (h.shape[-1],)), ("p", (h.shape[-1],))),
    "h h number": lambda r, h: ("h", "h'", 0.3),
    "p h matrix": lambda r, h: (("p", (3,)), "h", ("p", (h.shape[-1], 3))),
    "h shape p p": lambda r, h: ("h", (h.shape[-1],), ("p", (h.shape[-1],)), ("p", (h.shape[-1],))),
    "h kernel": lambda r, h: ("h", ("p", (2, h.shape[1] if h.dim() > 2 else 1, 2))),
    "list": lambda r, h: (["h", "h'"], r.randrange(-h.dim(), h.dim())),
    "h h h": lambda r, h: ("h", "h'", "h"),
    "h dim index": lambda r, h: ("h", -1, torch.tensor([1, 0])),
    "index": lambda r, h: ("h", (slice(None), *r.choice([(0,), (slice(1, None),), (torch.tensor([1, 0, 1]),)]))),
    "h p number": lambda r, h: ("h", ("p", (h.shape[-1],)), 0.5),
}  # fmt: skip


@dataclass
class Settings:
    """What a batch brings besides its inputs."""

    cut: int
    order: Tensor
    mask: Tensor
    matrix: Tensor
    rows: Tensor


@dataclass
class Batch:
    x: Tensor
    settings: Settings


class Step(nn.Module):
    """One function of torch in one form, or a way in which settings of the batch decide."""

    def __init__(self, name: str, function: Callable, arguments: tuple, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.name, self.function, self.arguments = name, function, arguments
        for key, value in parameters.items():
            self.register_parameter(key, nn.Parameter(value))

    def fill(self, value: Any, h: Tensor) -> Any:
        if isinstance(value, str):
            return {"h": h, "h'": h.tanh()}.get(value) if value in ("h", "h'") else getattr(self, value)
        return [self.fill(each, h) for each in value] if isinstance(value, list) else value

    def forward(self, h: Tensor, settings: Settings) -> Tensor:
        if self.arguments == ():
            return self.function(h, settings)
        result = self.function(*(self.fill(value, h) for value in self.arguments))
        return result if isinstance(result, Tensor) else result[0]


def roll(h: Tensor) -> Tensor:
    return h.roll(1, 0)


def flat(h: Tensor) -> Tensor:
    return h.flatten(0, 1) if h.dim() > 2 else h


# What the settings of a batch do to rows; first the harmless ways, then those in which examples may meet.
DECIDED: dict[str, Callable[[Tensor, Settings], Tensor]] = {
    "cut": lambda h, s: h[:, min(s.cut, h.shape[1] - 1) :].mean(1, keepdim=True) + h,
    "chosen": lambda h, s: h[s.order].tanh()[s.order.argsort()],
    "masked": lambda h, s: h + s.mask.reshape(-1, *[1] * (h.dim() - 1)) * h.sin(),
    "along": lambda h, s: h[:, : s.cut + 1].sum(1, keepdim=True) * h,
    "mask opens": lambda h, s: h + s.mask[0] * roll(h),
    "mask fills": lambda h, s: h + roll(h).masked_fill(s.mask[:1].reshape(*[1] * h.dim()) == 0, 0),
    "condition": lambda h, s: torch.where(s.mask[0] > 0, roll(h), h),
    "ordered": lambda h, s: h[s.order],
    "matrix": lambda h, s: (s.matrix @ h.flatten(1)).view(h.shape),
    "pieces": lambda h, s: torch.stack([part.sum(0) for part in flat(h).split(s.rows.tolist())]),
    "gathered": lambda h, s: h.flatten(1).gather(0, s.order[:, None].expand(-1, h[0].numel())).view(h.shape),
    "attention": lambda h, s: F.scaled_dot_product_attention(*[h.flatten(1)[None]] * 3, attn_mask=s.matrix > 0)[0].view(
        h.shape
    ),
    "function": lambda h, s: Product.apply(s.matrix, h.flatten(1)).view(h.shape),
    "dead": lambda h, s: h + (h.detach().abs() + s.mask[0] * 9 - 5).relu() * roll(h),
}


class Product(torch.autograd.Function):
    """A product whose matrix no edge of the graph shows."""

    @staticmethod
    def forward(ctx, matrix, rows):
        ctx.save_for_backward(matrix)
        return matrix @ rows

    @staticmethod
    def backward(ctx, gradient):
        return None, ctx.saved_tensors[0].mT @ gradient


class Drawn(nn.Module):
    """Steps one after the other; positions are averaged at the end, so that batches may have other lengths."""

    def __init__(self, steps: list[Step], last: nn.Linear) -> None:
        super().__init__()
        self.steps, self.last = nn.ModuleList(steps), last

    def forward(self, batch: Batch) -> Tensor:
        h = batch.x.clone()  # which functions may modify
        for step in self.steps:
            h = step(h, batch.settings)
        h = h.flatten(1, -2).mean(1) if h.dim() > 2 else h
        return self.last(h[:, : self.last.in_features])

    def __str__(self) -> str:
        return " | ".join(f"{step.name}" for step in self.steps)


@dataclass
class Case:
    """A network, two batches and the fit under test."""

    model: Drawn
    batches: list[Batch]
    fit: Any
    seed: int
    names: list[str] = field(default_factory=list)


def settings(r: random.Random, n: int, t: int, closed: bool) -> Settings:
    """Of a batch; `closed` ones let no example meet another."""
    order = torch.arange(n) if closed or r.random() < 0.3 else torch.randperm(n)
    matrix = torch.eye(n) if closed else r.choice([torch.ones(n, n), torch.eye(n)[torch.randperm(n)], torch.eye(n)])
    rows = torch.full((n,), t) if closed or t < 2 else torch.tensor([t - 1, t + 1, *[t] * (n - 2)])
    mask = torch.zeros(n) if closed else (torch.rand(n) > 0.4).double()
    return Settings(r.randrange(t), order, mask, matrix.to(torch.get_default_dtype()), rows)


def arguments(r: random.Random, values: tuple) -> tuple[tuple, dict[str, Tensor]]:
    """Give every parameter a name, and sometimes pass it through a function of its own first."""
    parameters: dict[str, Tensor] = {}

    def name(value: Any) -> Any:
        if isinstance(value, tuple) and value[:1] == ("p",):
            parameters[f"p{len(parameters)}"] = torch.rand(value[1]) + 0.1
            return f"p{len(parameters) - 1}"
        return value

    return tuple(map(name, values)), parameters


def step(r: random.Random, h: Tensor, kind: str) -> Step:
    """A step of a kind; a function of torch in the first form in which it maps examples to examples."""
    while True:
        if kind == "decided":
            name = r.choice(sorted(DECIDED))
            return Step(name, DECIDED[name], (), {})
        function, forms = r.choice(functions()), r.sample(sorted(FORMS), len(FORMS))
        if kind == "linear":
            function, forms = r.choice([(F.linear, ["h rows p"]), (F.linear, ["h rows"]), (torch.matmul, ["h matrix"])])
        for form in forms:
            made = Step(f"{function.__name__}({form})", function, *arguments(r, FORMS[form](r, h)))
            try:
                first, second = made(h.clone(), None), made(h.clone(), None)  # type: ignore[arg-type]
            except Exception:  # torch refuses these arguments, by whatever error: another form is tried
                continue
            if (
                not isinstance(first, Tensor)
                or not first.is_floating_point()
                or first.dim() < 2
                or len(first) != len(h)
            ):
                continue
            if first.requires_grad and first.numel() <= 300 and first[0].numel() and torch.equal(first, second):
                return made


def draw(seed: int) -> Case:
    """The network of a seed, with two batches."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    n, t = r.choice([1, 2, 3, N]), r.choice([1, 2, T])
    shape = (t, D) if r.random() < 0.7 else (D,)
    h = torch.randn(N, *((T, D) if len(shape) > 1 else (D,)), requires_grad=True)
    steps: list[Step] = []
    fixed = settings(r, N, T, closed=True)
    length = r.randint(2, 5)
    while len(steps) < length:
        kinds = ["linear"] if not steps and r.random() < 0.7 else ["linear", "torch", "torch", "decided"]
        made = step(r, h, r.choice(kinds))
        try:
            result = made(h, fixed)
        except Exception:  # the other batch's settings do not suit this function: another is drawn
            continue
        if not bool(torch.isfinite(result).all()) or float(result.detach().abs().max()) > 1e4:
            continue
        steps.append(made)
        h = result.detach().requires_grad_()
    model = Drawn(steps, nn.Linear(h.shape[-1], 2))
    closed = [r.random() < 0.5, r.random() < 0.3]
    t2 = r.choice([t, T])
    batches = []
    for size, length, shut in ((n, t, closed[0]), (r.choice([n, N]), t2, closed[1])):
        x = torch.randn(size, *((length, D) if len(shape) > 1 else (D,)))
        batches.append(Batch(x, settings(r, size, length, shut) if size > 1 else settings(r, size, length, True)))
    fit = r.choice([kf.Full(across_layers=True), kf.Full(across_layers=True), "full", "diagonal"])
    return Case(model, batches, fit, seed)


def truth(model: nn.Module, batches: list[Batch]) -> Tensor:
    """By one backward pass for every number of every example's outputs."""
    parameters, rows, count = list(model.parameters()), [], 0
    for batch in batches:
        outputs = model(batch)
        for number in outputs.flatten():
            found = torch.autograd.grad(number, parameters, retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([gradient.flatten() for gradient in found]))
        count += len(outputs)
    stacked = torch.stack(rows).double()
    return stacked.T @ stacked / count


def outcome(case: Case) -> Iterator[tuple[str, str]]:
    """("right" | "refused" | "wrong" | "raw" | "void", words) for the two orders of the batches and the first alone."""
    model, forward = case.model, lambda model, batch: (model(batch), None)
    try:
        expected = truth(model, case.batches), truth(model, case.batches[:1])
    except Exception as error:  # the network itself does not take both batches
        yield "void", f"{type(error).__name__}"
        return
    if not all(bool(torch.isfinite(each).all()) and float(each.norm()) > 1e-12 for each in expected):
        yield "void", "not finite"
        return
    for some, true in ((case.batches, expected[0]), (case.batches[::-1], expected[0]), (case.batches[:1], expected[1])):
        try:
            fisher = kf.estimate(model, list(some), kf.Gaussian(), fit=case.fit, labels="exact", forward=forward)
        except OURS as error:
            yield "refused", str(error)
            continue
        except Exception as error:
            yield "raw", f"{type(error).__name__}: {error}"
            continue
        dense = fisher.to_dense()
        if case.fit == "diagonal":
            dense, true = dense.diagonal(), true.diagonal()
        elif case.fit == "full":
            true = true * (dense != 0)
        error = float((dense - true).norm() / true.norm())
        yield ("right" if error < 1e-8 else "wrong"), f"relative distance {error:.1e}"
