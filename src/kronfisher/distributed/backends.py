"""What is asked of torch.distributed about its backends, those among them that others registered."""

import re

import torch
import torch.distributed as dist

__all__ = ["device_of", "is_of_collectives"]


def device_of(group: "dist.ProcessGroup") -> torch.device:
    """Where tensors lie while a group sends them: on the accelerator that it was made for, or the CPU.

    A backend that serves the CPU as well, as gloo does, takes what lies elsewhere through the host's memory: what is
    sent might as well lie there, where every backend has all collectives.

    Args:
        group: with any backend, or with one for each kind of device.
    """
    backends = dict(pair.split(":", 1) for pair in dist.get_backend_config(group).split(","))
    kinds = [kind for kind, backend in backends.items() if kind != "cpu" and backend != backends.get("cpu")]
    if not kinds:
        return torch.device("cpu")
    bound = getattr(group, "bound_device_id", None)  # by init_process_group(device_id=...)
    if bound is not None and bound.type in kinds:
        return bound
    return torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())


def is_of_collectives(error: RuntimeError) -> bool:
    """Whether an error is one of collectives, by its type or by the name of a backend in it; torch has no one type."""
    names = "|".join(re.escape(name) for name in dist.Backend.backend_list if name not in ("undefined", "fake"))
    text = str(error).lower()
    return isinstance(error, dist.DistError) or bool(
        re.search(rf"connection|store|gloo|nccl|\b(processgroup)?({names})", text)
    )
