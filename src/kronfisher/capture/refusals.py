"""Messages and errors for parameters and outputs that cannot be treated, raised before any work."""

from collections.abc import Iterable, Mapping

from kronfisher.errors import UnsupportedError

__all__ = ["detached_outputs_error", "hidden_use_message", "refuse", "strict_error", "unclaimed_use_message"]


def hidden_use_message(name: str, functions: Iterable[str]) -> str:
    """The message for a parameter used inside autograd functions that did not receive it as an argument."""
    hint = (
        " Reentrant checkpointing hides its layers: call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        if "CheckpointFunction" in functions
        else " Pass the parameter to the function, or freeze it with requires_grad_(False)."
    )
    return f"{name}: used inside {', '.join(sorted(functions))}, where no graph shows its gradient.{hint}"


def unclaimed_use_message(name: str, operators: Iterable[str]) -> str:
    """The message for a parameter used by operators that are not understood."""
    return f"{name}: used by {', '.join(sorted(operators))}"


def strict_error(problems: Mapping[str, str], where: str) -> UnsupportedError:
    """The error for parameters that only the fallback could treat, if ``strict=True`` excludes it."""
    lines = "\n  ".join(problems.values())
    return UnsupportedError(
        f"{where}: strict=True, and these trainable parameters are used in ways that are not understood:\n  {lines}\n"
        "Without strict=True their diagonal is computed from per-example gradients; freeze them with "
        "requires_grad_(False) to leave them out of the Fisher matrix."
    )


def detached_outputs_error(where: str) -> UnsupportedError:
    """The error for outputs that depend on no trainable parameter."""
    return UnsupportedError(
        f"{where}: the outputs depend on no trainable parameter, or were detached from them (torch.no_grad, .detach()) "
        "inside the model."
    )


def refuse(problems: Mapping[str, str], where: str) -> None:
    """Raise an UnsupportedError that lists the problem of each parameter, if there is any."""
    if problems:
        raise UnsupportedError(f"{where}: " + "\n".join(problems.values()))
