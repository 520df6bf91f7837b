"""Sketches of the exact matrix: right on average, or below it, and no further away than they say."""

import re

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.fits.sketches import Drawn, Projected
from kronfisher.operators.rows import OuterRows, PlainRows, Rows
from tests.helpers.close import close


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def data(n=40):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(1)).double() * torch.logspace(-1, 1, n)[:, None]


def estimate(model, batches, **settings):
    return kf.estimate(model, batches, kf.Gaussian(), fit=kf.Gram(**settings), labels="exact")


def stated(fisher):
    (info,) = fisher.info.blocks.values()
    return info.notes, float(re.search(r"[\d.e+-]+$", info.notes)[0])


def test_rows_drawn_are_right_on_average_and_say_how_far_they_are():
    generator = torch.Generator().manual_seed(0)
    a, g, wide = (torch.randn(n, d, generator=generator).double() for n, d in ((30, 3), (60, 2), (60, 4)))
    g *= torch.logspace(-1, 0.5, 60)[:, None]
    examples = torch.arange(60) % 30
    J = Rows((OuterRows(a, g, examples), PlainRows(wide))).dense()
    F, total, squares, claimed = J.mT @ J, 0.0, 0.0, 0.0
    for seed in range(400):
        order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
        state = Drawn((), kf.Gram().plan((), 8), most=20)
        for part in order.split(23):
            state.add_(Rows((OuterRows(a, g[part], examples[part]), PlainRows(wide[part]))))
        rows = state.rows_for_all().dense()
        assert len(rows) == 20
        X = rows.mT @ rows
        total, squares = total + X / 400, squares + float((X - F).square().sum()) / 400
        claimed += state.squared_error() / 400
    assert float((total - F).norm()) < 2 * (squares / 400) ** 0.5  # what 400 draws leave
    assert abs(claimed / squares - 1) < 0.2


@pytest.mark.parametrize("sketch", ["rows", "nystrom"])
def test_a_sketch_that_leaves_nothing_out_is_exact(sketch):
    model, x = network(), data()
    exact = estimate(model, x)
    found = estimate(model, list(x.split(7)), max_rows=80, sketch=sketch)
    close(found.to_dense(), exact.to_dense(), 1e-8)
    assert stated(found)[1] < 1e-7
    v = torch.randn(exact.dim, dtype=torch.float64)
    close((found + 0.1).solve(v), (exact + 0.1).solve(v), 1e-7)


def test_nystrom_is_below_the_matrix_and_within_its_bound():
    model, x = network(), data()
    F = estimate(model, x).to_dense()
    errors = []
    for rank in (3, 6, 12):
        found = estimate(model, list(x.split(9)), max_rows=rank, sketch="nystrom")
        note, bound = stated(found)
        rest = torch.linalg.eigvalsh(F - found.to_dense())
        assert float(rest[0]) > -1e-9 * float(F.norm())
        errors.append(float((F - found.to_dense()).norm() / F.norm()))
        assert errors[-1] <= 1.1 * bound and f"rank {rank}" in note
        close(torch.tensor(bound).double() * found.to_dense().norm(), rest.sum(), 0.06)  # as it is printed
    assert errors[2] < errors[1] < errors[0]


def test_rows_of_an_estimate_are_within_three_times_what_is_stated():
    model, x = network(), data(200)
    F, found = estimate(model, x).to_dense(), estimate(model, list(x.split(50)), max_rows=100, sketch="rows")
    note, error = stated(found)
    assert "100 of 400 rows" in note and 0.01 < error < 1
    assert float((F - found.to_dense()).norm() / F.norm()) < 3 * error


@pytest.mark.parametrize("sketch", ["rows", "nystrom"])
def test_parts_and_copies_are_what_one_state_is(sketch):
    """Parts of Nyström's sums add up; draws of parts join to a draw of all. A state that is saved goes on alike."""
    fit, generator = kf.Gram(max_rows=10, sketch=sketch), torch.Generator().manual_seed(0)
    J = torch.randn(60, 8, generator=generator).double()
    kind = Drawn if sketch == "rows" else Projected

    def fresh():
        if sketch == "rows":
            return Drawn((), fit.plan((), 8), most=10)
        zero = torch.zeros(8, 8).double()
        return Projected((), fit.plan((), 8), test=Projected.vectors(8, 10, J), products=zero, squares=zero.sum())

    def rows(state):
        return state.rows_for_all().dense() if sketch == "rows" else state.low_rank()

    x, y = fresh(), fresh()
    x.add_(Rows((PlainRows(J[:25]),)))
    y.add_(Rows((PlainRows(J[25:]),)))
    both = fit.combine(x, y, 2.0, 0.5)
    found, truth = rows(both).mT @ rows(both), 2 * J[:25].mT @ J[:25] + 0.5 * J[25:].mT @ J[25:]
    if sketch == "nystrom":
        close(found, truth, 1e-8)
    else:
        assert len(rows(both)) == 10 and both.seen == 60
        assert float((found - truth).norm()) < 3 * both.squared_error() ** 0.5
    again = kind.from_dict(x.to_dict(), ())
    for state in (x, again):
        state.add_(Rows((PlainRows(J[25:]),)))
    assert torch.equal(rows(x), rows(again))


def test_settings_that_make_no_sense():
    for settings in ({"sketch": "rows"}, {"sketch": "other", "max_rows": 3}):
        with pytest.raises(ValueError, match="sketch="):
            kf.Gram(**settings)
