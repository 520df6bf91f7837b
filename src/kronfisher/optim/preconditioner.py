"""The natural gradient for any optimiser of torch."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kronfisher.distributed import ProcessGroup, Spread, ranks_of, whole
from kronfisher.errors import DataError, UnsupportedError, require_kind
from kronfisher.estimation.recipe import Labels
from kronfisher.fisher.damping import Damping, FactoredTikhonov
from kronfisher.fisher.parameters import trainable, unwrapped
from kronfisher.fits import Choice
from kronfisher.likelihoods import Likelihood
from kronfisher.optim.damping_schedule import Constant, DampingSchedule, ScheduledDamping
from kronfisher.optim.direction import Direction
from kronfisher.optim.foreach import norms
from kronfisher.optim.forward_backward import require_outputs
from kronfisher.optim.inner_product import inner
from kronfisher.optim.intervals import Refresh
from kronfisher.optim.natural_gradient import DEFAULT_FIT
from kronfisher.optim.ownership import Ownership, Share, require_share
from kronfisher.optim.quadratic_step import DAMPING, TRUST
from kronfisher.optim.report import TrainingReport
from kronfisher.optim.statistics import Statistics
from kronfisher.optim.watch import Watch, no_curvature_error

__all__ = ["Preconditioner"]

UNCOVERED = "steps along their own gradients"

CHOOSE = "say which are the outputs: Preconditioner(..., outputs=lambda answer: answer[0])"
CALL = "call outputs = preconditioner(x) in place of the model before preconditioner.step()"


class Preconditioner:
    """Turns ``.grad`` into a natural gradient ``(F̆ + λ)⁻¹ .grad``; any optimiser then takes the step.

    Each layer's natural gradient gets the norm of the gradient that it replaces, so that the learning rate that served
    the optimiser goes on serving: along the steepest direction of a quadratic loss such a step is no longer than the
    gradient's.

    Call it in place of the model; where statistics are due it draws labels and runs one more backward pass, which
    leaves every ``.grad`` alone. F̆ is a mean over examples, whatever the loss is divided by.

    Args:
        model: any module.
        likelihood: the distribution that the outputs parametrise, such as ``kf.Categorical()``.
        fit: the structure of the curvature, as in `estimate`.
        damping: how λ enters; one with a λ of its own is used as it is, if `trust` is None.
        trust: the damping schedule, `Constant` or `Schedule`; a number keeps λ constant. None: a tenth of the mean
            eigenvalue of the first statistics.
        refresh: how often statistics and inverses are renewed.
        params: parameters to treat; None: all that require a gradient.
        labels: as in `NaturalGradient`; ``"observed"`` needs the targets: ``preconditioner(x, targets=y)``.
        samples: label draws per example.
        outputs: gives the outputs that the likelihood is of, from what the model returned, such as
            ``lambda answer: answer[0]``. None: that itself, or its ``logits``.
        scale: ``"gradient"``: each layer gets the norm of its gradient; None: ``(F̆ + λ)⁻¹ .grad`` as it is.
        kl_limit: in place of `scale`, scale ``(F̆ + λ)⁻¹ .grad`` so that its product with ``.grad`` is at most this.
        seed: of the label draws.
        group: the processes that train together under DDP or ``fully_shard``, each on batches of its own, as a process
            group of torch.distributed or a one-dimensional device mesh. None: this process alone.
        share: as in `NaturalGradient`.

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
        trust: DampingSchedule | float | None = None,
        refresh: Refresh = Refresh(),  # noqa: B008 (frozen)
        params: Iterable[nn.Parameter] | None = None,
        labels: Labels = "sampled",
        samples: int = 1,
        outputs: Callable[[Any], Any] | None = None,
        scale: Literal["gradient"] | None = "gradient",
        kl_limit: float | None = None,
        seed: int = 0,
        group: ProcessGroup = None,
        share: Share = "all",
    ) -> None:
        require_share(share)
        self._wrapped, self._model = model, unwrapped(model)
        require_kind("damping", damping, Damping, DAMPING)
        require_kind("trust", trust, (DampingSchedule, float, int, type(None)), TRUST)
        require_kind("refresh", refresh, Refresh, "use kf.Refresh(...)")
        trust = Constant(damping.value) if trust is None else trust
        self.trust = Constant(trust) if isinstance(trust, int | float) else trust
        if self.trust.compares_losses:
            raise UnsupportedError(
                f"{type(self.trust).__name__} compares the loss before and after a step, and a Preconditioner sees "
                "neither. Use trust=kf.Constant(λ) or kf.Schedule(...), or kf.NaturalGradient."
            )
        ranks = ranks_of(group)
        self._spread = Spread.of(self._model, ranks)
        self._all = params is None
        own = {name: id(p) for name, p in self._model.named_parameters()}
        with whole(self._model):
            named = trainable(self._model)
        if params is not None:
            wanted = {id(p) for p in params}
            named = {name: p for name, p in named.items() if own[name] in wanted}
            if len(named) != len(wanted):
                raise ValueError("`params` holds parameters that are not the model's, or that are frozen.")
        if scale not in ("gradient", None):
            raise ValueError(f'scale={scale!r}: use "gradient" or None.')
        self.scale, self.kl_limit = scale if kl_limit is None else None, kl_limit
        self.steps, self._outputs = 0, outputs
        self.statistics = Statistics(
            self._model,
            named,
            likelihood,
            fit=fit,
            refresh=refresh,
            labels=labels,
            samples=samples,
            seed=seed,
            ranks=ranks,
            alone=group is not None,
            spread=self._spread,
            bounds=True,
        )
        self.direction = Direction(named, damping, refresh, Ownership.of(ranks, share))
        self.damping = ScheduledDamping(self.trust)
        self.watch = Watch()
        self._seen = False  # whether a forward pass was captured for this step

    def __call__(self, *inputs: Any, targets: Any = None, **options: Any) -> Any:
        """What the model returns.

        Args:
            inputs: for the model.
            targets: the observed labels, where the likelihood's masks or weights, or ``labels="observed"``, need them.
            options: for the model.
        """
        statistics, step = self.statistics, self.steps
        if self._all and self._spread is None and statistics.is_due(step):
            self._extend()
        statistics.prepare(step)
        if not (statistics.is_due(step) and torch.is_grad_enabled()):
            return self._wrapped(*inputs, **options)
        with statistics.captured() as capture:
            answer = self._wrapped(*inputs, **options)
        self._seen = True
        outputs = require_outputs(answer if self._outputs is None else self._outputs(answer), CHOOSE)
        statistics.read(capture, outputs, targets, step)
        return answer

    def _extend(self) -> None:
        """Treat what has come into the model, or was unfrozen, since the last statistics, too."""
        known, own = self.statistics.parameters, trainable(self._model)
        if any(known.get(name) is not parameter for name, parameter in own.items()):
            self.statistics.extend({**known, **own})
            self.direction.extend({**known, **own})

    @torch.no_grad()
    def step(self) -> None:
        """Precondition every ``.grad`` in place; gradients that are not finite are left as they are.

        Raises:
            UnsupportedError: there are no statistics yet.
        """
        changed = nullcontext() if self._spread is None else self._spread.changed(gradients=True)
        with self.statistics.watched(), changed:
            self._step()

    def _step(self) -> None:
        named = self.statistics.parameters
        gradients = {name: p.grad for name, p in named.items() if p.grad is not None}
        if sparse := [name for name, gradient in gradients.items() if gradient.layout is not torch.strided]:
            raise UnsupportedError(
                f"{', '.join(sparse)}: a sparse gradient has no room for a natural one. Use sparse=False in the layer, "
                "or leave the parameter out of `params`."
            )
        seen, ready, self._seen = self._seen, self.statistics.ready, False
        if gradients and not (seen or ready):
            raise no_curvature_error(CALL)
        due = self.statistics.is_due(self.steps)
        self.statistics.merge(self.steps)
        if due and seen:  # values are read here anyway
            sizes = {name: parameter.numel() for name, parameter in named.items()}
            self.watch.uncovered(self.statistics.uncovered, sizes, UNCOVERED)
        self.direction.follow(self.statistics.layers, self.steps)
        if gradients and ready and self.statistics.is_due(self.steps):
            self.watch.late(self.steps, seen=seen, call=CALL)
        if gradients and self.statistics.ready:  # otherwise no batch so far had anything that counts
            self._precondition(gradients)
        else:
            self.watch.unchanged(self.steps, gradients=bool(gradients))
        self.steps += 1

    def _precondition(self, gradients: Mapping[str, Tensor]) -> None:
        damping = self.damping.at(self.steps, self.direction.measure)
        self.direction.renew(damping, self.steps)
        self.statistics.schedule_bases(self.direction.due)
        natural = self.direction.precondition(gradients, damping)
        scales: dict[str, Tensor] = {}
        if self.kl_limit is not None:
            slope = inner(natural, gradients)
            scales = dict.fromkeys(gradients, (self.kl_limit / slope.abs().clamp_min(1e-300)).sqrt().clamp(max=1.0))
        elif self.scale == "gradient":
            for names in self._layers(gradients):
                before, after = (torch.stack(norms([v[n] for n in names])).norm() for v in (gradients, natural))
                scales |= dict.fromkeys(names, before / torch.where(after > 0, after, 1.0))
        for name, gradient in gradients.items():
            answer = natural[name] * scales[name] if name in scales else natural[name]
            gradient.copy_(torch.where(torch.isfinite(answer.sum()), answer, gradient))

    def _layers(self, gradients: Mapping[str, Tensor]) -> list[list[str]]:
        """Names of the parameters of each layer; layers that share one are one, and so is what no layer covers."""
        joined: dict[str, list[str]] = {name: [name] for name in gradients}
        for block in (block for layer in self.statistics.layers for block in layer.blocks):
            members = list(dict.fromkeys(n for name in block.parameters if name in joined for n in joined[name]))
            joined |= {name: members for name in members}
        return [members for name, members in joined.items() if members[0] == name]

    def report(self) -> TrainingReport:
        """The state of training, without the loss and the step, which are the caller's and the optimiser's.

        Example:
            >>> import torch, kronfisher as kf
            >>> model = torch.nn.Linear(3, 2)
            >>> preconditioner = kf.Preconditioner(model, kf.Categorical())
            >>> preconditioner(torch.randn(50, 3)).logsumexp(1).mean().backward()
            >>> preconditioner.step()
            >>> preconditioner.report().step, preconditioner.report().uncovered
            (1, {})
        """
        statistics = self.statistics
        return TrainingReport(
            step=self.steps,
            loss=None,
            damping=self.damping.value,
            step_size=1.0,
            momentum=0.0,
            ratio=None,
            rejected=0,
            skipped=0,
            dropped=statistics.dropped,
            seconds={"statistics": statistics.seconds, "inverses": self.direction.seconds},
            stale=self.direction.overdue(self.steps),
            troubles=self.direction.troubles,
            uncovered=statistics.uncovered,
            uncovered_step=UNCOVERED,
            coupled=tuple(statistics.coupled),
            cuts=tuple(statistics.cuts),
            warnings=tuple(self.watch.told.values()),
            overdue=self.watch.overdue,
            sent=statistics.sent,
            collectives=statistics.collectives,
        )

    def state_dict(self) -> dict[str, Any]:
        """Averages and inverses; resumed with the same number of threads, training gives the same bits.

        With ``share="owned"`` all ranks make the call, as of `NaturalGradient`.
        """
        return {
            "steps": self.steps,
            "damping": self.damping.state_dict(),
            "statistics": self.statistics.state_dict(),
            "direction": self.direction.state_dict(),
            "watch": self.watch.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            DataError: it was saved for other parameters or other fits, by an earlier version, or is something else.
        """
        if state.keys() == {"damping", "curvature"}:
            raise DataError(
                "the state was saved by an earlier version of kronfisher, which kept it in another form. Load the "
                "weights and the optimiser's state, and continue with a new Preconditioner."
            )
        if state.keys() != {"steps", "damping", "statistics", "direction", "watch"}:
            raise DataError(f"this is not the state of a Preconditioner: it has {sorted(state)}")
        state = deepcopy(dict(state))  # or two of them would change the same tensors
        self.statistics.load_state_dict(state["statistics"])
        self.direction.load_state_dict(state["direction"], self.statistics.layers)
        self.damping.load_state_dict(state["damping"])
        self.watch.load_state_dict(state["watch"])
        self.steps = state["steps"]
