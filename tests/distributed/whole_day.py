"""A script of a user's under torchrun: trains, estimates by several fits, measures, and saves; DDP or fully_shard."""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import kronfisher as kf

how, fit = sys.argv[1:]
dist.init_process_group("gloo")
group, rank = dist.group.WORLD, dist.get_rank()
torch.manual_seed(0)
x = torch.randn(330, 8)
data = torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))
loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True)  # eleven batches, the last of ten examples

model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
wrapped = model
if how == "ddp":
    wrapped = DistributedDataParallel(model)
else:
    fully_shard(model[3])
    fully_shard(model)
optimizer = kf.NaturalGradient(wrapped, kf.Categorical(), fit=fit, group=group)
losses = []
for _ in range(6):
    model.train()
    for inputs, labels in kf.shard(loader):
        losses.append(float(optimizer.step(lambda inputs=inputs: wrapped(inputs), labels)))
    optimizer.eval()
    model.eval()
    with torch.no_grad():
        right = torch.tensor([0, 0])
        for inputs, labels in kf.shard(loader, equal=how != "ddp"):  # there ranks meet in every forward pass
            right += torch.tensor([int((model(inputs).argmax(1) == labels).sum()), len(labels)])
    dist.all_reduce(right)
    optimizer.train()
optimizer.eval()
fisher = kf.estimate(model, kf.shard(loader), kf.Categorical(), fit=fit, labels="exact", group=group)
error = fisher.error(kf.shard(loader)).relative
weights = torch.cat([getattr(p.detach(), "full_tensor", p.detach)().flatten() for p in model.parameters()])
own = torch.cat([weights.double(), torch.tensor([error, float(fisher.trace())], dtype=torch.float64)])
everywhere = [None] * dist.get_world_size()
dist.all_gather_object(everywhere, own)
same = all(torch.equal(other, own) for other in everywhere)
if rank == 0:
    print(
        f"evaluated {int(right[1])}, right {int(right[0])}, counted {fisher.count:.0f}, error {error:.3f}", flush=True
    )
    print(f"losses fell: {losses[-1] < losses[0]}, same: {same}", flush=True)
dist.barrier()
os._exit(0)  # threads of gloo that wait for an interpreter that ends abort the process
