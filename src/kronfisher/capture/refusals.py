"""What cannot be treated, found before any work and said by name."""

from collections.abc import Iterable, Mapping

from kronfisher.errors import UnsupportedError

__all__ = ["detached", "hidden", "refuse", "unclaimed", "unknown"]


def hidden(name: str, functions: Iterable[str]) -> str:
    """What to say of a parameter used inside autograd functions that it was not given to."""
    hint = (
        " Reentrant checkpointing hides its layers: call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        if "CheckpointFunction" in functions
        else " Pass the parameter to the function, or freeze it with requires_grad_(False)."
    )
    return f"{name}: used by {', '.join(sorted(functions))} inside, where no graph shows its gradient.{hint}"


def unclaimed(name: str, operators: Iterable[str]) -> str:
    """What to say of a parameter used by operators that are not understood."""
    return f"{name}: used by {', '.join(sorted(operators))}"


def unknown(problems: Mapping[str, str], where: str) -> UnsupportedError:
    """The error for parameters that only the fallback could treat, where it is not wanted."""
    lines = "\n  ".join(problems.values())
    return UnsupportedError(
        f"{where}: strict=True, and these trainable parameters are used in ways that are not understood:\n  {lines}\n"
        "Without strict=True their diagonal is taken from the gradients of single data; freeze them with "
        "requires_grad_(False) to leave them out of the Fisher matrix."
    )


def detached(where: str) -> UnsupportedError:
    """The error for outputs that no trainable parameter has a part in."""
    return UnsupportedError(
        f"{where}: the outputs depend on no trainable parameter, or were detached from them (torch.no_grad, .detach()) "
        "inside the model."
    )


def refuse(problems: Mapping[str, str], where: str) -> None:
    """Raise an UnsupportedError that lists what is wrong with which parameter, if anything is."""
    if problems:
        raise UnsupportedError(f"{where}: " + "\n".join(problems.values()))
