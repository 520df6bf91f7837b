"""What is sent lies on the device that a group's backend serves, whatever the backend is called."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

import kronfisher as kf
from kronfisher.distributed.backends import device_of, is_of_collectives
from kronfisher.distributed.ranks import ranks_of
from tests.distributed.cases import described, same_bits
from tests.helpers.close import close
from tests.helpers.device.process import device_process
from tests.helpers.device.relay import Relay
from tests.helpers.device.trainings import problem

DEVICES = {
    "gloo": "cpu",
    "cpu:gloo": "cpu",
    "hostlink": "cpu",
    "bothlink": "cpu",
    "gpulink": "cuda:3",
    "otherlink": "xpu:1",
    "cpu:gloo,xpu:otherlink": "xpu:1",
    "xpu:otherlink,cpu:gloo": "xpu:1",
}


def devices(rank):
    """By backends: where a group of them sends from; and of one that is bound to a device."""

    def make(store, rank, size, timeout):
        return dist.ProcessGroupGloo(store, rank, size, timeout)

    for name, kinds in {"host": ["cpu"], "both": ["cpu", "xpu"], "gpu": ["cuda"], "other": ["xpu"]}.items():
        dist.Backend.register_backend(f"{name}link", make, devices=kinds)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: 3)
        patch.setattr(torch.xpu, "current_device", lambda: 1)
        found = {backend: str(device_of(dist.new_group(backend=backend))) for backend in DEVICES}
    bound = dist.new_group(backend="gpulink")
    bound.bound_device_id = torch.device("cuda", 2)
    return found, str(device_of(bound)), str(ranks_of(dist.group.WORLD).device)


@pytest.mark.usual_ranks(2)
def test_the_device_is_that_of_the_backend(ranks):
    for found, bound, own in ranks.call(devices):
        assert (found, bound, own) == (DEVICES, "cuda:2", "cpu")


def relayed(device, rank, path):
    """Matrices and weights of two ranks whose group takes tensors of the simulated device alone."""
    dist.Backend.register_backend("relay", Relay, devices=["simulated"])
    dist.init_process_group("relay", store=dist.FileStore(path, 2), rank=rank, world_size=2)
    group = dist.group.WORLD
    ranks = ranks_of(group)
    assert ranks is not None and ranks.device == device
    model, likelihood, batches = problem("normalised").on(device)
    matrices = [matrix(model, likelihood, batches, fit, share, group) for fit, share in CASES]
    optimizer = kf.NaturalGradient(model.train(), likelihood, labels="observed", group=group)
    for x, y in kf.shard(batches, group):
        optimizer.zero_grad()
        optimizer.backward(optimizer.forward(x), y)
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= 2
        optimizer.step()
    dist.destroy_process_group()
    return matrices, {name: tensor.cpu() for name, tensor in model.state_dict().items()}


CASES = [("ekfac", "all"), ("kfac", "owned"), ("kfoc", "all")]


def matrix(model, likelihood, batches, fit, share="all", group=None):
    data = batches if group is None else kf.shard(batches, group)
    options = {} if group is None else {"group": group, "share": share}
    blocks, facts = described(kf.estimate(model.eval(), data, likelihood, fit=fit, labels="exact", **options))
    return {name: block.cpu() for name, block in blocks.items()}, facts


@pytest.mark.slow
def test_everything_that_is_sent_lies_on_the_device_of_a_backend_for_it_alone(tmp_path):
    path = str(tmp_path / "store")
    with device_process() as first, device_process() as second, ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(call, relayed, rank, path) for rank, call in enumerate((first, second))]
        (matrices, weights), (others, other_weights) = (call.result(timeout=180) for call in calls)
    assert same_bits([weights, other_weights]) and all(value.isfinite().all() for value in weights.values())
    model, likelihood, batches = problem("normalised").on(torch.device("cpu"))
    assert not torch.equal(weights["0.weight"], model.state_dict()["0.weight"])
    for (fit, _), (blocks, facts), (other, _) in zip(CASES, matrices, others, strict=True):
        truth, true_facts = matrix(model, likelihood, batches, fit)
        assert same_bits([blocks, other]) and facts[0] == true_facts[0] and blocks.keys() == truth.keys()
        for name, block in blocks.items():
            close(block, truth[name], 1e-9, f"{fit} {name}")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer", True),
        ("NCCL communicator was aborted", True),
        ("ProcessGroupXCCL timed out", True),
        ("xccl: the device was lost", True),
        ("the compiled function had no success", False),
        ("an undefined tensor", False),
    ],
)
def test_errors_of_collectives_are_known_by_the_names_of_backends(text, answer):
    assert is_of_collectives(RuntimeError(text)) == answer
