"""A training's view of parameters that `fully_shard` spread over ranks: whole ones, by name."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kronfisher.distributed.ranks import Ranks
from kronfisher.distributed.whole import shards, whole
from kronfisher.errors import UnsupportedError

__all__ = ["Spread"]


class Spread:
    """The whole parameters that stand in a model while `fully_shard` runs it; between passes they hold no numbers.

    `fully_shard` runs the passes of the user, and reduces gradients. Passes for statistics run while all parts are
    put together, so that they need no collective: a rank may leave them out.

    Args:
        model: unwrapped, with such parts.
        ranks: that train together; None: one.

    Attributes:
        parameters: name → whole parameter, frozen ones among them; the same objects at every pass.

    Raises:
        UnsupportedError: these parts compute in another precision or on another device, or do not hold all parameters,
            or are spread over other ranks than those that train.
    """

    def __init__(self, model: nn.Module, ranks: Ranks | None) -> None:
        self._model, self._parts = model, shards(model)
        self._sharded: dict[str, Any] = dict(model.named_parameters())
        with whole(model):
            self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        members = [0] if ranks is None else ranks.members
        for name, sharded in self._sharded.items():
            mesh = getattr(sharded, "device_mesh", None)
            if mesh is None:
                raise UnsupportedError(
                    f"{name} is outside the parts that fully_shard treats, so that nothing averages its gradient over "
                    "ranks: call fully_shard(model) for the whole model, too, after its parts."
                )
            holders = sorted(mesh.mesh.flatten().tolist())
            if len(holders) != len(members) or (len(holders) > 1 and holders != sorted(members)):
                raise UnsupportedError(
                    f"{name} is spread over ranks {holders} by fully_shard, and group= has {len(members)} of them: the "
                    "ranks whose gradients it averages train together. Give the group of all of them, as in "
                    "group=torch.distributed.group.WORLD."
                )
            if sharded.device != self.parameters[name].device:
                raise UnsupportedError(
                    f"{name} is kept on {sharded.device} and used on {self.parameters[name].device}: train without an "
                    "OffloadPolicy."
                )

    @staticmethod
    def of(model: nn.Module, ranks: Ranks | None) -> "Spread | None":
        """That of a model; None if it has no such parts."""
        return Spread(model, ranks) if shards(model) else None

    def follow(self) -> None:
        """Freeze what the user froze."""
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(self._sharded[name].requires_grad)

    def names(self) -> dict[int, str]:
        """Id of a parameter as the user sees it → name."""
        return {id(parameter): name for name, parameter in self._sharded.items()}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let parts stay together, for backward passes; a collective before it."""
        groups = [group for part in self._parts for group in _groups(part)]
        before = [group.reshard_after_backward for group in groups]
        try:
            self._gather()
            for part in self._parts:
                part.set_reshard_after_backward(False)
            yield
        finally:
            for group, again in zip(groups, before, strict=True):
                group.reshard_after_backward = again
            for part in self._parts:
                part.reshard()

    @contextmanager
    def changed(self, *, gradients: bool = False) -> Iterator[None]:
        """Give whole parameters their numbers and gradients, and what they are afterwards to the parts of this rank.

        Args:
            gradients: take the gradients over, not the weights.
        """
        waiting = {name: parameter.grad for name, parameter in self.parameters.items()}
        try:
            self._gather()
            for name, parameter in self.parameters.items():
                own = self._sharded[name].grad
                parameter.grad = None if own is None else _whole(own)
            yield
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    sharded = self._sharded[name]
                    if not gradients:
                        _scatter(parameter.detach(), sharded)
                    elif parameter.grad is not None:
                        _scatter(parameter.grad, sharded.grad)
        finally:
            for name, parameter in self.parameters.items():
                parameter.grad = waiting[name]
            for part in self._parts:
                part.reshard()

    def _gather(self) -> None:
        for part in self._parts:
            part.unshard()
        now = dict(self._model.named_parameters())
        for name, parameter in self.parameters.items():
            if now[name] is not parameter:
                raise UnsupportedError(
                    f"{name} is another parameter than it was when the training began: make a new optimiser after "
                    "parameters were replaced."
                )


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor().clone()


def _scatter(value: Tensor, sharded: Any) -> None:
    """Write this rank's part of a whole tensor."""
    tensors: Any = sys.modules["torch.distributed.tensor"]
    mesh = sharded.device_mesh
    everywhere = tensors.DTensor.from_local(value, mesh, [tensors.Replicate()] * mesh.ndim, run_check=False)
    sharded.to_local().copy_(everywhere.redistribute(mesh, sharded.placements).to_local())


def _groups(part: Any) -> Sequence[Any]:
    """What `fully_shard` gathers at once; torch keeps no public way to ask how it is set."""
    state = part._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)
    return several if several is not None else [g for g in [state._fsdp_param_group] if g is not None]
