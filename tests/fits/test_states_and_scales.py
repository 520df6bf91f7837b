"""States go on after they were finished, in any units: what training and small gradients do to fits that iterate."""

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.blocks import Block, View
from kronfisher.fits import named
from kronfisher.rearrangement import truncated
from tests.fits.test_kfoc import fitted, gradients_of, random_samples, samples_of

SUMS = [
    kf.KroneckerSum(2),
    kf.KroneckerSum(2, "deflation"),
    kf.KroneckerSum(2, "nonnegative"),
    kf.KFACCorrected(),
    kf.KPSVD(),
]
ITERATED = [*SUMS, kf.KFOC(), kf.KFOC("running"), kf.KFOC("approx")]


def begun(fit, samples):
    heads, outputs, inputs = samples.shape
    block = Block("w", "linear", View.of("w", torch.zeros(heads, outputs, inputs)))
    state = fit.init((block,), fit.plan((block,), 8), samples.gradients)
    state.count = float(len(samples))
    return fit.update(state, (samples,))


def distance(operator, truth):
    return float((operator.to_dense().double() - truth).norm() / truth.norm())


def mean_block(*samples):
    """``[D, D]`` of one group: the mean over all samples."""
    rows = torch.cat([gradients_of(several)[0].flatten(1).double() for several in samples])
    return rows.mT @ rows / len(rows)


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("fit", ITERATED, ids=repr)
def test_a_state_that_was_finished_goes_on(fit, T):
    """Training finishes its average, and then takes the next batch into it."""
    x, y = random_samples(30, T, seed=1), random_samples(50, T, seed=2)
    plain = fit.finish(fit.combine(begun(fit, x), begun(fit, y))).to_dense()
    before = begun(fit, x)
    fit.finish(before)
    after = fit.finish(fit.combine(before, begun(fit, y))).to_dense()
    torch.testing.assert_close(after, plain, rtol=1e-6, atol=1e-9)
    once = fit.finish(before).to_dense()
    torch.testing.assert_close(fit.finish(before).to_dense(), once)


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("H", [1, 2])
@pytest.mark.parametrize("fit", SUMS, ids=repr)
def test_units_do_not_matter(fit, T, H):
    """Gradients of 1e-12, as late in training, or inputs in small units: the same relative errors in float32."""
    parts = [random_samples(n, T, H=H, seed=n) for n in (40, 600)]
    rows = [torch.cat([gradients_of(part)[h].flatten(1) for part in parts]) for h in range(H)]
    truth = torch.block_diag(*(row.mT @ row for row in rows)) / 640
    errors, reported = [], []
    for inputs, gradients in ((1, 1), (1, 1e-12), (1e-10, 1e-5), (1e-5, 1e10), (1, 1e9)):
        scaled = [
            samples_of((part.activations.dense() * inputs).float(), (part.gradients * gradients).float())
            for part in parts
        ]
        operator, last, _ = fitted(fit, *scaled)
        errors.append(float((operator.to_dense().double() / (inputs * gradients) ** 2 / 640 - truth).norm()))
        reported.append(fit.error(last, fit.finish(last)))
    errors = [error / float(truth.norm()) for error in errors]
    assert max(errors) - min(errors) < 2e-3, errors
    if reported[0] is not None:
        assert max(reported) - min(reported) < 2e-3, reported
    else:
        assert reported == [None] * len(reported)


def test_shorter_sums_do_not_depend_on_how_terms_are_split():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(4, 1, n, n, generator=generator, dtype=torch.float64) for n in (3, 5))
    split = torch.tensor([1e12, 1.0, 1e-12, 0.0], dtype=torch.float64)[:, None, None, None]
    right[3] = 0
    B, A, sigma = truncated(left, right, 2)
    other_B, other_A, other = truncated(left * split, right / split.where(split > 0, 1), 2)
    torch.testing.assert_close(other, sigma, rtol=1e-8, atol=1e-12)
    one, two = (torch.einsum("rhij,rhkl->hijkl", *pair) for pair in ((B, A), (other_B, other_A)))
    torch.testing.assert_close(two, one, rtol=1e-8, atol=1e-12)


class Overflow(torch.autograd.Function):
    """Outputs are fine and the gradient is not."""

    @staticmethod
    def forward(context, x, broken):
        context.broken = broken
        return x.clone()

    @staticmethod
    def backward(context, *gradients):
        return gradients[0] * (torch.nan if context.broken else 1), None


class Fragile(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last, self.broken = nn.Linear(4, 6), nn.Linear(6, 3), False

    def forward(self, x):
        return self.last(Overflow.apply(self.first(x).tanh(), self.broken))


FITS = ["kfac", "kfoc", "kfoc-running", "kronecker-sum", "kfac-corrected", "kpsvd", "tkfac"]


@pytest.mark.parametrize("fit", FITS)
def test_statistics_that_are_not_finite_are_left_out_of_the_average(fit):
    """Also where samples wait before they are added up."""
    torch.manual_seed(0)
    model = Fragile()
    preconditioner = kf.Preconditioner(model, kf.Categorical(), fit=fit)
    for broken in (False, True, False):
        model.broken = broken
        outputs = preconditioner(torch.randn(16, 4))
        nn.functional.cross_entropy(outputs, torch.randint(3, (16,))).backward()
        if broken:
            for p in model.parameters():
                p.grad = torch.ones_like(p)
        preconditioner.step()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("n", [20, 1500])
@pytest.mark.parametrize("fit", FITS)
def test_gradients_that_are_not_finite_are_named(fit, n):
    model = Fragile()
    model.broken = True
    with pytest.raises(kf.NumericalError, match=r"first\.weight"):
        kf.estimate(model, torch.randn(n, 4), kf.Categorical(), fit=named(fit))
