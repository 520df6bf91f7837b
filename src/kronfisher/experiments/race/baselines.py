"""The optimisers to be beaten: SGD, AdamW, Muon, SOAP and Shampoo, each as good as others have made it."""

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from kronfisher.experiments.race.competitors import Competitor, Settings, register
from kronfisher.experiments.race.problems import Task

__all__ = ["FirstOrder"]


class FirstOrder:
    """Optimisers of torch's kind, fed with the gradient of the mean loss."""

    def __init__(self, model: nn.Module, task: Task, *optimizers: torch.optim.Optimizer) -> None:
        self.model, self.task, self.optimizers = model, task, optimizers
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    def step(self, x: Tensor, y: Tensor, factor: float) -> Tensor:
        """One step; see `Racer`."""
        self.model.zero_grad(set_to_none=True)
        loss = self.task.loss(self.model(x), y)
        loss.backward()
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimizer.step()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """The states of the optimisers."""
        return {str(k): optimizer.state_dict() for k, optimizer in enumerate(self.optimizers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        for k, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(state[str(k)])

    def report(self) -> str:
        """Nothing: these optimisers do not diagnose themselves."""
        return ""


class Flattened(FirstOrder):
    """Muon for matrices, and another optimiser for the rest, embeddings among them, as its authors advise.

    Kernels of convolutions are matrices ``[O, I]`` to Muon. On a CPU its Newton–Schulz iteration runs in float32:
    torch's is fixed to bfloat16, which takes a CPU five times as long (measured) and is less precise.
    """

    def __init__(self, model: nn.Module, task: Task, options: dict[str, Any]) -> None:
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        trained = _trained(model)
        kernels = [p for p in trained if p.dim() > 1 and min(p.flatten(1).shape) > 1 and id(p) not in tables]
        chosen = {id(p) for p in kernels}
        # A flat one shares the memory of its kernel, so that a step on it is a step on the kernel.
        self.flat = [(p, nn.Parameter(p.detach().flatten(1))) for p in kernels]
        muon = torch.optim.Muon([flat for _, flat in self.flat], adjust_lr_fn="match_rms_adamw", **options)
        rest = [p for p in trained if id(p) not in chosen]
        super().__init__(model, task, muon, *([torch.optim.AdamW(rest, **options)] if rest else []))
        muon.register_step_pre_hook(lambda *_: self._gradients())

    def step(self, x: Tensor, y: Tensor, factor: float) -> Tensor:
        if x.device.type != "cpu":
            return super().step(x, y, factor)
        with patch("torch.optim._muon._zeropower_via_newtonschulz", orthogonalize):
            return super().step(x, y, factor)

    def _gradients(self) -> None:
        for kernel, flat in self.flat:
            flat.grad = None if kernel.grad is None else kernel.grad.flatten(1)


def orthogonalize(gradient: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Muon's Newton–Schulz iteration in the precision of `gradient` ``[O, I]``; arguments as in torch.

    Example:
        >>> result = orthogonalize(torch.diag(torch.arange(1.0, 5)), (3.4445, -4.775, 2.0315), 5, 0)
        >>> values = torch.linalg.svdvals(result)
        >>> bool((values > 0.5).all()), bool((values < 1.3).all())
        (True, True)
    """
    a, b, c = coefficients
    x = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.mT
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if gradient.shape[0] <= gradient.shape[1] else x.mT


def sgd(model: nn.Module, task: Task, settings: Settings, seed: int) -> FirstOrder:
    """SGD with Nesterov's momentum."""
    options: dict[str, Any] = {
        "lr": settings["lr"],
        "momentum": settings["momentum"],
        "weight_decay": settings.get("weight_decay", 0.0),
    }
    return FirstOrder(model, task, torch.optim.SGD(_trained(model), nesterov=settings.get("nesterov", True), **options))


def adam(model: nn.Module, task: Task, settings: Settings, seed: int) -> FirstOrder:
    """Adam, whose weight decay is part of the loss."""
    options: dict[str, Any] = {"lr": settings["lr"], "weight_decay": settings.get("weight_decay", 0.0)}
    return FirstOrder(model, task, torch.optim.Adam(_trained(model), **options))


def adamw(model: nn.Module, task: Task, settings: Settings, seed: int) -> FirstOrder:
    """AdamW."""
    return FirstOrder(model, task, torch.optim.AdamW(_trained(model), **_rates(task, settings)))


def muon(model: nn.Module, task: Task, settings: Settings, seed: int) -> FirstOrder:
    """Muon for matrices, its updates scaled as large as AdamW's, which has the rest."""
    if not hasattr(torch.optim, "Muon"):
        raise ImportError(f"torch {torch.__version__} has no Muon: install torch 2.9 or newer, or race without it")
    return Flattened(model, task, _rates(task, settings))


def soap(model: nn.Module, task: Task, settings: Settings, seed: int) -> FirstOrder:
    """SOAP of pytorch_optimizer."""
    optimizer = _pytorch_optimizer("SOAP")(
        _trained(model), precondition_frequency=settings["frequency"], **_rates(task, settings)
    )
    return FirstOrder(model, task, optimizer)


def shampoo(model: nn.Module, task: Task, settings: Settings, seed: int) -> FirstOrder:
    """The scalable Shampoo of pytorch_optimizer (Anil et al. 2020), grafted onto Adagrad."""
    frequency = settings["frequency"]
    optimizer = _pytorch_optimizer("ScalableShampoo")(
        _trained(model),
        lr=settings["lr"],
        start_preconditioning_step=frequency,
        preconditioning_compute_steps=frequency,
        statistics_compute_steps=max(1, frequency // 10),
        moving_average_for_momentum=True,
        graft_type=ADAGRAD,
    )
    return FirstOrder(model, task, optimizer)


ADAGRAD = 2  # of pytorch_optimizer's LayerWiseGrafting, which it does not export


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _rates(task: Task, settings: Settings) -> dict[str, Any]:
    return {"lr": settings["lr"], "weight_decay": settings.get("weight_decay", task.problem.weight_decay)}


def _pytorch_optimizer(name: str) -> Any:
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise ImportError('SOAP and Shampoo come from pytorch_optimizer: pip install "kronfisher[race]"') from error
    return getattr(pytorch_optimizer, name)


def rates(low: int, high: int) -> tuple[float, ...]:
    """Learning rates in steps of a factor of about three: 10^low, 3·10^low, …, 10^high.

    Example:
        >>> rates(-3, -1)
        (0.001, 0.003, 0.01, 0.03, 0.1)
    """
    return tuple(float(f"{digit}e{k}") for k in range(low, high + 1) for digit in (1, 3))[:-1]


# Batches last: they cost one run or two, and the rate found before is right for the first of them.
FREE: dict[str, tuple[Any, ...]] = {"schedule": ("cosine", "constant"), "batch_size": (64, 128, 256, 512)}
START = {"batch_size": 256, "schedule": "cosine"}
for name, build, extra, axes in (
    ("sgd", sgd, {"lr": 1e-3, "momentum": 0.9}, {"lr": rates(-6, 0), "momentum": (0.9, 0.99), **FREE}),
    ("adamw", adamw, {"lr": 3e-3}, {"lr": rates(-5, -1), **FREE}),
    ("muon", muon, {"lr": 3e-3}, {"lr": rates(-5, 0), **FREE}),
    ("soap", soap, {"lr": 3e-3, "frequency": 10}, {"lr": rates(-5, -1), "frequency": (10, 50), **FREE}),
    ("shampoo", shampoo, {"lr": 0.1, "frequency": 20}, {"lr": rates(-4, 0), "frequency": (20, 100), **FREE}),
    ("adam", adam, {"lr": 3e-3}, {"lr": rates(-5, -1), **FREE}),
):
    takes = {"sgd": ("weight_decay", "nesterov"), "shampoo": ()}.get(name, ("weight_decay",))
    register(Competitor(name, build, {**START, **extra}, axes, baseline=True, takes=takes))
