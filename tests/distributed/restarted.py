"""A script that trains under torchrun, and is killed as often as it is told; torchrun starts it again.

    torchrun --max-restarts 2 restarted.py FOLDER HOW PLACE:STEP PLACE:STEP

At the n-th attempt, one rank kills all of them with SIGKILL when it comes to the n-th place: the last rank before a
step, in the backward pass, or after it was saved, or rank 0 while it saves, before the checkpoint is complete.
"""

import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import kronfisher as kf

EPOCHS, BATCHES = 3, 7  # which three ranks get two of, and two ranks three


class Killed(dcp.FileSystemWriter):
    """Writes a checkpoint, but ends all ranks before it is complete."""

    def finish(self, metadata, results):
        kill()


def kill():
    for pid in (*(pid for pid in pids if pid != os.getpid()), os.getpid()):
        os.kill(pid, signal.SIGKILL)


def loader_of(epoch):
    generator = torch.Generator().manual_seed(epoch)
    x = torch.randn(4 * BATCHES, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    data = torch.utils.data.TensorDataset(x, torch.arange(4 * BATCHES) % 3)
    return torch.utils.data.DataLoader(data, 4, shuffle=True, generator=generator)


folder, how, *kills = sys.argv[1:]
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
place, at = kills[attempt].split(":") if attempt < len(kills) else ("nowhere", "-1")
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
rank, size = dist.get_rank(), dist.get_world_size()
pids = [None] * size
dist.all_gather_object(pids, os.getpid())

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
wrapped = model
if how == "ddp":
    # With unused parameters DDP keeps its buckets; else it puts gradients together in others after the first step, and
    # sums of three or more have other last bits there.
    wrapped = DistributedDataParallel(model, find_unused_parameters=size > 2)
else:
    fully_shard(model[2])
    fully_shard(model)
optimizer = kf.NaturalGradient(wrapped, kf.Categorical(), weight_decay=0.01, group=dist.group.WORLD)

complete = [sorted(int(name) for name in os.listdir(folder) if os.path.exists(f"{folder}/{name}/.metadata"))]
dist.broadcast_object_list(complete)
if complete[0]:
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=f"{folder}/{complete[0][-1]}")
    model.load_state_dict(state["model"])
    kf.load_named_state(optimizer, f"{folder}/{complete[0][-1]}")
    print(f"attempt {attempt} of rank {rank} goes on from step {optimizer.steps}", flush=True)

step = 0
for epoch in range(EPOCHS):
    for x, y in kf.shard(loader_of(epoch), equal=True):  # of which some are skipped
        step += 1
        if step <= optimizer.steps:
            continue
        here = step == int(at)
        if here and rank == size - 1:
            if place == "before":
                kill()
            if place == "backward":
                model[1].register_forward_hook(
                    lambda module, args, output: output.register_hook(lambda g: kill()) and None
                )
        optimizer.step(lambda x=x: wrapped(x), y)
        writer = (Killed if here and place == "saving" else dcp.FileSystemWriter)(f"{folder}/{step}")
        state = {"model": model.state_dict(), "optimizer": kf.named_state(optimizer)}
        dcp.save(state, storage_writer=writer)
        if here and place == "saved" and rank == size - 1:
            kill()

whole = {name: getattr(value, "full_tensor", value.clone)() for name, value in model.state_dict().items()}
torch.save(whole, f"{folder}/weights of {rank}")
dist.barrier()
os._exit(0)  # threads of gloo that wait for an interpreter that ends abort the process
