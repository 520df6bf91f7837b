"""Nothing of the user's is different after an estimate, whether it succeeds or fails, and however it fails."""

import random
import warnings
from collections import OrderedDict
from threading import Thread

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module

import kronfisher as kf
from kronfisher.capture.containers import tensors_in
from kronfisher.capture.isolation import isolate
from kronfisher.fisher.parameters import trainable, unwrapped
from tests.helpers.networks import Written
from tests.helpers.optional import require


class Rich(nn.Module):
    """A bit of everything that could be left changed."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.drop, self.last = nn.Dropout(0.3), nn.Linear(4, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("lazy", None)
        self.fail = None

    def forward(self, x):
        self.calls += 1
        self.lazy = self.calls * 2
        if "late" not in self._buffers:
            self.register_buffer("late", torch.ones(2))
        self.norm.running_mean = self.norm.running_mean * 0.9
        hidden = self.drop(self.norm(self.first(x)).relu_())
        if self.fail:
            raise self.fail
        return self.frozen(self.last(hidden))


def rich(mode="eval"):
    torch.manual_seed(3)
    model = Rich()
    model.norm.train(mode == "train")
    (model(torch.randn(6, 3)).square().sum()).backward()  # some .grad
    model.last.bias.grad = None
    del model._buffers["late"]
    model.lazy = None
    model.calls.zero_()
    return model


def snapshot(model):
    """Values, identities and versions of everything that is the user's."""
    state = {"generator": torch.get_rng_state().tolist(), "python": random.getstate()}
    state["numpy"] = [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()]
    for name, p in model.named_parameters():
        state[name] = (id(p), p._version, p.tolist(), p.requires_grad, p.device, p.dtype, id(p.grad))
        state[f"{name}.grad"] = None if p.grad is None else (p.grad._version, p.grad.tolist())
        state[f"{name}.hooks"] = [dict(hooks) if hooks else None for hooks in (p._backward_hooks,)]
    for name, module in model.named_modules():
        state[f"{name}.mode"] = module.training
        state[f"{name}.buffers"] = {
            key: b if b is None else (id(b), b._version, b.tolist(), b.requires_grad)
            for key, b in module._buffers.items()
        }
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            state[f"{name}.{kind}"] = (id(getattr(module, kind)), list(getattr(module, kind).items()))
        state[f"{name}.names"] = sorted(vars(module))
    state["global hooks"] = list(torch_module._global_backward_hooks.items())
    state["flags"] = [
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"),
        torch.is_autocast_cache_enabled(), torch.get_float32_matmul_precision(), torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(), torch.is_anomaly_enabled(),
    ]  # fmt: skip
    return state


def batches(n=3):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 3, generator=generator), None) for _ in range(n)]


@pytest.mark.parametrize("fit", ["kfac", "ekfac", "diagonal"])
@pytest.mark.parametrize("labels", ["exact", "sampled"])
def test_nothing_changes_when_it_succeeds(fit, labels):
    model = rich()
    before = snapshot(model)
    kf.estimate(model, batches(), kf.Gaussian(), fit=fit, labels=labels, samples=2).error(batches())
    kf.coverage(model, batches())
    assert snapshot(model) == before
    assert model.calls == 0 and model.lazy is None


class Trouble(Exception):
    pass


def in_loader(error):
    yield from batches(1)
    raise error


@pytest.mark.parametrize("error", [Trouble, KeyboardInterrupt, RuntimeError, SystemExit])
@pytest.mark.parametrize("place", ["model", "loader", "tensor hook", "likelihood", "fit"])
def test_nothing_changes_when_it_fails(error, place, monkeypatch):
    model, data, likelihood = rich(), batches(), kf.Gaussian()

    def fails(*args, **options):
        raise error("stop")

    if place == "model":
        model.fail = error("stop")
    elif place == "loader":
        data = in_loader(error("stop"))
    elif place == "tensor hook":
        model.norm.register_forward_hook(lambda module, inputs, output: output.register_hook(fails) and None)
    elif place == "likelihood":
        monkeypatch.setattr(kf.Gaussian, "sampled", fails)
    else:
        monkeypatch.setattr(kf.KFAC, "update", fails)
    before = snapshot(model)
    with pytest.raises(error, match="stop") as caught:
        kf.estimate(model, data, likelihood, fit="kfac")
    assert snapshot(model) == before
    notes = " ".join(getattr(caught.value, "__notes__", []))
    assert ("no estimate was made" in notes) == (not issubclass(error, Exception))
    if place == "loader":
        assert ("while the loader was read" in notes) == issubclass(error, Exception)


def test_batch_norm_in_train_mode_is_refused_and_has_counted_nothing():
    model = rich("train")
    before = snapshot(model)
    with pytest.raises(kf.UnsupportedError, match=r"(?s)BatchNorm of norm\.weight.*train mode.*eval\(\)"):
        kf.estimate(model, batches(), kf.Gaussian())
    assert snapshot(model) == before
    with pytest.raises(kf.UnsupportedError, match="train mode"):
        kf.coverage(model, batches())
    assert snapshot(model) == before and model.norm.num_batches_tracked == 1


def test_batch_norm_without_parameters_of_its_own_still_couples_the_data():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, affine=False))
    with pytest.raises(kf.UnsupportedError, match="train mode"):
        kf.estimate(model, torch.randn(4, 3), kf.Gaussian())


def test_hooks_of_the_user_see_no_gradient_of_ours(read_again):
    model, seen = rich(), []
    model.first.register_full_backward_hook(lambda *a: seen.append("backward"))
    model.last.register_full_backward_pre_hook(lambda *a: seen.append("pre"))
    for p in model.parameters():
        if p.requires_grad:
            p.register_hook(lambda g: seen.append("parameter"))
            p.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    forward = []
    model.first.register_forward_hook(lambda *a: forward.append(1))
    handle = torch_module.register_module_full_backward_hook(lambda *a: seen.append("global"))
    try:
        before = snapshot(model)
        kf.estimate(model, batches(), kf.Gaussian(), fit="ekfac", labels="exact")
        assert snapshot(model) == before
    finally:
        handle.remove()
    assert seen == []
    assert len(forward) == 6  # forward hooks are part of the model
    model(torch.randn(6, 3, requires_grad=True)).sum().backward()
    assert {"backward", "pre", "parameter", "accumulated"} <= set(seen)  # and they live


def test_a_backward_hook_that_changes_gradients_changes_no_estimate():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)
    plain = kf.estimate(model, x, kf.Gaussian(), labels="exact").to_dense()
    model[2].register_full_backward_hook(lambda module, before, after: tuple(g * 0.1 for g in before))
    assert torch.equal(kf.estimate(model, x, kf.Gaussian(), labels="exact").to_dense(), plain)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("fit", ["kfac", "ekfac", "full"])
def test_callers_without_gradients(mode, fit):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2))
    x = torch.randn(6, 3)
    expected = kf.estimate(model, [(x, None)], kf.Gaussian(), fit=fit, labels="observed" if fit == "no" else "exact")
    with mode():
        batch = (x.clone(), torch.randn(6, 2))  # under inference_mode no graph may hold these
        fisher = kf.estimate(model, [batch], kf.Gaussian(), fit=fit, labels="exact")
        nested = kf.estimate(model, [{"input": x.clone()}], kf.Gaussian(), fit=fit, labels="exact")
        error = fisher.error([batch])
    assert torch.equal(fisher.to_dense(), expected.to_dense()) and torch.equal(nested.to_dense(), expected.to_dense())
    assert not any(t.is_inference() for _, operator in fisher.entries for t in operator.tensors().values())
    assert error.relative == expected.error([(x, None)]).relative


def test_buffers_meet_the_model_once_where_they_are_shared():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.other = nn.Linear(3, 2), nn.Identity()
            self.register_buffer("count", torch.zeros(()))
            self.other.register_buffer("count", self.count)

        def forward(self, x):
            self.count += 1
            assert self.other.count is self.count
            return self.layer(x) * self.other.count

    model = Shared()
    fisher = kf.estimate(model, torch.randn(4, 3), kf.Gaussian())
    assert model.count == 0 and model.other.count is model.count and fisher.trace() > 0


def test_a_pending_graph_of_the_user_survives():
    """A buffer that the user's own graph has saved must not be written to, not even with its old values."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4).eval(), nn.Linear(4, 2))
    model[1].register_forward_pre_hook(lambda module, inputs: module.running_mean.add_(0) is None or None)
    x = torch.randn(5, 3)
    loss = (model[0](x) * model[1].running_mean).sum()
    before = model[1].running_mean._version
    kf.estimate(model, x, kf.Gaussian())
    loss.backward()
    assert model[1].running_mean._version == before


def test_random_numbers_are_the_same_in_every_pass_and_none_of_the_users():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.seen = nn.Linear(3, 2), []

        def forward(self, x):
            self.seen.append((torch.rand(()).item(), random.random(), np.random.rand()))
            return self.layer(x) * (1 + self.seen[-1][0] + self.seen[-1][1])

    model = Noisy()
    state = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    kf.estimate(model, batches(), kf.Gaussian(), fit="ekfac", seed=4)
    assert model.seen[:3] == model.seen[3:] and len(set(model.seen)) == 3
    kf.estimate(model, batches(), kf.Gaussian(), seed=-4)
    assert model.seen[6:] != model.seen[:3]
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
    assert (np.random.get_state()[1] == state[2]).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_random_state_of_the_device(device):
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).to(device)
    torch.rand(3, device="cuda")
    before = torch.cuda.get_rng_state()
    x = torch.randn(6, 3).to(device)
    first = kf.estimate(model, x, kf.Gaussian(), fit="ekfac")
    assert torch.equal(torch.cuda.get_rng_state(), before)
    torch.rand(3, device="cuda")
    assert torch.equal(kf.estimate(model, x, kf.Gaussian(), fit="ekfac").to_dense(), first.to_dense())


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_matmul_flags_change_no_factor(precision):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)
    plain = kf.estimate(model, x, kf.Gaussian(), fit="ekfac").to_dense()
    torch.set_float32_matmul_precision(precision)
    try:
        assert torch.equal(kf.estimate(model, x, kf.Gaussian(), fit="ekfac").to_dense(), plain)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("fit", ["kfac", "ekfac", "full", "diagonal"])
def test_autocast_leaves_factors_in_float32(fit):
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 2))
    x = torch.randn(40, 3)
    plain = kf.estimate(model, x, kf.Gaussian(), fit=fit, labels="exact").to_dense()
    with torch.autocast("cpu", torch.bfloat16):
        fisher = kf.estimate(model, x, kf.Gaussian(), fit=fit, labels="exact")
        assert torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled()
        assert fisher.error(x).relative < (0.03 if fit == "full" else 1)
    inside = kf.estimate(model, x, kf.Gaussian(), fit=fit, labels="exact", forward=cast_forward)
    for found in (fisher, inside):
        assert found.dtype == torch.float32
        assert (found.to_dense() - plain).norm() < 0.03 * plain.norm()


def cast_forward(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        return model(batch), None


def test_autocast_and_a_weight_with_an_unsupported_use():
    """Autocast's cache would make both uses share one copy of the weight, and hide the second."""
    model = Written(
        lambda m, x: nn.functional.linear(x, m.w) + torch.linalg.multi_dot((x, m.w.t())), w=torch.randn(2, 3)
    )
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(kf.UnsupportedError, match=r"w: used by .*multi_dot"):
        kf.estimate(model, torch.randn(4, 3), kf.Gaussian(), strict=True)


@pytest.mark.parametrize("fit", ["kfac", "ekfac", "diagonal", "full", "kfac-reduce"])
def test_the_default_device_is_none_of_our_business(fit):
    """Nothing of ours may be made on it by accident; on the meta device that would show."""
    model = nn.Sequential(nn.Conv1d(3, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4), nn.LayerNorm(4))
    data = [(torch.randn(5, 3, 4), torch.randint(4, (5,)))]
    plain = kf.estimate(model, data, kf.Categorical(), fit=fit, samples=2)
    torch.set_default_device("meta")
    try:
        found = kf.estimate(model, data, kf.Categorical(), fit=fit, samples=2)
        error = found.error(data)
        assert kf.coverage(model, data, fit=fit).complete
    finally:
        torch.set_default_device(None)
    assert torch.equal(found.to_dense(), plain.to_dense()) and error.relative == plain.error(data).relative


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_nor_is_the_default_dtype(dtype):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4)), torch.randn(5, 3)
    plain = kf.estimate(model, x, kf.Gaussian(), fit="ekfac")
    torch.set_default_dtype(dtype)
    try:
        found = kf.estimate(model, x, kf.Gaussian(), fit="ekfac")
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found.to_dense(), plain.to_dense())


def test_compiled_models_are_captured_eagerly():
    require("torch._dynamo")
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)
    plain = kf.estimate(model, x, kf.Gaussian(), labels="exact")
    backends = []

    def backend(graph, inputs):
        backends.append(graph)
        return graph.forward

    whole = torch.compile(model, backend=backend)
    part = nn.Sequential(torch.compile(nn.Sequential(model[0], model[1]), backend=backend), model[2])
    found = kf.estimate(whole, x, kf.Gaussian(), labels="exact")
    assert list(found.shapes) == list(plain.shapes) and torch.equal(found.to_dense(), plain.to_dense())
    assert torch.equal(kf.estimate(part, x, kf.Gaussian(), labels="exact").to_dense(), plain.to_dense())
    model.compile(backend=backend)
    assert torch.equal(kf.estimate(model, x, kf.Gaussian(), labels="exact").to_dense(), plain.to_dense())
    assert backends == []
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # torch's own, about Python 3.13.0
        whole(x)
    assert backends  # and they compile afterwards


def test_wrappers_are_removed():
    model = nn.Linear(3, 2)
    assert unwrapped(nn.DataParallel(model)) is model
    assert unwrapped(nn.DataParallel(nn.DataParallel(model))) is model
    fisher = kf.estimate(nn.DataParallel(model), torch.randn(4, 3), kf.Gaussian())
    assert fisher.names == ("weight", "bias")


def test_distributed_wrapper(tmp_path):
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        wrapped, x = nn.parallel.DistributedDataParallel(model), torch.randn(5, 3)
        found = kf.estimate(wrapped, x, kf.Gaussian()).to_dense()
        wrapped(x).sum().backward()  # the reducer is not confused
        assert torch.equal(found, kf.estimate(model, x, kf.Gaussian()).to_dense())
    finally:
        distributed.destroy_process_group()


def test_scripted_modules_are_refused():
    with warnings.catch_warnings(action="ignore"):  # newer versions of torch deprecate it
        scripted = torch.jit.script(nn.Linear(3, 2))
    with pytest.raises(kf.UnsupportedError, match="the model is a scripted module"):
        kf.estimate(scripted, torch.randn(4, 3), kf.Gaussian())
    with pytest.raises(kf.UnsupportedError, match="1 is a scripted module"):
        kf.coverage(nn.Sequential(nn.Linear(3, 3), scripted), torch.randn(4, 3))


@pytest.mark.parametrize(
    "model, message",
    [
        (nn.Linear(3, 2).requires_grad_(False), "no trainable parameters"),
        (nn.ReLU(), "no trainable parameters"),
        (nn.LazyLinear(2), "weight is not initialised yet"),
        (nn.Linear(3, 2, dtype=torch.complex64), "weight has dtype torch.complex64"),
        (nn.Linear(3, 2, device="meta"), "lies on meta"),
        (Written(lambda m, x: x @ m.w.t(), w=torch.empty(0, 3)), r"w \[0, 3\]"),
    ],
    ids=["frozen", "none", "lazy", "complex", "meta", "empty"],
)
def test_parameters_that_cannot_be_treated(model, message):
    with pytest.raises(kf.UnsupportedError, match=message):
        kf.estimate(model, torch.randn(4, 3), kf.Gaussian())
    with pytest.raises(kf.UnsupportedError, match=message):
        kf.coverage(model, torch.randn(4, 3))


def test_what_is_no_module():
    with pytest.raises(TypeError, match=r"model is function.*Module"):
        kf.estimate(lambda x: x, torch.randn(4, 3), kf.Gaussian())


def test_isolation_by_itself():
    model = nn.BatchNorm1d(3)
    with isolate(model, 0):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        model(torch.randn(4, 3))
        assert model.num_batches_tracked == 1
        first = torch.rand(2)
    assert model.num_batches_tracked == 0 and isinstance(model._buffers, dict)
    with isolate(model, 0):
        model(torch.randn(4, 3))
        assert torch.equal(torch.rand(2), first)


def test_tensors_are_found_in_nested_data():
    a, b, c, d = (torch.zeros(k) for k in range(4))
    assert [len(t) for t in tensors_in({"x": (a, [b]), "y": OrderedDict(z=c), "n": 3, "d": d})] == [0, 1, 2, 3]
    assert list(trainable(nn.Linear(1, 1))) == ["weight", "bias"]


@pytest.mark.parametrize("models", [1, 2])
def test_threads_take_turns(models):
    """Several threads, on one model or on several: hooks, buffers and random state are the user's again."""
    those = [rich() for _ in range(models)]
    for model in those:
        model.register_full_backward_hook(lambda *_: None)
    calm = [kf.estimate(model, torch.ones(6, 3), kf.Gaussian()).to_dense() for model in those]
    before, failures = [snapshot(model) for model in those], []

    def work(k):
        for _ in range(3):
            found = kf.estimate(those[k % models], torch.ones(6, 3), kf.Gaussian()).to_dense()
            if not torch.equal(found, calm[k % models]):
                failures.append(k)

    threads = [Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [snapshot(model) for model in those] == before
    assert all(len(model._backward_hooks) == 1 for model in those)
