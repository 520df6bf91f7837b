"""Penalties, saliencies: against the dense matrix for every fit; what does not fit is refused."""

import copy
import pickle

import pytest
import torch

import kronfisher as kf
from kronfisher.fisher.vectors import flatten
from kronfisher.fits import FITS
from tests.helpers.close import close


def network():
    layers = torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.LayerNorm(3), torch.nn.Linear(3, 2)
    return torch.nn.Sequential(*layers).double()


def estimate(model, fit="kfac", **options):
    return kf.estimate(model, torch.randn(40, 4).double(), kf.Categorical(), fit=fit, **options)


def moved(model, by=0.3):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += by * torch.randn_like(parameter)
    return other


def flat(model):
    return flatten({name: p[None] for name, p in model.named_parameters()})[0].detach()


@pytest.mark.parametrize("fit", FITS)
def test_the_penalty_of_every_fit_is_its_quadratic_form_with_its_gradient(fit):
    model = network()
    fisher = estimate(model, fit)
    other, dense = moved(model), fisher.to_dense()
    distance = flat(other) - flat(model)
    value = fisher.penalty(model)(other)
    close(value, distance @ dense @ distance / 2, 1e-9)
    value.backward()
    close(torch.cat([p.grad.flatten() for p in other.parameters()]), dense @ distance, 1e-9)


def test_it_can_be_differentiated_twice_and_by_functional_transforms():
    model = network()
    fisher = estimate(model, "ekfac")
    penalty, names = fisher.penalty(model), fisher.names
    theta = [p.detach().clone().requires_grad_() for p in moved(model).parameters()]

    def value(*parts):
        return penalty(dict(zip(names, parts, strict=True)))

    assert torch.autograd.gradcheck(value, theta)
    assert torch.autograd.gradgradcheck(value, theta)
    gradients = torch.func.grad(penalty)(dict(zip(names, theta, strict=True)))
    expected = fisher @ {
        name: t.detach() - p.detach() for (name, p), t in zip(model.named_parameters(), theta, strict=True)
    }
    for name in names:
        close(gradients[name], expected[name], 1e-10)


def test_penalties_of_several_anchors_add_up_and_are_weighted():
    first = network()
    second, third = moved(first), moved(first)
    fishers = [estimate(model) for model in (first, second)]
    penalties = [fisher.penalty(model) for fisher, model in zip(fishers, (first, second), strict=True)]
    one, other = (penalty(third).detach() for penalty in penalties)
    close(sum(penalties)(third), one + other, 1e-12)
    total = 0.5 * penalties[0] + penalties[1] * 3.0
    close(total(third), 0.5 * one + 3 * other, 1e-12)
    assert repr(total) == f"<Penalty of 2 anchors over {fishers[0].dim} parameters>"
    with pytest.raises(ValueError, match="at least 0"):
        -1.0 * penalties[0]
    with pytest.raises(TypeError):
        penalties[0] + 1.0


def test_the_anchor_is_a_copy_and_the_minimum():
    model = network()
    penalty = estimate(model).penalty(model)
    assert penalty(model).item() == 0
    with torch.no_grad():
        model[0].weight += 1
    assert penalty(model).item() > 0
    again = pickle.loads(pickle.dumps(penalty))
    close(again(model), penalty(model), 1e-12)


def test_it_is_the_rise_of_the_loss_to_second_order():
    """A linear model: the loss is its quadratic form, so that penalty and rise are one number, at the minimum."""
    x, y = torch.randn(60, 3).double(), torch.randn(60, 2).double()
    model = torch.nn.Linear(3, 2).double()
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(60, 1)], 1), y).solution
    model.weight.data, model.bias.data = solution[:3].T.contiguous(), solution[3]
    penalty = kf.estimate(model, (x, y), kf.Gaussian(), fit="full", labels="exact").penalty(model)
    other = moved(model)
    rise = [(m(x) - y).square().sum(1).mean() / 2 for m in (model, other)]
    close(penalty(other), rise[1] - rise[0], 1e-10)


def test_a_new_head_is_free_and_half_precision_is_promoted():
    model = network()
    penalty = estimate(model).penalty(model)
    larger = {**dict(moved(model).named_parameters()), "head.weight": torch.randn(3)}
    assert penalty(larger).dtype == torch.float64
    half = {name: t.detach().bfloat16().requires_grad_() for name, t in larger.items()}
    penalty(half).backward()
    assert half["0.weight"].grad.dtype == torch.bfloat16 and half["head.weight"].grad is None


def test_what_does_not_fit_is_refused():
    model = network()
    fisher = estimate(model)
    with pytest.raises(kf.DataError, match=r"0\.weight .* is no parameter of this model"):
        fisher.penalty(torch.nn.Linear(2, 2).double())
    with pytest.raises(kf.DataError, match="other parameters than the model has now"):
        fisher.penalty(moved(model))
    with pytest.raises(kf.DataError, match=r"missing: 0\.weight"):
        fisher.penalty({name: p for name, p in model.named_parameters() if name != "0.weight"})
    with pytest.raises(kf.DataError, match="several vectors"):
        fisher.penalty({name: torch.stack([p, p]) for name, p in model.named_parameters()})
    with pytest.raises(kf.DataError, match="not list"):
        fisher.penalty([1.0])
    penalty = fisher.penalty(dict(moved(model).named_parameters()))  # values of one's own are no mistake
    with pytest.raises(kf.DataError, match=r"0\.weight \[3, 4\], which is \[2, 4\]"):
        penalty(torch.nn.Sequential(torch.nn.Linear(4, 2)).double())
    with pytest.raises(kf.DataError, match=r"3\.bias \[2\], which is missing"):
        penalty({name: p for name, p in model.named_parameters() if name != "3.bias"})
    with pytest.raises(kf.DataError, match="not float"):
        penalty(1.0)


@pytest.mark.parametrize("fit", ["kfac", "ekfac", "diagonal", "kronecker-sum"])
def test_saliencies_are_what_removing_one_weight_costs(fit):
    model = moved(network())  # no weight is zero
    fisher = estimate(model, fit) + 0.1
    dense, theta = fisher.to_dense(), flat(model)
    stays = flatten({name: t[None] for name, t in fisher.saliencies(dict(model.named_parameters())).items()})[0]
    moves = fisher.saliencies(dict(model.named_parameters()), adjusted=True)
    moves = flatten({name: t[None] for name, t in moves.items()})[0]
    for k in range(0, len(theta), 5):
        alone = torch.zeros_like(theta)
        alone[k] = -theta[k]
        close(stays[k], alone @ dense @ alone / 2, 1e-9)
        rest = [i for i in range(len(theta)) if i != k]
        best = alone.clone()
        best[rest] = -torch.linalg.solve(dense[rest][:, rest], dense[rest, k] * alone[k])
        close(moves[k], best @ dense @ best / 2, 1e-8)
    with pytest.raises(kf.DataError, match="other parameters"):
        fisher.saliencies(moved(model))


@pytest.mark.parametrize("fit", ["kfac", "ekfac", "diagonal", "kronecker-sum"])
def test_pruned_weights_are_zero_and_the_others_make_up_for_it_best(fit):
    model = moved(network())
    fisher = estimate(model, fit) + 0.05
    dense, theta = fisher.to_dense(), flat(model)
    kept = {name: torch.rand_like(p) < 0.6 for name, p in model.named_parameters() if name != "3.bias"}
    found = fisher.pruned(dict(model.named_parameters()), kept)
    mask = torch.cat([kept.get(name, torch.ones_like(p) > 0).flatten() for name, p in model.named_parameters()])
    change = torch.zeros_like(theta)
    change[~mask] = -theta[~mask]
    change[mask] = -torch.linalg.solve(dense[mask][:, mask], dense[mask][:, ~mask] @ change[~mask])
    close(flatten({name: t[None] for name, t in found.items()})[0], theta + change, 1e-8)
    assert all((found[name][~mask] == 0).all() for name, mask in kept.items())


def test_masks_that_do_not_fit_are_refused():
    model = network()
    fisher = estimate(model) + 0.1
    theta = dict(model.named_parameters())
    with pytest.raises(kf.DataError, match="does not cover"):
        fisher.pruned(theta, {"other": torch.ones(3) > 0})
    with pytest.raises(kf.DataError, match="True or False"):
        fisher.pruned(theta, {"3.bias": torch.ones(2)})
    with pytest.raises(kf.DataError, match="has shape"):
        fisher.pruned(theta, {"3.bias": torch.ones(3) > 0})
