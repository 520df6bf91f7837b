"""Every registered fit as the precision of a posterior, and layers of every kind, against Λ written out."""

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.fits import FITS
from tests.helpers.close import close
from tests.helpers.memory import Sizes
from tests.helpers.truth import jacobian, precision
from tests.laplace.problems import problem


@pytest.mark.filterwarnings("ignore::kronfisher.errors.NumericalWarning")  # of fits that iterate
@pytest.mark.parametrize("fit", sorted(FITS))
@pytest.mark.parametrize("network", ["mlp", "convnet"])
def test_every_fit_gives_the_posterior_of_its_own_matrix(network, fit):
    model, x, _, fisher = problem(network, fit=fit)
    prior = 2.0 - min(0.0, 1.1 * float(fisher.eigenvalues()[-1]) * fisher.count)  # sums may be indefinite by themselves
    dense = precision(fisher, prior)
    posterior = kf.Laplace(model, fisher, prior)
    jac = jacobian(model, x[:4], fisher.names)
    truth = jac @ torch.linalg.solve(dense, jac.mT)
    close(posterior.functional_variance(x[:4])[1], truth.diagonal(dim1=1, dim2=2), 1e-7)
    close(posterior.functional_covariance(x[:4])[1], truth, 1e-7)
    close(sum(p.logdet() for p in posterior.precisions.values()), torch.logdet(dense), 1e-7)
    drawn = posterior.sample(20_000)
    draws = torch.cat([t.flatten(1) for t in drawn.values()], dim=1) - torch.cat(
        [m.flatten() for m in posterior.mean.values()]
    )
    white = torch.linalg.cholesky(dense).mT @ draws.mT
    assert (white @ white.mT / 20_000 - torch.eye(len(white))).abs().max() < 0.06


class Words(nn.Module):
    """Lookups, attention, a scale, a tied head and a kernel that only the fallback can treat."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.recurrent = nn.GRU(4, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        h = self.table(x)
        h = self.norm(h + self.attention(h, h, h, need_weights=False)[0])
        return self.head(self.recurrent(h)[0].mean(1))


@pytest.mark.parametrize("fit", ["kfac", "kfac-reduce", "ekfac", "kfoc", "prototypes", "diagonal", "full"])
def test_layers_of_every_kind(fit):
    torch.manual_seed(0)
    model = Words().double()
    x = torch.randint(7, (12, 5))
    fisher = kf.estimate(model, (x, torch.randint(2, (12,))), kf.Categorical(), fit=fit, labels="exact")
    posterior = kf.Laplace(model, fisher, 1.5)
    jac = jacobian(model, x[:4], fisher.names)
    truth = jac @ torch.linalg.solve(precision(fisher, 1.5), jac.mT)
    close(posterior.functional_variance(x[:4])[1], truth.diagonal(dim1=1, dim2=2), 1e-7)
    close(posterior.functional_covariance(x[:4])[1], truth, 1e-7)
    drawn = posterior.sample(3, seed=1)
    delta = torch.cat([(drawn[n] - posterior.mean[n]).flatten(1) for n in fisher.names], dim=1)
    expected = model(x[:4]).detach() + (jac @ delta.mT).permute(2, 0, 1)
    close(posterior.functional_samples(x[:4], 3, seed=1), expected, 1e-7)


def test_a_table_is_never_written_out():
    """The variance of a wide lookup costs what its tokens cost, not its rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20_000, 4), nn.Flatten(), nn.Linear(20, 2))
    x = torch.randint(20_000, (64, 5))
    x[0] = 3
    for fit in ("kfac", "diagonal"):
        fisher = kf.estimate(model, (x, torch.randint(2, (64,))), kf.Categorical(), fit=fit)
        posterior = kf.Laplace(model, fisher)
        largest = []
        posterior.predict(x)
        with Sizes(largest):
            variance = posterior.functional_variance(x)[1]
            covariance = posterior.functional_covariance(x)[1]
        assert max(largest) <= 20_000 * 4  # one example written out would be five times the table
        torch.testing.assert_close(covariance.diagonal(dim1=1, dim2=2), variance)


def test_per_example_gradients_may_come_a_few_at_a_time(monkeypatch):
    torch.manual_seed(0)
    model = Words().double()
    x = torch.randint(7, (12, 5))
    fisher = kf.estimate(model, x, kf.Categorical(), fit="kfac", labels="exact")
    posterior = kf.Laplace(model, fisher, 1.5)
    variance, covariance = posterior.functional_variance(x)[1], posterior.functional_covariance(x)[1]
    monkeypatch.setattr("kronfisher.estimation.groups.WORKSPACE", 3000)
    close(posterior.functional_variance(x)[1], variance)
    close(posterior.functional_covariance(x)[1], covariance)


def test_a_mask_that_the_likelihood_does_not_know_leaves_the_evidence_open():
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(6, 4, 3)
    batch = {"x": x, "keep": torch.ones(6, 4, dtype=torch.bool)}
    fisher = kf.estimate(
        model,
        [batch],
        kf.Categorical(class_dim=-1),
        mask="keep",
        forward=lambda m, b: (m(b["x"]), torch.zeros(6, 4).long()),
    )
    posterior = kf.Laplace(model, fisher)
    with pytest.raises(kf.DataError, match="unknown"):
        posterior.log_marginal_likelihood()
    with pytest.raises(kf.UnsupportedError, match="mask"):
        posterior.score([batch])
