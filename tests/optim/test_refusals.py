"""Misuse is refused with a reason, and networks without an exact quadratic model get a fixed rate."""

import copy

import pytest
import torch
from torch import nn

import kronfisher as kf
from tests.helpers.networks import Written
from tests.helpers.training import batches, network


def test_misuse_is_refused_with_a_reason():
    model, ((x, y), *_) = network(), batches(1)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), step=kf.QuadraticModel())
    nn.functional.cross_entropy(model(x), y).backward()
    with pytest.raises(kf.UnsupportedError, match="no curvature yet"):
        optimizer.step()
    with pytest.raises(kf.DataError, match="exactly as forward returned them"):
        optimizer.backward(model(x), y)
    outputs = optimizer.forward(x)
    with pytest.raises(kf.UnsupportedError, match="cannot be evaluated again"):
        optimizer.backward(outputs, y, optimizer.loss(outputs, y) + 1)
    with pytest.raises(ValueError, match="momentum"):
        kf.NaturalGradient(model, kf.Categorical(), momentum=1.5)
    with pytest.raises(ValueError, match="not the model's"):
        kf.NaturalGradient(model, kf.Categorical(), params=[nn.Parameter(torch.zeros(2))], step=kf.QuadraticModel())
    with pytest.raises(kf.DataError, match="single number"):
        kf.NaturalGradient(model, kf.Categorical(), step=kf.QuadraticModel()).step(
            lambda: nn.functional.cross_entropy(model(x), y), y
        )


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("way", ["step", "forward", "attach", "preconditioner"])
def test_an_empty_batch_is_refused_at_any_step_and_training_goes_on_without_it(way: str, before: int):
    model, given = network(), batches(before + 1)
    optimizer = kf.Preconditioner(model, kf.Categorical()) if way == "preconditioner" else None
    trained = kf.NaturalGradient(model, kf.Categorical(), refresh=kf.Refresh(statistics=1))
    if way == "attach":
        trained.attach()

    def train(x: torch.Tensor, y: torch.Tensor) -> None:
        if way == "step":
            trained.step(lambda: model(x), y)
        elif way == "forward":
            trained.zero_grad()
            trained.backward(trained.forward(x), y)
            trained.step()
        else:
            model.zero_grad()
            nn.functional.cross_entropy((model if optimizer is None else optimizer)(x), y).backward()
            (trained if optimizer is None else optimizer).step()

    for x, y in given[:-1]:
        train(x, y)
    x, y = given[-1]
    with pytest.raises(kf.DataError, match="the batch is empty"):
        train(x[:0], y[:0])
    old = [p.detach().clone() for p in model.parameters()]
    train(x, y)
    if optimizer is None:
        assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), old, strict=True))
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_errors_of_the_first_step_name_their_cause():
    x, y = batches(1)[0]
    squared = Written(lambda m, x: x @ m.w.square(), w=torch.randn(4, 3))
    optimizer = kf.NaturalGradient(squared, kf.Categorical(), step=kf.QuadraticModel())
    with pytest.raises(kf.UnsupportedError, match="No block covers any of the parameters"):
        optimizer.step(lambda: squared(x), y)
    model = network()
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    with pytest.raises(kf.DataError, match="label 7 is out of range"):
        optimizer.step(lambda: model(x), torch.full_like(y, 7))
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(optimizer)


def test_networks_without_an_exact_quadratic_model_continue_at_a_fixed_rate():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.last = nn.EmbeddingBag(10, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.last(self.bag(x))

    torch.manual_seed(0)
    model, x = Bag(), torch.randint(10, (64, 5))
    y = x[:, 0] % 3
    optimizer = kf.NaturalGradient(model, kf.Categorical(), step=kf.QuadraticModel())
    with pytest.warns(kf.NumericalWarning, match="fixed rate"):
        losses = [optimizer.step(lambda: model(x), y).item() for _ in range(40)]
    assert losses[-1] < 0.9 * losses[0]
    assert any("fixed rate" in text for text in optimizer.report().warnings)
    with pytest.raises(kf.UnsupportedError, match="fixed rate"):
        explicit = kf.NaturalGradient(model, kf.Categorical(), momentum=0.9, trust=kf.LevenbergMarquardt())
        for _ in range(3):
            explicit.step(lambda: model(x), y)


@pytest.mark.parametrize(("options", "words"), [
    ({"damping": 0.1}, "`trust`"), ({"trust": kf.FactoredTikhonov()}, "kf.Constant"),
    ({"trust": "fixed"}, "kf.Constant"), ({"step": "quadratic"}, "kf.QuadraticModel"),
    ({"refresh": 5}, "kf.Refresh"), ({"momentum": "some"}, r"\[0, 1\)"),
    ({"seed": "a"}, "an integer"),
])  # fmt: skip
def test_options_of_another_kind_say_what_to_give(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        kf.NaturalGradient(network(), kf.Categorical(), **options)
    if options.keys() <= {"damping", "trust", "refresh", "seed"}:
        with pytest.raises(TypeError, match=words):
            kf.Preconditioner(network(), kf.Categorical(), **options)


def test_what_no_step_can_be_made_of_says_what_to_write():
    model, ((x, y), *_) = network(), batches(1)
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    for given in (model(x), nn.functional.cross_entropy(model(x), y)):
        with pytest.raises(TypeError, match=r"step\(lambda: model\(x\), y\)"):
            optimizer.step(given, y)
    with pytest.raises(kf.DataError, match="depends on no parameter"):
        optimizer.step(lambda: model(x).detach(), y)
    outputs = optimizer.forward(x)
    for losses, words in (
        (nn.functional.cross_entropy(outputs, y, reduction="none"), r"has shape \[16\]"),
        (0.5, "is a float"),
    ):
        with pytest.raises(kf.DataError, match=f"the loss {words}"):
            optimizer.backward(outputs, y, losses)
    keyed = Written(lambda m, x: {"scores": m.inner(x)}, inner=model)
    optimizer = kf.NaturalGradient(keyed, kf.Categorical())
    answer = optimizer.forward(x)
    with pytest.raises(kf.DataError, match=r"answer\['scores'\], or torch.cat"):
        optimizer.backward(answer, y)
    optimizer.attach(keyed)
    with pytest.raises(kf.DataError, match=r"lambda answer: answer\['scores'\]"):
        keyed(x)
    with torch.inference_mode(), pytest.raises(kf.UnsupportedError, match="train outside of it"):
        optimizer.step(lambda: model(x), y)


def test_a_step_enables_gradients_by_itself():
    (x, y), *_ = batches(1)
    losses = []
    for surroundings in (torch.enable_grad, torch.no_grad):
        model = network()
        optimizer = kf.NaturalGradient(model, kf.Categorical())
        with surroundings():
            losses.append([float(optimizer.step(lambda m=model: m(x), y)) for _ in range(3)])
    assert losses[0] == losses[1] and losses[0][2] < losses[0][0]


def test_a_state_of_other_shapes_is_refused():
    (x, y), *_ = batches(1)
    small, large = nn.Linear(x.shape[1], 3).to(x), nn.Linear(x.shape[1], 4).to(x)
    optimizer = kf.NaturalGradient(small, kf.Categorical())
    optimizer.step(lambda: small(x), y)
    with pytest.raises(kf.DataError, match=r"weight of shape \[3, 4\], which has \[4, 4\] now"):
        kf.NaturalGradient(large, kf.Categorical()).load_state_dict(optimizer.state_dict())
    small.weight.data = large.weight.detach().clone()
    with pytest.raises(kf.UnsupportedError, match="Make a new optimiser"):
        optimizer.step(lambda: small(x), y)
