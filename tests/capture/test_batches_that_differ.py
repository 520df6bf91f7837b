"""What is learnt from one batch decides no other: sizes of splits and constants may differ from batch to batch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronfisher as kf
from kronfisher.capture import memory, row_orders
from kronfisher.capture.observation import Observation
from kronfisher.errors import UnsupportedError
from tests.helpers.drawn.batches import MEETING, Settings
from tests.helpers.drawn.outcome import truth
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
    x = torch.randn(2, 2, 3, dtype=torch.float64)
    x[0, :, 2] = torch.tensor([cut, 4 - cut])
    return x


@pytest.mark.parametrize("kind", ["split", "slice", "narrow", "roll", "matrix"])
@pytest.mark.parametrize("cuts", [(2, 1), (1, 3)])
def test_sizes_that_differ(kind, cuts):
    model = Sized(kind).double()
    batches = [sized(cut) for cut in cuts]

    for some in (batches, batches[::-1], batches[:1], batches[1:]):
        torch.testing.assert_close(estimate(model, [(x,) for x in some]).to_dense(), truth(model, some))
    for some in (batches, batches[::-1]):  # read once: what was sorted in equal numbers, and what was not, meet
        torch.testing.assert_close(estimate(model, iter(some)).to_dense(), truth(model, some))


@pytest.mark.parametrize("fit", ["kfac", "full"])
def test_a_constant_that_mixes_rows_later_is_refused(fit):
    model = Written(lambda m, x: m.o(m.a @ m.l(x).tanh()), l=nn.Linear(2, 3), o=nn.Linear(3, 2))
    x = torch.randn(4, 2)
    model.a = torch.eye(4)
    estimate(model, [x], fit)
    model.a = torch.ones(4, 4)
    with pytest.raises(UnsupportedError):
        estimate(model, [x], fit)


def in_turn(first, second):
    """Every pair of a value of each; one for each of the first is tried by default, the others are slow."""
    for place, one in enumerate(first):
        for number, other in enumerate(second):
            usual = number == place % len(second)
            yield pytest.param(one, other, marks=() if usual else pytest.mark.slow, id=f"{other}-{one}")


@pytest.mark.parametrize(("way", "opened"), [*in_turn(MEETING, ["ones", "rolled", "starts rolled"])])
def test_paths_that_are_closed_in_one_batch(way, opened):
    """Whatever came before, a batch is estimated as by a new model: refused, or right."""
    path, closed = MEETING[way], Settings.closed(4)
    if opened == "starts rolled":
        closed = closed.combined(torch.eye(4).roll(1, 0))
    opened = closed.combined(torch.ones(4, 4) if opened == "ones" else torch.eye(4).roll(-1, 0))

    def network():
        torch.manual_seed(1)
        return Written(lambda m, x, s: m.o(path(m.l(x).tanh(), s)), l=nn.Linear(2, 4), o=nn.Linear(4, 2))

    def tried(model, batches, fit):
        forward = lambda model, batch: (model(*batch), None)  # noqa: E731
        try:
            return kf.estimate(model, batches, kf.Gaussian(), fit=fit, labels="exact", forward=forward).to_dense()
        except UnsupportedError:
            return None

    batches, model = [(torch.randn(4, 2), each) for each in (closed, opened)], network()
    for fit in ("kfac", FULL):
        alone = [tried(network(), [batch], fit) for batch in batches]
        for some in (batches, batches[::-1], batches[:1], batches[1:]):
            found = tried(model, some, fit)
            if len(some) == 1:
                (expected,) = [a for a, b in zip(alone, batches, strict=True) if b is some[0]]
                assert (found is None) == (expected is None)
                if expected is not None:
                    torch.testing.assert_close(found, expected)
            elif any(a is None for a in alone):
                assert found is None
            elif fit != "kfac" and found is not None:
                torch.testing.assert_close(found, (alone[0] + alone[1]) / 2 * kept_by(found))


def kept_by(found):
    return torch.ones_like(found) if found.count_nonzero() > len(found) else torch.eye(len(found))


def test_a_weight_of_zero_that_changes_between_estimates():
    model = Written(lambda m, x: m.o(m.l(x) + m.s * F.normalize(m.l(x), dim=0)), l=nn.Linear(2, 3), o=nn.Linear(3, 2))
    model.register_parameter("s", nn.Parameter(torch.zeros(()), requires_grad=False))
    x = torch.randn(4, 2)
    estimate(model, [x])
    model.s.data.fill_(1.0)
    with pytest.raises(UnsupportedError, match="mixes several examples"):
        estimate(model, [x])


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(memory, "_ROOM", 4)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    estimate(model, [torch.randn(n, 3) for n in range(2, 12)], "kfoc")
    assert len(row_orders._RULES[model]) == 4


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


JOINED = {
    "rows": lambda m, x: torch.cat([m.p[:1], m.p[1:2], m.p[2:]]) * x.exp(),
    "rows in another order": lambda m, x: torch.cat([m.p[2:], m.p[:2]]) + x.sin(),
    "between data": lambda m, x: torch.cat([m.p[:1], x[:1], m.p[1:2]]).tanh() * x.exp(),
    "stacked": lambda m, x: torch.stack([m.p[0], m.p[2], m.p[0]]) * x,
    "repeated": lambda m, x: torch.cat([m.p[:1].expand(2, 4), m.p[:1]]) + x.sin(),
}


@pytest.mark.parametrize("way", JOINED)
def test_pieces_of_a_table_that_are_joined_have_rows_of_their_own(way, double):
    """Several uses of one block in one call: what one's rows were found to be says nothing of the others."""
    model = Written(lambda m, x: m.o(JOINED[way](m, x)).tanh(), p=torch.randn(3, 4), o=nn.Linear(4, 2))
    x = [(torch.randn(3, 4),) for _ in range(2)]
    for batches in (x, x[::-1], x[:1]):  # by what the estimates before found, too
        true = truth(model, [batch for (batch,) in batches])
        assert (estimate(model, batches).to_dense() - true).norm() < 1e-10 * true.norm()
        own = estimate(model, batches, "full")
        assert own.error(batches).relative < 1e-7
