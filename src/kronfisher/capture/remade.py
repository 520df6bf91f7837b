"""Inputs of layers that a cheap operator makes of what the graph saves anyway: made again, rather than kept.

An activation such as GELU, or a normalisation, saves what it is given for its own derivative, and the layer after it
saves the result. In an estimate these results are much of what stands between the forward and the backward pass. They
are not saved then: fits are given them made again, and no pass of ours asks for a gradient of a weight, which is what
the graph would need them for. Any other pass through the graph has them made again, too.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from kronfisher.errors import UnsupportedError
from kronfisher.layers import Use

__all__ = ["Remade", "RemadeInputs"]

# They save what they are given, so that torch itself refuses a backward pass where that is modified in place later.
_OPERATORS = {F.gelu, F.silu, F.mish, F.hardswish, F.softplus, F.layer_norm, F.rms_norm, F.group_norm}
_LARGE = 2**18  # numbers that are worth being made twice
_UNKNOWN: tuple[Callable[[], None], int, Any] = (lambda: None, -1, None)


class Remade:
    """The result of an operator, to be made again.

    Args:
        function: the operator.
        args: its arguments, whose tensors are those that the graph saves.
        kwargs: its keyword arguments.

    Example:
        >>> gelu = torch.nn.functional.gelu
        >>> torch.equal(Remade(gelu, (torch.ones(2),), {})(), gelu(torch.ones(2)))
        True
    """

    def __init__(self, function: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self._function, self._args = function, [_detached(value) for value in args]
        self._kwargs = {name: _detached(value) for name, value in kwargs.items()}
        self._versions = self._versions_now()

    def __call__(self) -> Tensor:
        """The result.

        Raises:
            UnsupportedError: what it was made of has been modified in place since.
        """
        if self._versions_now() != self._versions:
            raise UnsupportedError(
                f"What {self._function.__name__} was given before a layer was modified in place afterwards, so that "
                "its values are gone. Replace that in-place operation by one that returns a new tensor."
            )
        with torch.no_grad(), torch._C.DisableTorchFunction():
            return self._function(*self._args, **self._kwargs)

    def _versions_now(self) -> list[int]:
        return [v._version for v in (*self._args, *self._kwargs.values()) if isinstance(v, Tensor)]


class RemadeInputs:
    """Results of operators in one forward pass that can be made again, as long as they are alive.

    Attributes:
        needed: whether the graph has to have them made again: not in passes that ask for no gradient of a weight.
    """

    def __init__(self) -> None:
        self._made: dict[int, tuple[Callable[[], Tensor | None], int, Remade]] = {}
        self.needed = True

    def note(self, function: Callable, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        """Remember how a result was made, if it is worth it."""
        if function not in _OPERATORS or type(result) is not Tensor or result.numel() < _LARGE:
            return
        source = args[0] if args else None
        if not isinstance(source, Tensor) or not source.requires_grad or result.grad_fn is None:
            return  # or the graph does not save it
        if result.data_ptr() == source.data_ptr() or not result.is_contiguous() or not _usual(result):
            return
        key, made = id(result), self._made
        made[key] = ref(result, lambda _: made.pop(key, None)), result._version, Remade(function, args, kwargs)

    def of(self, uses: Sequence[Use], tensors: Sequence[Tensor]) -> tuple[Tensor, Remade] | None:
        """The operand that is the input of all uses, with how to make its numbers, if that is known."""
        for tensor in tensors if self._made else ():
            whole = tensor if tensor._base is None else tensor._base
            made, version, remade = self._made.get(id(whole), _UNKNOWN)
            if made() is not whole or version != tensor._version or not tensor.is_contiguous():
                continue
            place = _place(whole)
            alike = (use.remakes and use.inputs is not None and _place(use.inputs) == place for use in uses)
            if _place(tensor) == place and all(alike):
                return tensor, remade
        return None

    @contextmanager
    def unsaved(self, tensor: Tensor, remade: Remade) -> Iterator[None]:
        """Let the graph of the operators called within have a tensor made again, in place of saving it."""
        place, like = _place(tensor), tensor.detach().new_empty(0)

        def pack(saved: Tensor) -> Any:
            return (saved.size(), saved.stride()) if _place(saved) == place else saved

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            return remade().as_strided(*packed) if self.needed else like.new_zeros(()).expand(packed[0])

        with saved_tensors_hooks(pack, unpack):
            yield


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _place(tensor: Tensor) -> tuple[int, int, torch.dtype, torch.device]:
    """Of all of a tensor's numbers, in whatever shape."""
    return tensor.data_ptr(), tensor.numel(), tensor.dtype, tensor.device


def _usual(tensor: Tensor) -> bool:
    """Whether nothing else decides what is saved, such as a checkpoint, or in which precision operators run."""
    private: Any = getattr(torch._C, "_autograd", None)  # without a form that is known, nothing is made again
    top = getattr(private, "_top_saved_tensors_default_hooks", None)
    enabled = getattr(private, "_saved_tensors_hooks_is_enabled", None)
    if top is None or enabled is None or not enabled() or top(True) is not None:
        return False
    return not torch.is_autocast_enabled(tensor.device.type)
