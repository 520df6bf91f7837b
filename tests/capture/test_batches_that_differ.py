"""What is learnt from one batch decides no other: sizes of splits and constants may differ from batch to batch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronfisher as kf
from kronfisher.capture.observation import Observation
from kronfisher.errors import UnsupportedError
from tests.helpers.networks import Written

FULL = kf.Full(across_layers=True)


def estimate(model, batches, fit=FULL):
    return kf.estimate(model, batches, kf.Gaussian(), fit=fit, labels="exact")


class Sized(nn.Module):
    """A network whose rows are sorted by sizes that arrive with the data."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.l, self.o = kind, nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x):
        sizes = x[0, :, 2].long().tolist() if x.dim() == 3 else None
        rows = self.l(x[..., :2]).tanh()
        if self.kind == "split":
            return self.o(torch.stack([p.sum(0) for p in rows.flatten(0, 1).split(sizes)]))
        if self.kind == "slice":
            flat, cut = rows.flatten(0, 1), sizes[0]
            return self.o(torch.stack([flat[:cut].sum(0), flat[cut:].sum(0)]))
        if self.kind == "narrow":
            flat, cut = rows.flatten(0, 1), sizes[0]
            return self.o(torch.stack([flat.narrow(0, 0, cut).sum(0), flat.narrow(0, cut, 4 - cut).sum(0)]))
        if self.kind == "roll":
            return self.o(rows.flatten(0, 1).roll(sizes[0], 0).unflatten(0, (2, 2)).sum(1))
        matrix = torch.zeros(2, 4, dtype=x.dtype)  # the rows of each example, as a matrix
        matrix[0, : sizes[0]] = matrix[1, sizes[0] :] = 1
        return self.o(matrix @ rows.flatten(0, 1))


def sized(cut):
    x = torch.randn(2, 2, 3)
    x[0, :, 2] = torch.tensor([cut, 4 - cut])
    return x


@pytest.mark.parametrize("kind", ["split", "slice", "narrow", "roll", "matrix"])
@pytest.mark.parametrize("cuts", [(2, 1), (1, 3)])
def test_sizes_that_differ(kind, cuts):
    model = Sized(kind)
    batches = [sized(cut) for cut in cuts]

    def truth(some):
        total, count = 0, 0
        for x in some:
            outputs = model(x)
            for row in outputs:
                for out in row:
                    grads = torch.autograd.grad(out, list(model.parameters()), retain_graph=True)
                    g = torch.cat([grad.flatten() for grad in grads])
                    total = total + g[:, None] * g
            count += len(outputs)
        return total / count

    estimates = 0
    for some in (batches, batches[::-1], batches[:1], batches[1:]):
        try:
            dense = estimate(model, some).to_dense()
        except UnsupportedError as error:  # rows that cannot be sorted came second
            assert len(some) == 2 and "put a batch like this one first" in str(error)
            continue
        torch.testing.assert_close(dense, truth(some))
        estimates += 1
    assert estimates >= 3


@pytest.mark.parametrize("fit", ["kfac", "full"])
def test_a_constant_that_mixes_rows_later_is_refused(fit):
    model = Written(lambda m, x: m.o(m.a @ m.l(x).tanh()), l=nn.Linear(2, 3), o=nn.Linear(3, 2))
    x = torch.randn(4, 2)
    model.a = torch.eye(4)
    estimate(model, [x], fit)
    model.a = torch.ones(4, 4)
    with pytest.raises(UnsupportedError):
        estimate(model, [x], fit)


@pytest.mark.parametrize("kind", ["perceptron", "convolution", "attention"])
def test_equal_batches_are_examined_once(kind, monkeypatch):
    if kind == "perceptron":
        model, shape = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (5, 3)
    elif kind == "convolution":
        model, shape = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)), (5, 2, 4, 4)
    else:
        model = Written(
            lambda m, x: m.o(F.softmax(m.q(x) @ m.k(x).mT, -1) @ m.v(x)).sum(1),
            q=nn.Linear(3, 4), k=nn.Linear(3, 4), v=nn.Linear(3, 4), o=nn.Linear(4, 2),
        )  # fmt: skip
        shape = (5, 4, 3)
    probes, examine = [], Observation.examples_of_rows
    monkeypatch.setattr(Observation, "examples_of_rows", lambda o, uses: probes.append(len(o)) or examine(o, uses))
    estimate(model, [torch.randn(n, *shape[1:]) for n in (5, 5, 3, 5, 3)], "kfoc")
    assert len(probes) <= 2
