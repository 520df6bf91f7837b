"""Errors by kind: every message says what is wrong, where, and what to do."""


class UnsupportedError(NotImplementedError):
    """The model does something this library does not treat; the message names the parameter and the operator."""


class DataError(ValueError):
    """A batch, a target or a loader does not fit what was asked; the message names the batch."""


class NumericalError(ArithmeticError):
    """A number is not finite, or a factorisation failed; the message names the block."""


class SingularError(NumericalError):
    """A matrix that has to be inverted has (numerically) zero eigenvalues; the message says how much damping helps."""


class IndefiniteError(SingularError):
    """A matrix that has to be positive definite has negative eigenvalues; it is never modified implicitly."""


class MemoryBudgetError(MemoryError):
    """The work does not fit the memory given; the message says how many bytes it takes."""


class NumericalWarning(UserWarning):
    """A result is usable but less precise than asked for: a fallback or a floor acted."""
