import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.errors import DataError, NumericalError
from kronfisher.likelihoods import Draws, HeteroscedasticGaussian


def batch(*shape):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("dim, shape", [(-1, (4, 6)), (-1, (3, 2, 4)), (1, (3, 4, 2, 2))], ids=str)
def test_log_prob_is_torchs_loss(dim, shape):
    outputs, targets = batch(*shape)
    mean, log_variance = outputs.chunk(2, dim)
    targets = targets.chunk(2, dim)[0]
    loss = nn.GaussianNLLLoss(full=True, reduction="none")
    truth = -loss(mean, targets, log_variance.exp())
    gaussian = HeteroscedasticGaussian(dim)
    torch.testing.assert_close(gaussian.log_prob(outputs, targets), truth.flatten(1).sum(1))
    torch.testing.assert_close(gaussian.log_probs(outputs, targets), truth.sum(dim))
    assert torch.equal(gaussian.mean(outputs), mean) and torch.equal(
        gaussian.noise_variance(outputs), log_variance.exp()
    )


def test_exact_is_the_fisher_and_not_the_hessian():
    """Average of score times score over a fine grid of labels, which knows nothing of the closed form."""
    outputs = torch.tensor([[0.3, -0.7]], dtype=torch.float64)
    y = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]
    gaussian = HeteroscedasticGaussian()
    many = outputs.expand(len(y), 2)
    density = gaussian.log_prob(many, y).exp()
    density = density / density.sum()
    scores = gaussian.observed(many, y)
    truth = torch.einsum("n,ni,nj->ij", density, scores, scores)
    roots = torch.stack(list(gaussian.exact(outputs)))[:, 0]
    torch.testing.assert_close(roots.T @ roots, truth, rtol=1e-6, atol=1e-9)
    assert truth[1, 1].item() == pytest.approx(0.5) and truth[0, 0].item() == pytest.approx(2.718281828**0.7)


def test_one_target_may_come_without_its_dimension():
    outputs, targets = batch(4, 2)
    gaussian = HeteroscedasticGaussian()
    for labels in ("observed", "sampled"):
        gaussian.check(outputs, targets[:, 0], labels=labels)
    assert torch.equal(gaussian.log_prob(outputs, targets[:, 0]), gaussian.log_prob(outputs, targets[:, :1]))
    assert torch.equal(gaussian.observed(outputs, targets[:, 0]), gaussian.observed(outputs, targets[:, :1]))
    assert gaussian.sample(outputs, Draws(0)).shape == (4, 1)


def test_mean_squared_error_is_the_case_of_fixed_variance():
    """The block of the means is that of a Gaussian whose variance is the predicted one."""
    model, x = nn.Linear(3, 2).double(), torch.randn(5, 3, dtype=torch.float64)
    with torch.no_grad():
        model.weight[1], model.bias[1] = 0, 0.8
    both = kf.estimate(model, x, HeteroscedasticGaussian(), fit="full", labels="exact").to_dense()
    alone = nn.Linear(3, 1).double()
    one = kf.estimate(alone, x, kf.Gaussian(variance=torch.tensor(0.8).double().exp()), fit="full", labels="exact")
    index = torch.tensor([0, 1, 2, 6])
    torch.testing.assert_close(both[index[:, None], index], one.to_dense())
    assert (both[index[:, None], index + torch.tensor([3, 3, 3, 1])].abs() < 1e-15).all()


@pytest.mark.parametrize(
    ("dim", "shape", "target", "message"),
    [
        (
            -1,
            (4, 3),
            None,
            r"C means and then C log-variances along dimension -1 of the outputs, found \[4, 3\]; let the",
        ),
        (-1, (4,), None, r"C means and then C log-variances along dimension -1 of the outputs, found \[4\]"),
        (-1, (4, 6), (4, 6), r"HeteroscedasticGaussian needs targets of shape \[4, 3\], found \[4, 6\]"),
        (-1, (4, 6), (4,), r"HeteroscedasticGaussian needs targets of shape \[4, 3\], found \[4\]"),
        (1, (4, 2, 5), (4, 2, 5), r"HeteroscedasticGaussian needs targets of shape \[4, 1, 5\], found \[4, 2, 5\]"),
    ],
)
def test_messages(dim, shape, target, message):
    with pytest.raises(DataError, match="^batch 7: .*" + message):
        HeteroscedasticGaussian(dim).check(
            torch.zeros(shape), None if target is None else torch.zeros(target), "batch 7"
        )


def test_settings_and_values_are_checked():
    with pytest.raises(ValueError, match="dim=2 must be 1 for"):
        HeteroscedasticGaussian(2)
    for wrong in (89.0, -89.0):
        with pytest.raises(NumericalError, match=r"^batch 7: .*needs log-variances of a size below 89, .*found 89"):
            HeteroscedasticGaussian().check(torch.tensor([[1e6, wrong]]), None, "batch 7")
    with pytest.raises(DataError, match="finite targets"):
        HeteroscedasticGaussian().check(torch.zeros(1, 2), torch.tensor([[torch.nan]]))
