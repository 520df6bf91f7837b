"""The natural gradient before any optimiser of torch."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from kronfisher.errors import DataError, NumericalError, UnsupportedError
from kronfisher.estimation.accumulator import Labels
from kronfisher.fisher.damping import Damping, FactoredTikhonov
from kronfisher.fisher.parameters import trainable, unwrapped
from kronfisher.fits import Choice
from kronfisher.likelihoods import Likelihood
from kronfisher.optim.curvature import Curvature, require_outputs
from kronfisher.optim.damping_schedule import Constant, LevenbergMarquardt, Trust
from kronfisher.optim.intervals import Refresh
from kronfisher.optim.natural_gradient import DEFAULT_FIT
from kronfisher.optim.step_size import inner

__all__ = ["Preconditioner"]


class Preconditioner:
    """Replaces ``.grad`` by ``(F̆ + λ)⁻¹ .grad``; any optimiser then takes the step.

    Call it in place of the model; where statistics are due it draws labels and goes backward once more, which touches
    no ``.grad``. F̆ is a mean over data, whatever the loss is divided by.

    Args:
        model: any module.
        likelihood: what the outputs mean, such as ``kf.Categorical()``.
        fit: the structure of the curvature, as in `estimate`.
        damping: how λ enters; one with a λ of its own is used as it is, if `trust` is None.
        trust: who chooses λ, `Constant` or `Schedule`; a number keeps it constant. None: a tenth of the mean eigenvalue
            of the first statistics.
        refresh: how often statistics and inverses are renewed.
        params: parameters to treat; None: all that require a gradient.
        labels: as in `NaturalGradient`; ``"observed"`` needs the targets: ``preconditioner(x, targets=y)``.
        samples: label draws per datum.
        kl_limit: scale the answer so that ``.gradᵀ (F̆ + λ)⁻¹ .grad`` is at most this; None: no limit.
        seed: of the label draws.

    Raises:
        UnsupportedError: `trust` compares losses, which only `NaturalGradient` can do.

    Example:
        >>> import torch, kronfisher as kf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> x, y = torch.randn(64, 4), torch.randint(3, (64,))
        >>> preconditioner = kf.Preconditioner(model, kf.Categorical())
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> losses = []
        >>> for _ in range(10):
        ...     sgd.zero_grad()
        ...     loss = torch.nn.functional.cross_entropy(preconditioner(x), y)
        ...     loss.backward()
        ...     preconditioner.step()
        ...     sgd.step()
        ...     losses.append(loss.item())
        >>> losses[-1] < losses[0]
        True
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        fit: Choice = DEFAULT_FIT,
        damping: Damping = FactoredTikhonov(),  # noqa: B008 (frozen)
        trust: Trust | float | None = None,
        refresh: Refresh = Refresh(),  # noqa: B008 (frozen)
        params: Iterable[nn.Parameter] | None = None,
        labels: Labels = "sampled",
        samples: int = 1,
        kl_limit: float | None = None,
        seed: int = 0,
    ) -> None:
        self._wrapped, self._model = model, unwrapped(model)
        trust = Constant(damping.value) if trust is None else trust
        self.trust = Constant(trust) if isinstance(trust, int | float) else trust
        if isinstance(self.trust, LevenbergMarquardt):
            raise UnsupportedError(
                "LevenbergMarquardt compares the loss before and after a step, and a Preconditioner sees neither. Use "
                "trust=kf.Constant(λ) or kf.Schedule(...), or kf.NaturalGradient."
            )
        named = trainable(self._model)
        if params is not None:
            wanted = {id(p) for p in params}
            named = {name: p for name, p in named.items() if id(p) in wanted}
            if len(named) != len(wanted):
                raise ValueError("`params` holds parameters that are not the model's, or that are frozen.")
        self.kl_limit = kl_limit
        self.curvature = Curvature(
            self._model,
            named,
            likelihood,
            fit=fit,
            damping=damping,
            refresh=refresh,
            labels=labels,
            samples=samples,
            seed=seed,
        )
        self._damping: float | None = None

    def __call__(self, *inputs: Any, targets: Any = None, **options: Any) -> Tensor:
        """The model's outputs.

        Args:
            inputs: for the model.
            targets: the observed labels, where the likelihood's masks or weights, or ``labels="observed"``, need them.
            options: for the model.
        """
        curvature = self.curvature

        def forward() -> Tensor:
            return self._wrapped(*inputs, **options)

        curvature.prepare()
        if not (curvature.due and torch.is_grad_enabled()):
            return forward()
        with curvature.captured() as capture:
            outputs = forward()
        require_outputs(outputs)
        with suppress(NumericalError):  # outputs that are not finite; the loss will say so
            curvature.absorb(capture, outputs, targets, retain=True)
        return outputs

    @torch.no_grad()
    def step(self) -> None:
        """Precondition every ``.grad`` in place; gradients that are not finite are left as they are.

        Raises:
            UnsupportedError: there are no statistics yet.
        """
        curvature = self.curvature
        curvature.merge()
        gradients = {name: p.grad for name, p in curvature.parameters.items() if p.grad is not None}
        if sparse := [name for name, gradient in gradients.items() if gradient.layout is not torch.strided]:
            raise UnsupportedError(
                f"{', '.join(sparse)}: a sparse gradient has no room for a natural one. Use sparse=False in the layer, "
                "or leave the parameter out of `params`."
            )
        if not gradients:
            curvature.step += 1
            return
        if not curvature.ready:
            if curvature.run is not None:  # no batch so far had anything that counts
                curvature.step += 1
                return
            raise UnsupportedError("There is no curvature yet: call outputs = preconditioner(x) in place of the model.")
        if self._damping is None:
            self._damping = self.trust.start(max(curvature.measure(), torch.finfo(torch.float32).tiny))
        self._damping = self.trust.at(curvature.step, self._damping)
        curvature.renew(self._damping)
        natural = curvature.precondition(gradients, self._damping)
        scale = None
        if self.kl_limit is not None:
            slope = inner(natural, gradients)
            scale = (self.kl_limit / slope.abs().clamp_min(1e-300)).sqrt().clamp(max=1.0)
        for name, gradient in gradients.items():
            found = natural[name] if scale is None else natural[name] * scale
            if gradient.device.type != "cpu":
                gradient.copy_(torch.where(torch.isfinite(found), found, gradient))
            elif isfinite(float(found.sum())):
                gradient.copy_(found)
        curvature.step += 1

    def state_dict(self) -> dict[str, Any]:
        """Averages and inverses; resumed with the same number of threads, training gives the same bits."""
        return {"damping": self._damping, "curvature": self.curvature.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            DataError: it was saved for other parameters or other fits, or is something else.
        """
        if state.keys() != {"damping", "curvature"}:
            raise DataError(f"this is not the state of a Preconditioner: it has {sorted(state)}")
        self.curvature.load_state_dict(state["curvature"])
        self._damping = state["damping"]
