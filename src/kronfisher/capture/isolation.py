"""Isolate a run of the model: random state, buffers, hooks and flags are the same afterwards as before."""

import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import RLock
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules import module as torch_module

__all__ = ["isolate", "replace_contents", "without_weight_cache"]


_ALONE = RLock()


@contextmanager
def isolate(model: nn.Module, seed: int) -> Iterator[None]:
    """Run the model without side effects: eagerly, with gradients enabled, from a random state given by the seed.

    One thread at a time: random state, hooks and buffers are changed for a while, and other threads that estimate, with
    this model or another, wait. The model works on copies of its buffers. Its backward hooks and global ones are
    disabled: they would be called with gradients that are not those of the user's loss, and might change them.
    """
    with ExitStack() as stack:
        stack.enter_context(_ALONE)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_random_state(model, seed))
        stack.enter_context(without_weight_cache())
        if "torch._dynamo" in sys.modules:  # otherwise nothing can be compiled, and importing it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(replace_contents(_backward_hooks(model), {}))
        stack.enter_context(_buffers_copied(model))
        yield


@contextmanager
def _buffers_copied(model: nn.Module) -> Iterator[None]:
    """Let the model work on copies of its buffers; one that several modules share has one copy."""
    saved = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    shared = {id(buffer): buffer for _, own in saved for buffer in own.values() if buffer is not None}
    copies = {key: buffer.detach().clone() for key, buffer in shared.items()}
    try:
        for buffers, own in saved:
            for name, buffer in own.items():
                if buffer is not None:
                    buffers[name] = copies[id(buffer)]
        yield
    finally:
        _put_back(saved)


@contextmanager
def _random_state(model: nn.Module, seed: int) -> Iterator[None]:
    """Seed the generators of Torch (on the model's devices), NumPy and Python, and restore them at the end."""
    tensors = (*model.parameters(), *model.buffers())
    devices = {tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")}
    python, arrays = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for device in devices:
            stack.enter_context(torch.random.fork_rng(devices=[device.index], device_type=device.type))
            state = torch.Generator(device).manual_seed(seed).get_state()
            torch.get_device_module(device).set_rng_state(state, device)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed other devices
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


@contextmanager
def without_weight_cache() -> Iterator[None]:
    """Disable autocast's cache of cast weights, which would make several uses of one weight share one copy."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


@contextmanager
def replace_contents(dictionaries: Iterable[dict[Any, Any]], contents: Mapping[Any, Any]) -> Iterator[None]:
    """Replace the contents of some dictionaries and restore the old contents at the end."""
    saved = [(dictionary, dict(dictionary)) for dictionary in dictionaries]
    try:
        for dictionary, _ in saved:
            if dictionary or contents:
                dictionary.clear()
                dictionary.update(contents)
        yield
    finally:
        _put_back(saved)


def _put_back(saved: Iterable[tuple[dict[Any, Any], dict[Any, Any]]]) -> None:
    """Give dictionaries the contents that they had."""
    for dictionary, old in saved:
        if dictionary or old:
            dictionary.clear()
            dictionary.update(old)


def _backward_hooks(model: nn.Module) -> Iterator[dict[Any, Any]]:
    yield torch_module._global_backward_hooks
    yield torch_module._global_backward_pre_hooks
    for module in model.modules():
        yield module._backward_hooks
        yield module._backward_pre_hooks
