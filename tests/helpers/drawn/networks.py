"""Random networks with two batches that differ, and what is asked of an estimate."""

import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kronfisher as kf
from tests.helpers.drawn.batches import DECIDED, Batch, Settings
from tests.helpers.drawn.functions import BUILT, FORMS, OPTIONS, Weight, functions, modules
from tests.helpers.drawn.seen import SEEN
from tests.helpers.drawn.steps import WAYS, Branch, Built, Decided, Parameter, Step

__all__ = ["Case", "Drawn", "draw"]

N, T, D = 4, 3, 4
_TRIES = 60  # functions, before a step is left out
_DTYPES = (torch.float64, torch.float32)
_LARGEST, _SMALLEST = 300, 1e-6
FITS = ("full", "full", "diagonal", "kfac", "tkfac", "ekfac", "kfoc")


class Drawn(nn.Module):
    """Steps one after the other; positions are averaged at the end, or are positions of the outputs."""

    def __init__(self, steps: list[nn.Module], last: nn.Module, keep: bool) -> None:
        super().__init__()
        self.steps, self.last, self.keep = nn.ModuleList(steps), last, keep
        self.exact = True  # whether everything is computed in float64

    def forward(self, batch: Batch) -> Tensor:
        h = batch.x.clone()  # which functions may modify
        for step in self.steps:
            h = step(h, batch)
        h = h.flatten(1, -2) if h.dim() > 2 else h
        h = h.mean(1) if h.dim() > 2 and not self.keep else h
        return self.last(h[..., : getattr(self.last, "in_features", 2)])

    def __str__(self) -> str:
        steps = [f"{step.name}{'' if step.way == 'once' else f' {step.way}'}" for step in self.steps]
        return " | ".join(steps) + (" (positions)" if self.keep else "") + (" (train)" if self.training else "")


@dataclass
class Case:
    """A network, two batches, and the estimate under test.

    Attributes:
        masks: by batch ``[N, P]``, which positions of the outputs count; None: all of them.
    """

    model: Drawn
    batches: list[Batch]
    fit: Any
    labels: str
    masks: list[Tensor] | None

    def mask(self, batch: Batch) -> Tensor:
        """The mask of one of the batches."""
        assert self.masks is not None
        return next(mask for mask, each in zip(self.masks, self.batches, strict=True) if each is batch)

    def __str__(self) -> str:
        return f"{self.model} ({self.fit}, {self.labels}{', masked' if self.masks is not None else ''})"


class Maker:
    """Draws the steps of one network."""

    def __init__(self, seed: int) -> None:
        self.r = random.Random(seed)
        torch.manual_seed(seed)
        self.steps: list[nn.Module] = []
        self.exact = True
        self.parameters: list[nn.Parameter] = []  # of all steps, which later ones may use too

    def settings(self, examples: int, positions: int, closed: bool) -> Settings:
        """Of a batch; `closed` ones let no example meet another."""
        r, settings = self.r, Settings.closed(examples, positions, self.r.randrange(positions))
        if closed or examples < 2:
            return settings
        if r.random() < 0.7:
            settings.order = torch.randperm(examples)
        ones, identity = torch.ones(examples, examples), torch.eye(examples)
        settings.matrix = r.choice([ones, identity[torch.randperm(examples)], identity])
        settings.mask = (torch.rand(examples) > 0.4).to(ones)
        if positions > 1:
            settings.rows[:2] += torch.tensor([-1, 1])
        return settings

    def batch(self, examples: int, shape: tuple[int, ...], closed: bool) -> Batch:
        """A batch with inputs of this shape."""
        x, ids = torch.randn(examples, *shape), torch.randint(5, (examples, 2))
        return Batch(x, ids, self.settings(examples, shape[-2] if len(shape) > 1 else 1, closed))

    def _weights(self, values: tuple) -> tuple[tuple, dict[str, Tensor]]:
        """Make parameters of what is to be one; sometimes seen through a function, sometimes an earlier step's."""
        own: dict[str, Tensor] = {}

        def made(value: Any) -> Any:
            if isinstance(value, list):
                return [made(each) for each in value]
            if not isinstance(value, Weight):
                return value
            seen = "as it is"
            if value.shape and self.r.random() < 0.35:
                seen = self.r.choice(sorted(SEEN))
            shape = SEEN[seen].stored(value.shape) if len(value.shape) > 1 or seen != "transposed" else value.shape
            seen = seen if len(value.shape) > 1 or seen != "transposed" else "as it is"
            name = f"p{len(own)}"
            tied = [p for p in self.parameters if p.shape == shape]
            if tied and self.r.random() < 0.5:
                own[name] = self.r.choice(tied)
            else:
                own[name] = nn.Parameter(torch.rand(shape) + 0.1 - 0.6 * (torch.rand(shape) < 0.3))
            return Parameter(name, seen, value.shape, value.picked)

        return tuple(map(made, values)), own

    def _of_functions(self, h: Tensor, kind: str) -> list[Step]:
        """Candidates for a step: one function in forms in an order that begins with those that have parameters."""
        r = self.r
        function, names = r.choice(functions(kind)), r.sample(sorted(FORMS), len(FORMS))
        if kind == "linear":
            function, *names = r.choice(_LINEAR)
        elif r.random() < 0.6:
            names.sort(key=lambda name: "h" in name.split() and len(set(name.split()) - {"h", "number", "dim"}) == 0)
        found = []
        for name in names:
            try:
                values = FORMS[name](r, h)
            except (IndexError, ValueError):  # too few axes
                continue
            padded = [{"padding_idx": 1}] if "ids" in name.split() and len(self.steps) % 2 else []  # else hardly drawn
            for options in [*(r.sample(OPTIONS, 4) if kind != "linear" and r.random() < 0.4 else []), *padded, {}]:
                words = ", ".join([name, *(f"{key}={value}" for key, value in options.items())])
                found.append(Step(f"{function.__name__}({words})", function, values, options, {}))
        return found

    def _of_modules(self, h: Tensor, train: bool) -> list[Step]:
        r, made, found = self.r, self.r.choice(modules(self.r.random() < 0.5)), []
        if train and "Dropout" in made.__name__:  # random, so that there is no truth
            return []
        for build in r.sample(BUILT, len(BUILT)):
            options = r.choice([*OPTIONS, *[{"batch_first": True}] * 6]) if r.random() < 0.5 else {}
            if "Transformer" in made.__name__:
                options = {"dim_feedforward": 3, "dropout": 0.0, "batch_first": r.random() < 0.7}
            try:
                module = made(*build(r, h), **options)
            except Exception:  # torch refuses these arguments, by whatever error
                continue
            if sum(p.numel() for p in module.parameters()) > _LARGEST:
                continue
            for arguments in (("h",), ("h", "h'"), ("h", "h", "h'"), ("ids",)):
                found.append(Built(f"{made.__name__}({', '.join(arguments)})", module, arguments))
        return found

    def step(self, h: Tensor, batch: Batch, train: bool) -> tuple[nn.Module, Tensor] | None:
        """A step that maps examples to examples, and what it makes of `h`."""
        r = self.r
        kinds = ["linear"] if not self.steps and r.random() < 0.5 else _KINDS
        kind = r.choice(kinds)
        if kind == "branch":
            return self._branch(h, batch, train)
        for _ in range(_TRIES):
            if kind == "decided":
                name = r.choice(sorted(DECIDED))
                candidates: list[Any] = [Decided(name, DECIDED[name])]
            elif kind == "again" and self.steps:
                candidates = [r.choice(list(self.steps))]
            else:
                candidates = self._of_modules(h, train) if kind == "module" else self._of_functions(h, kind)
            way = r.choice(sorted(WAYS)) if r.random() < 0.3 else "once"
            for made in candidates:
                if type(made) is Step and kind != "again":
                    made.arguments, own = self._weights(made.arguments)
                    for name, value in own.items():
                        made.register_parameter(name, value)  # type: ignore[arg-type]
                for each in [made.way] if kind == "again" else dict.fromkeys([way, "once"]):
                    made.way = each
                    result = _tried(made.train(train), h, batch)
                    if result is not None:
                        return made, result
        return None

    def _branch(self, h: Tensor, batch: Batch, train: bool) -> tuple[nn.Module, Tensor] | None:
        """Two steps, the second of which fits where the first does, one of which is taken."""
        first = self.step(h, batch, train)
        for _ in range(5 if first else 0):
            second = self.step(h, batch, train)
            if first and second and first[1].shape == second[1].shape and first[0] is not second[0]:
                made = Branch(first[0], second[0])
                return made, first[1] if batch.settings.cut % 2 == 0 else second[1]
        return first

    def network(self) -> tuple[Drawn, tuple[int, ...]]:
        """A network, and the shape of its inputs."""
        r = self.r
        shape = r.choice([(D,), (T, D), (T, D), (T, D), (2, T, D)])
        h = torch.randn(N, *shape, requires_grad=True)
        batch, length, train = self.batch(N, shape, closed=True), r.randint(2, 5), r.random() < 0.15
        for _ in range(length):
            found = self.step(h, batch, train)
            if found is None:
                continue
            made, result = found
            self.steps.append(made)
            self.exact &= result.dtype == torch.float64
            self.parameters += [p for p in made.parameters() if not any(p is each for each in self.parameters)]
            h = result.detach().requires_grad_()
        keep = h.dim() > 2 and r.random() < 0.25
        last = nn.Linear(h.shape[-1], 5 if keep else 2)  # five are told from positions
        model = Drawn(self.steps, last if keep or r.random() < 0.85 or not self.parameters else nn.Identity(), keep)
        model.exact = self.exact
        own = list(model.parameters())
        for p in own[1:] if r.random() < 0.25 else []:
            p.requires_grad_(r.random() < 0.5)
        return model.train(train), shape


_LINEAR = [
    (F.linear, "h rows p"), (F.linear, "h rows"), (F.linear, "h square"), (torch.matmul, "h matrix"),
    (torch.einsum, "einsum of a stack"), (torch.einsum, "einsum of scales"), (torch.einsum, "einsum of a picked"),
    (torch.einsum, "einsum of several"), (torch.einsum, "einsum of two paths"), (F.conv1d, "h depthwise"),
    (torch.matmul, "h picked"), (torch.matmul, "h stack"), (torch.bmm, "h picked"), (torch.bmm, "h stack"),
    (torch.mul, "h picked rows"), (torch.matmul, "h square"), (torch.matmul, "matrix h"), (torch.mul, "h p"),
    (torch.sub, "h broadcast"),
]  # fmt: skip
_KINDS = [
    "linear", "linear", "torch", "torch", "torch", "weighted", "weighted", "module", "decided", "decided",
    "again", "branch",
]  # fmt: skip


def _tried(step: nn.Module, h: Tensor, batch: Batch) -> Tensor | None:
    """What a step makes of `h`, if that is the same twice and is usable."""
    try:
        first, second = step(h.clone(), batch), step(h.clone(), batch)
        if not isinstance(first, Tensor) or first.dtype not in _DTYPES or first.layout is not torch.strided:
            return None
        if first.dim() < 2 or len(first) != len(h) or not 0 < first.numel() <= _LARGEST or not first.requires_grad:
            return None
        size = float(first.detach().abs().max())
        return first if torch.allclose(first, second, rtol=1e-10) and _SMALLEST < size < 1e3 else None
    except Exception:  # torch refuses these arguments, by whatever error: another form is tried
        return None


def draw(seed: int) -> Case:
    """The network of a seed, with two batches."""
    maker = Maker(seed)
    model, shape = maker.network()
    r, length = maker.r, shape[-2] if len(shape) > 1 else 1
    n, t = r.choice([1, 2, 3, N]), r.choice([1, 2, length, length, length])
    closed = [r.random() < 0.5, r.random() < 0.3]
    batches = []
    for size, positions, shut in ((n, t, closed[0]), (r.choice([n, N]), r.choice([t, length, length]), closed[1])):
        batches.append(maker.batch(size, (*shape[:-2], positions, D) if len(shape) > 1 else shape, shut))
    masks = None
    if model.keep and r.random() < 0.5:
        masks = []
        for batch in batches:
            try:
                places = model(batch).shape[:2]
            except Exception:  # the network does not take this batch: the case is void
                places = (len(batch.x), 1)
            mask = torch.rand(places) > 0.4
            mask[:, :1] = True
            masks.append(mask)
    fit = kf.Full(across_layers=True) if r.random() < 0.45 else r.choice(FITS)
    return Case(model, batches, fit, r.choice(["exact", "exact", "observed"]), masks)
