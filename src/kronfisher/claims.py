"""What cannot be treated, found before any work and said by name."""

from collections.abc import Iterable, Mapping

from kronfisher.blocks import Block, View
from kronfisher.errors import UnsupportedError

__all__ = ["detached", "hidden", "misused", "refuse", "unclaimed"]


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


def detached(where: str) -> UnsupportedError:
    """The error for outputs that no trainable parameter has a part in."""
    return UnsupportedError(
        f"{where}: the outputs depend on no trainable parameter, or were detached from them (torch.no_grad, .detach()) "
        "inside the model."
    )


def misused(blocks: Iterable[Block]) -> dict[str, str]:
    """Name → reason of parameters that several blocks share or that blocks show only in part."""
    windows: dict[str, list[tuple[View, Block]]] = {}
    for block in blocks:
        for view in block.views:
            windows.setdefault(view.parameter, []).append((view, block))
    problems = {}
    for name, several in windows.items():
        if len(several) == 1 and several[0][0].whole:
            continue
        counts = several[0][0].counter()
        for view, _ in several:
            view.mark(counts)
        operators = ", ".join(sorted({block.operator for _, block in several}))
        if bool((counts > 1).any()):
            problems[name] = (
                f"{name} is used in {len(several)} different ways (by {operators}), for example as a matrix and as its "
                "transpose, with and without a bias, or with different biases; that is not supported yet. Freeze it "
                "with requires_grad_(False)."
            )
        elif bool((counts == 0).any()):
            problems[name] = (
                f"{name}: only {int((counts > 0).sum())} of its {counts.numel()} elements are used (by {operators}); "
                "that is not supported yet. Freeze it, or split it into parameters of their own."
            )
    return problems


def refuse(problems: Mapping[str, str], where: str) -> None:
    """Raise an UnsupportedError that lists what is wrong with which parameter, if anything is."""
    if problems:
        raise UnsupportedError(f"{where}: " + "\n".join(problems.values()))
