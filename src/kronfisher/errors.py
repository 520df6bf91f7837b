"""Errors by kind: every message says what is wrong, where, and what to do. And checks that raise them, read at once."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral

import torch
from torch import Tensor

__all__ = [
    "DataError",
    "IndefiniteError",
    "MemoryBudgetError",
    "NumericalError",
    "NumericalWarning",
    "RankError",
    "SingularError",
    "UnsupportedError",
    "keep_integer",
    "read",
    "require",
    "require_integer",
    "require_kind",
    "together",
    "waiting",
]


class UnsupportedError(NotImplementedError):
    """The model does something this library does not treat; the message names the parameter and the operator.

    Example:
        >>> import kronfisher as kf
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))  # its mean ties examples
        >>> try:
        ...     kf.estimate(model, torch.randn(5, 3), kf.Gaussian())
        ... except kf.UnsupportedError as error:
        ...     print(error)
        BatchNorm of 1.weight is in train mode... Call model.eval()...
    """


class DataError(ValueError):
    """A batch, a target or a loader does not fit what was asked; the message names the batch.

    Example:
        >>> import kronfisher as kf
        >>> inputs, targets = torch.randn(5, 3), torch.randn(4, 2)
        >>> try:
        ...     kf.estimate(torch.nn.Linear(3, 2), (inputs, targets), kf.Gaussian(), labels="observed")
        ... except kf.DataError as error:
        ...     print(error)
        batch 0: targets [4, 2] and outputs [5, 2] differ in the number of examples...
    """


class NumericalError(ArithmeticError):
    """A number is not finite, or a factorisation failed; the message names the block.

    Example:
        >>> import kronfisher as kf
        >>> try:
        ...     kf.estimate(torch.nn.Linear(3, 2), torch.full((5, 3), torch.inf), kf.Gaussian())
        ... except kf.NumericalError as error:
        ...     print(error)
        batch 0: the batch contains 15 values that are NaN or Inf... Clean or drop them; nothing was changed.
    """


class SingularError(NumericalError):
    """A matrix that has to be inverted has (numerically) zero eigenvalues; the message says how much damping helps.

    Example:
        >>> import kronfisher as kf
        >>> fisher = kf.estimate(torch.nn.Linear(3, 2), torch.zeros(5, 3), kf.Gaussian(), labels="exact")
        >>> try:
        ...     fisher.solve(torch.ones(8))
        ... except kf.SingularError as error:
        ...     print(error)
        weight (input factor) is singular to torch.float32 precision... Add damping first...
        >>> (fisher + 0.1).solve(torch.ones(8)).shape
        torch.Size([8])
    """


class IndefiniteError(SingularError):
    """A matrix that has to be positive definite has negative eigenvalues; it is never modified implicitly.

    Example:
        >>> import kronfisher as kf
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
        >>> data = 3 * torch.randn(5, 3)
        >>> fisher = kf.estimate(model, data, kf.Bernoulli(), fit=kf.KroneckerSum(2), labels="exact")
        >>> try:
        ...     fisher.inverse()
        ... except kf.IndefiniteError as error:
        ...     print(error)
        0.weight is indefinite... Damp it, choose a fit... or change its spectrum explicitly...
        >>> bool((fisher.clamped() + 0.1).inverse().trace() > 0)
        True
    """


class MemoryBudgetError(MemoryError):
    """The work does not fit the memory given; the message says how many bytes it takes.

    Example:
        >>> import kronfisher as kf
        >>> try:
        ...     kf.estimate(torch.nn.Linear(99, 99), torch.randn(5, 99), kf.Gaussian(), fit="full", memory_budget=10**6)
        ... except kf.MemoryBudgetError as error:
        ...     print(error)
        The estimate needs 784,082,388 bytes...
    """


class RankError(RuntimeError):
    """A rank of a process group failed, or ranks disagree; it is raised on all of them and names block and rank.

    Example:
        >>> import kronfisher as kf
        >>> def estimate(model, loader, group):  # on every rank; one that fails tells the others
        ...     try:
        ...         return kf.estimate(model, kf.shard(loader, group=group), kf.Categorical(), group=group)
        ...     except kf.RankError as error:
        ...         raise SystemExit(f"stopped on all ranks: {error}")
    """


class NumericalWarning(UserWarning):
    """A result is usable but less precise than asked for: a fallback or a floor acted.

    Example:
        >>> import kronfisher as kf
        >>> warnings.filterwarnings("error", category=kf.NumericalWarning)  # where nothing less precise will do
    """


def require_kind(name: str, value: object, kinds: type | tuple[type, ...], remedy: str) -> None:
    """Raise a TypeError that says what to give, unless an option is of one of the kinds."""
    if not isinstance(value, kinds):
        raise TypeError(f"{name}={value!r} is of type {type(value).__name__}; {remedy}.")


def require_integer(name: str, value: object, least: float, remedy: str, owner: str = "") -> int:
    """An option as an integer; a ValueError that says what to give, unless it is one of at least so much, and no bool.

    Args:
        name: of the option.
        value: as it was given.
        least: that it may be.
        remedy: what to give.
        owner: the class whose option it is, for the message.

    Example:
        >>> require_integer("rank", True, 1, "use an integer of at least 1")
        Traceback (most recent call last):
        ValueError: rank=True: use an integer of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        given = f"{name}={value!r}"
        raise ValueError(f"{f'{owner}({given})' if owner else given}: {remedy}.")
    return int(value)


def keep_integer(options: object, name: str, least: float, remedy: str = "") -> None:
    """Check an integer option of a dataclass, frozen or not, and keep it as an `int`; see `require_integer`."""
    remedy = remedy or f"use an integer of at least {least}"
    kept = require_integer(name, getattr(options, name), least, remedy, type(options).__name__)
    object.__setattr__(options, name, kept)


# Checks ---------------------------------------------------------------------------------------------------------------

Check = tuple[Tensor, Callable[[], Exception | None]]
_CPU = torch.device("cpu")
_pending: ContextVar[list[Check] | None] = ContextVar("pending checks", default=None)


def require(good: Tensor, error: Callable[[], Exception | None]) -> None:
    """Raise an error, or warn, unless a flag, which may lie on a device, is true; within `together` at its end.

    Args:
        good: a single boolean.
        error: makes the error or the warning; it may read values. None: a closer look shows that all is well.
    """
    pending = _pending.get()
    if pending is not None:
        pending.append((good, error))
    else:
        _raise_first([(good, error)], [bool(good)])


def waiting() -> bool:
    """Whether flags that are required are going to be read later, by a block of `together`."""
    return _pending.get() is not None


@contextmanager
def together() -> Iterator[list[Tensor | bool]]:
    """Read all flags that are required within this block at its end, so that the host waits for a device only once.

    Of several that are false, the first one required raises its error, also where the block itself failed later on
    because of it. A block within another leaves its flags to that.

    Yields:
        An empty list, for other flags to be read with them: after the block it holds their values.
    """
    asked: list[Tensor | bool] = []
    if _pending.get() is not None:
        yield asked
        asked[:] = read(asked)
        return
    pending: list[Check] = []
    token = _pending.set(pending)
    try:
        yield asked
    except Exception as error:
        _pending.reset(token)
        _raise_first(pending, read([good for good, _ in pending]), error)
        raise
    except BaseException:
        _pending.reset(token)
        raise
    _pending.reset(token)
    values = read([*(good for good, _ in pending), *asked])
    asked[:] = values[len(pending) :]
    _raise_first(pending, values)


def _raise_first(pending: list[Check], values: list[bool], cause: Exception | None = None) -> None:
    """Raise the first error of flags that are false, after the warnings before it."""
    for (_, error), good in zip(pending, values, strict=False):
        if good:
            continue
        problem = error()
        if isinstance(problem, Warning):
            warnings.warn(problem, stacklevel=4)
        elif problem is not None:
            try:
                raise problem from cause
            finally:
                del problem  # its traceback holds this frame, and so the activations of the whole pass


def read(flags: Sequence[Tensor | bool]) -> list[bool]:
    """The values of flags, of which tensors are read at once.

    Example:
        >>> read([torch.tensor(True), False])
        [True, False]
    """
    if all(not isinstance(flag, Tensor) or flag.device == _CPU for flag in flags):
        return [bool(flag) for flag in flags]  # nothing to wait for
    by_device: dict[torch.device, dict[int, Tensor]] = {}
    for place, flag in enumerate(flags):
        if isinstance(flag, Tensor):
            by_device.setdefault(flag.device, {})[place] = flag.reshape(()) if flag.dim() else flag
    answers = dict(enumerate(flags))
    for there in by_device.values():
        answers |= dict(zip(there, torch.stack(list(there.values())).tolist(), strict=True))
    return [bool(answers[place]) for place in range(len(flags))]
