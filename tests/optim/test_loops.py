"""Loops that people write: accumulated, scaled and clipped gradients, losses of their own, closures, low precision."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import kronfisher as kf
from kronfisher.optim.layerwise import output_changes
from tests.helpers.training import batches, network, train, weights


class Answer(dict):
    """An object of outputs, as models of `transformers` return."""

    @property
    def logits(self):
        return self["logits"]


class Answering(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = network()
        self.calls = 0

    def forward(self, x, labels=None):
        self.calls += 1
        logits = self.inner(x)
        return Answer(logits=logits, loss=None if labels is None else cross_entropy(logits, labels))


def run(count, loop, *, dtype=torch.float64, **options):
    """Weights after some steps of a loop ``loop(model, optimizer, x, y)``."""
    model = network(dtype=dtype)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), **options)
    for x, y in batches(count, dtype=dtype):
        loop(model, optimizer, x, y)
    return weights(model)


def usual(model, optimizer, x, y):
    optimizer.zero_grad()
    optimizer.backward(optimizer.forward(x), y)
    optimizer.step()


@pytest.mark.parametrize("divided", [False, True])
def test_accumulating_parts_of_a_batch_is_one_step_of_the_whole(divided):
    def accumulate(model, optimizer, x, y):
        optimizer.zero_grad()
        for a, b in zip(x.chunk(4), y.chunk(4), strict=True):
            outputs = optimizer.forward(a)
            optimizer.backward(outputs, b, optimizer.loss(outputs, b) / 4 if divided else None)
        optimizer.step()

    torch.testing.assert_close(run(8, accumulate, labels="exact"), run(8, usual, labels="exact"), rtol=1e-6, atol=1e-8)


def averages(count, parts):
    """What averages of all layers hold after steps that move nothing: first passes, counts, sums of eigenvalues."""
    model = network(dtype=torch.float64)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), fit="ekfac", labels="exact", lr=0.0)
    for x, y in batches(count, dtype=torch.float64):
        optimizer.zero_grad()
        for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
            optimizer.backward(optimizer.forward(a), b)
        optimizer.step()
    found = {}
    for layer in optimizer.parts.statistics.layers:
        first, second = layer.average.states
        found |= {f"{layer.name} {name}": sums.triu() for name, sums in first.sums.items()}
        found[f"{layer.name} counts"] = torch.tensor([float(first.count), float(second.count)])
        found[f"{layer.name} trace"] = sum(sums.sum() for sums in second.sums.values())
    return found


@pytest.mark.parametrize(("count", "parts"), [(1, 2), (1, 4), (5, 2), (5, 4)])
def test_a_basis_that_is_renewed_takes_in_all_parts_of_a_batch(count, parts):
    """Seen: a DataError about an empty factor. In any basis eigenvalues add up to the trace, until they are carried."""
    whole, added = averages(count, 1), averages(count, parts)
    assert len(whole) == 8
    for name, value in whole.items():
        if count == 1 or not name.endswith("trace"):
            torch.testing.assert_close(added[name], value, rtol=1e-10, atol=1e-12)


def test_a_step_does_not_depend_on_the_scale_of_the_gradient():
    def scaled(model, optimizer, x, y):
        optimizer.zero_grad()
        optimizer.backward(optimizer.forward(x), y)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-2)  # all are longer
        for p in model.parameters():
            p.grad.mul_(7)
        optimizer.step()

    def normalised(model, optimizer, x, y):
        optimizer.zero_grad()
        optimizer.backward(optimizer.forward(x), y)
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        for p in model.parameters():
            p.grad.div_(norm)
        optimizer.step()

    torch.testing.assert_close(run(8, scaled), run(8, normalised), rtol=1e-5, atol=1e-6)


def test_losses_with_terms_of_ones_own_run_the_model_once_a_step():
    model, (x, y) = Answering(), batches(1, n=64)[0]
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    losses = []
    y = x.argmax(1) % 3
    for _ in range(30):
        optimizer.zero_grad()
        answer = optimizer.forward(x, labels=y)
        penalty = 1e-3 * sum(p.square().sum() for p in model.parameters()) + 0.01 * answer.logits.abs().mean()
        losses.append(optimizer.backward(answer, y, answer["loss"] + penalty).item())
        optimizer.step()
    assert model.calls == 30 and losses[-1] < 0.7 * losses[0]


def test_objects_with_logits_are_outputs():
    data, plain, answering = batches(6), network(), Answering()
    answering.inner.load_state_dict(plain.state_dict())
    one, other = (kf.NaturalGradient(model, kf.Categorical()) for model in (plain, answering))
    for x, y in data:
        loss = one.step(lambda x=x: plain(x), y)
        assert torch.equal(loss, other.step(lambda x=x: answering(x), y))
    with pytest.raises(kf.DataError, match="neither a tensor nor an object with `logits`"):
        one.step(lambda: [plain(x)], y)


class Heads(nn.Module):
    """Logits and numbers, as of actors and critics."""

    def __init__(self):
        super().__init__()
        self.body, self.logits, self.values = (
            network(dtype=torch.float64),
            nn.Linear(3, 3).double(),
            nn.Linear(3, 1).double(),
        )

    def forward(self, x):
        h = self.body(x)
        return {"classes": self.logits(h), "more": (self.values(h).squeeze(1), h)}


def heads():
    torch.manual_seed(0)
    return Heads()


def parts_of(answer):
    return torch.cat([answer["classes"], answer["more"][0][:, None]], 1)


def own_loss(answer, y):
    return cross_entropy(answer["classes"], y) + (answer["more"][0] - y).square().mean()


@pytest.mark.parametrize("way", ["forward", "attach"])
def test_models_with_several_outputs_and_a_loss_of_ones_own(way):
    one, other, data = heads(), heads(), batches(8, dtype=torch.float64)

    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = one

        def forward(self, x):
            return parts_of(self.heads(x))

    joined = Joined()
    expected = kf.NaturalGradient(joined, kf.Gaussian())
    optimizer = kf.NaturalGradient(other, kf.Gaussian())
    if way == "attach":
        with pytest.raises(kf.DataError, match=r"attach\(outputs="):
            optimizer.attach()
            other(data[0][0])
        optimizer.attach(outputs=parts_of)
    losses = []
    for x, y in data:
        outputs = expected.forward(x)
        expected.zero_grad()
        expected.backward(outputs, loss=own_loss({"classes": outputs[:, :3], "more": (outputs[:, 3],)}, y))
        expected.step()
        optimizer.zero_grad()
        if way == "forward":
            answer = optimizer.forward(x)
            losses.append(optimizer.backward(parts_of(answer), loss=own_loss(answer, y)))
        else:
            losses.append(own_loss(other(x), y))
            losses[-1].backward()
        optimizer.step()
        torch.testing.assert_close(weights(one), weights(other), rtol=1e-12, atol=1e-12)
    with pytest.raises(kf.DataError, match=r"step\(lambda: model\(x\)\['classes'\], y\)"):
        optimizer.step(lambda: other(x), y)


def test_outputs_may_be_reshaped_before_the_backward_pass():
    def squeezed(model, optimizer, x, y):
        optimizer.zero_grad()
        optimizer.backward(optimizer.forward(x[:, None]).squeeze(1), y)
        optimizer.step()

    torch.testing.assert_close(run(6, squeezed), run(6, usual), rtol=1e-6, atol=1e-8)


def test_a_step_takes_the_outputs_of_one_pass_beside_a_loss_of_two():
    model, ((x, _), *_) = network(), batches(1)
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    first, second = optimizer.forward(x), optimizer.forward(-x)
    loss = (first - second).square().mean()
    with pytest.raises(kf.DataError, match="made of 2 forward passes"):
        optimizer.backward(torch.cat([first, second]), loss=loss)
    with pytest.raises(kf.DataError, match="are made of them"):
        optimizer.backward(model(x), loss=loss)
    before = weights(model)
    optimizer.backward(second, loss=loss)
    expected = torch.autograd.grad((model(x) - model(-x)).square().mean(), list(model.parameters()))
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))
    optimizer.step()
    assert not torch.equal(before, weights(model))


def test_a_step_without_targets_or_a_loss_says_what_to_write():
    model, ((x, _), *_) = network(), batches(1)
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    with pytest.raises(kf.DataError, match=r"optimizer\.backward\(outputs, loss=loss\)"):
        optimizer.backward(optimizer.forward(x))
    with pytest.raises(kf.DataError, match=r"step\(lambda: model\(x\), y\) takes the targets"):
        optimizer.step(lambda: model(x), None)


def test_a_scaler_of_gradients_changes_nothing_and_leaves_out_what_overflows():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def scaled(model, optimizer, x, y):
        optimizer.zero_grad()
        optimizer.backward(optimizer.forward(x), y, scale=scaler.scale)
        scaler.step(optimizer)
        scaler.update()

    assert torch.equal(run(6, scaled, dtype=torch.float32), run(6, usual, dtype=torch.float32))

    def overflowing(model, optimizer, x, y):
        optimizer.zero_grad()
        optimizer.backward(optimizer.forward(x), y, scale=scaler.scale)
        overflows = optimizer.steps == 2 and scaler.get_scale() == 2.0**10
        if overflows:
            next(model.parameters()).grad.fill_(torch.inf)
        before = weights(model)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, weights(model)) == overflows

    run(6, overflowing, dtype=torch.float32)
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_low_and_high_precision(dtype):
    model, (x, y) = network(dtype=torch.float64 if dtype == torch.float64 else torch.float32), batches(1, n=64)[0]
    x, y = x.to(next(model.parameters()).dtype), x.argmax(1) % 3
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            outputs = optimizer.forward(x)
            loss = optimizer.backward(outputs, y)
            assert optimizer.loss(outputs, y).dtype == loss.dtype == next(model.parameters()).dtype
        optimizer.step()
        losses.append(loss)
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.dtype == x.dtype for p in model.parameters())


def test_models_that_differentiate_within_their_forward_pass():
    class Forces(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.energy, self.calls = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)), 0

        def forward(self, x):
            self.calls += 1
            x = x.detach().requires_grad_()
            return -torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]

    model, x = Forces(), torch.randn(32, 3, generator=torch.Generator().manual_seed(1))
    optimizer = kf.NaturalGradient(model, kf.Gaussian())
    with pytest.warns(kf.NumericalWarning, match="outside every fit"):
        losses = [float(optimizer.step(lambda: model(x), x.sin())) for _ in range(30)]
    assert losses[-1] < losses[5] < losses[0] and model.calls == 30


@pytest.mark.parametrize("fails", ["model", "loss", "inverse"])
def test_a_step_that_raises_moves_nothing(fails, monkeypatch):
    data, broken = batches(6), [False]
    model = network()
    optimizer = kf.NaturalGradient(model, kf.Categorical(), refresh=kf.Refresh(1, 1))

    def forward(x):
        outputs = model(x)
        if broken[0] and fails == "model":
            raise MemoryError("simulated")
        return outputs

    train(optimizer, model, data[:3])
    before, momenta = weights(model), [optimizer.state[p]["momentum"].clone() for p in model.parameters()]
    broken[0] = True
    x, y = data[3]
    with monkeypatch.context() as patch:
        if fails == "inverse":
            patch.setattr(optimizer.parts.direction, "renew", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(kf.DataError if fails == "loss" else MemoryError):
            optimizer.step(lambda: forward(x), y + 7 if fails == "loss" else y)
    assert torch.equal(weights(model), before) and optimizer.steps == 3
    assert all(torch.equal(optimizer.state[p]["momentum"], m) for p, m in zip(model.parameters(), momenta, strict=True))
    broken[0] = False
    train(optimizer, model, data[3:])
    assert torch.isfinite(weights(model)).all() and not torch.equal(weights(model), before)


def test_a_closure_goes_through_wrappers_that_pass_nothing_else():
    class Wrapper(torch.optim.Optimizer):
        """As `accelerate` and Lightning wrap optimisers."""

        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self, closure=None):
            return self.optimizer.step(closure)

    def wrapped(model, optimizer, x, y):
        def closure():
            outputs = optimizer.forward(x)
            optimizer.zero_grad()
            return optimizer.backward(outputs, y)

        assert Wrapper(optimizer).step(closure).dim() == 0

    assert torch.equal(run(6, wrapped), run(6, usual))


# Loops that call the model themselves -------------------------------------------------------------------------------


def attached(model, optimizer, x, y):
    if optimizer.steps == 0:
        optimizer.attach()
    optimizer.zero_grad()
    cross_entropy(model(x), y).backward()
    optimizer.step()


@pytest.fixture
def nobody_knows_how_far_the_loss_can_fall(monkeypatch):
    """As in a loop that keeps its loss to itself."""
    monkeypatch.setattr(kf.Categorical, "excess", lambda *_: None)


@pytest.mark.usefixtures("nobody_knows_how_far_the_loss_can_fall")
@pytest.mark.parametrize("step", [kf.LayerwiseStep(), kf.QuadraticModel(momentum=0.9)], ids=["layerwise", "quadratic"])
def test_an_attached_model_takes_the_same_steps(step):
    ours, theirs = run(12, usual, step=step), run(12, attached, step=step)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)  # the loss is summed by another function


def test_no_part_of_an_attached_loop_takes_less_than_no_time():
    model = network()
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    optimizer.attach()
    for x, y in batches(4):
        attached(model, optimizer, x, y)
    seconds = optimizer.report().seconds
    assert min(seconds.values()) >= 0 and seconds["statistics"] > 0


@pytest.mark.usefixtures("nobody_knows_how_far_the_loss_can_fall")
def test_lightnings_order_within_a_closure():
    def lightning(model, optimizer, x, y):
        if optimizer.steps == 0:
            optimizer.attach()

        def closure():
            loss = cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            return loss

        optimizer.step(closure)

    torch.testing.assert_close(run(12, lightning), run(12, usual), rtol=1e-12, atol=1e-12)


def test_detaching_leaves_the_model_as_it_was():
    model, ((x, y), *_) = network(), batches(1)
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    optimizer.attach()
    attached(model, optimizer, x, y)
    assert all(p.grad is not None for p in model.parameters()) and optimizer.parts.statistics.ready
    optimizer.attach()  # again: the first hooks go
    assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 1
    optimizer.detach()
    assert not (model._forward_hooks or model._forward_pre_hooks or model._forward_hooks_always_called)
    with pytest.warns(kf.NumericalWarning, match=r"optimizer\.attach"):
        for _ in range(3):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()


def test_an_attached_model_may_raise_evaluate_and_be_copied():
    model, ((x, y), *_) = network(), batches(1)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), refresh=kf.Refresh(statistics=1))
    optimizer.attach()
    with pytest.raises(RuntimeError):
        model(x[:, :2])
    with torch.no_grad():
        model(x)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    before = weights(average)
    for _ in range(4):
        attached(model, optimizer, x, y)
        average.update_parameters(model)
        assert average(x).requires_grad  # outside of training, and of the statistics
    assert optimizer.parts.statistics.backward_passes == 4
    assert not torch.equal(weights(average), before)
    train(optimizer, model, batches(3))  # our own passes are captured once
    assert optimizer.parts.statistics.backward_passes == 7


def test_what_an_attached_loop_cannot_give_is_refused():
    model, ((x, y), *_) = network(), batches(1)
    with pytest.raises(kf.UnsupportedError, match=r"step=kf.LayerwiseStep\(\)"):
        kf.NaturalGradient(model, kf.Categorical(), step=kf.QuadraticModel()).attach()
    optimizer = kf.NaturalGradient(model, kf.Categorical(), labels="observed")
    optimizer.attach()
    with pytest.raises(kf.DataError):
        model(x)
    optimizer.attach(targets=lambda inputs, options: y)
    cross_entropy(model(x), y).backward()
    optimizer.step()
    assert optimizer.parts.statistics.ready


def test_ignored_labels_of_a_call_do_not_count(monkeypatch):
    monkeypatch.setattr(output_changes, "AFFORDABLE", 1e9)  # the arithmetic of a pass counts them: it is spent on them
    data = batches(4)

    def loop(pad):
        model = Answering()
        model.inner.load_state_dict(network().state_dict())
        optimizer = kf.NaturalGradient(model, kf.Categorical(), labels="exact")
        optimizer.attach()
        for x, y in data:
            if pad:
                x, y = torch.cat([x, 100 * x]), torch.cat([y, torch.full_like(y, -100)])
            optimizer.zero_grad()
            model(x, labels=y)["loss"].backward()
            optimizer.step()
        return weights(model)

    torch.testing.assert_close(loop(True), loop(False))


def test_checkpointed_and_compiled_models():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return self.inner[2:](checkpoint(self.inner[:2], x, use_reentrant=False))

    expected, data = [], batches(6)
    for make in (network, Checkpointed, lambda: torch.compile(network(), backend="eager")):
        model = make()
        optimizer = kf.NaturalGradient(model, kf.Categorical())
        for x, y in data:
            attached(model, optimizer, x, y)
        expected.append(weights(model))
    for one in expected[1:]:
        torch.testing.assert_close(one, expected[0])
