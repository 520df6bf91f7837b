"""A process group for the simulated device alone, as NCCL is for GPUs: gloo sends copies of its tensors."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _create_work_from_future
from torch.futures import Future


class Relay(dist.ProcessGroup):
    """Refuses tensors that lie elsewhere. Takes what `torch.distributed.Backend.register_backend` gives."""

    def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("simulated")]

    def _run(self, tensors: Sequence[torch.Tensor], call: Callable[[list[torch.Tensor]], Any]) -> Any:
        elsewhere = {str(tensor.device) for tensor in tensors if tensor.device.type != "simulated"}
        if elsewhere:
            raise TypeError(f"tensors on {elsewhere} in collectives of the simulated device")
        copies = [tensor.cpu() for tensor in tensors]
        call(copies).wait()
        for tensor, copy in zip(tensors, copies, strict=True):
            tensor.copy_(copy)
        done: Future[Any] = Future()
        done.set_result(list(tensors))
        return _create_work_from_future(done)

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        return self._run(tensors, lambda copies: self._gloo.allreduce(copies, opts))

    def reduce(self, tensors: Any, opts: Any = None) -> Any:
        return self._run(tensors, lambda copies: self._gloo.reduce(copies, opts))

    def broadcast(self, tensors: Any, opts: Any = None) -> Any:
        return self._run(tensors, lambda copies: self._gloo.broadcast(copies, opts))

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        every = [*outputs[0], *inputs]
        return self._run(every, lambda copies: self._gloo.allgather([copies[:-1]], copies[-1:]))

    def send(self, tensors: Any, rank: int, tag: int) -> Any:
        return self._run(tensors, lambda copies: self._gloo.send(copies, rank, tag))

    def recv(self, tensors: Any, rank: int, tag: int) -> Any:
        return self._run(tensors, lambda copies: self._gloo.recv(copies, rank, tag))
