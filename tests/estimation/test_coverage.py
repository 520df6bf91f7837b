"""What coverage says is what an estimate does: the same treatments, and refusals where it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronfisher as kf
from tests.helpers.networks import Written

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


def test_the_table():
    model = nn.Sequential(nn.Linear(3, 4), Bent(), nn.LayerNorm(4), nn.Linear(4, 2), nn.Linear(2, 2))
    model[4].requires_grad_(False)
    coverage = kf.coverage(model, X, fit={"3.bias": "diagonal", "*": "kfac"})
    assert [row.treatment for row in coverage.rows] == [
        "KFAC(mode='expand')", "KFAC(mode='expand')", "fallback: Diagonal()", "KFAC(mode='expand')",
        "KFAC(mode='expand')", "KFAC(mode='expand')", "Diagonal()",
    ]  # fmt: skip
    assert [row.operators for row in coverage.rows][1:4] == [("linear",), ("addcmul",), ("layer_norm",)]
    assert coverage.frozen == 6 and not coverage.complete
    assert coverage.share == pytest.approx(34 / 35)
    lines = str(coverage).splitlines()
    assert lines[0] == "91.4 % by layers, 8.6 % diagonal (35 trainable numbers; 6 frozen)"
    assert lines[1].split() == ["parameter", "shape", "share", "used", "by", "treated", "by"]
    assert lines[5].split() == ["1.slope", "1", "2.9", "%", "addcmul", "fallback:", "Diagonal()"]
    assert lines[-1] == "1.slope: used by addcmul"


def test_one_line_for_one_reason():
    """Forty parameters that are used in one way make one line, in the coverage and in both reports."""
    model = Written(
        lambda m, x: sum(torch.addcmul(x, x, p) for p in m.scales) + m.l(x),
        l=nn.Linear(3, 3), scales=nn.ParameterList(torch.randn(3) for _ in range(40)),
    )  # fmt: skip
    coverage = kf.coverage(model, X)
    fisher = kf.estimate(model, X, kf.Gaussian())
    assert fisher.report().coverage == "9.1 % by layers, 90.9 % diagonal"
    assert str(fisher.report()).splitlines()[0] == fisher.report().coverage
    assert str(coverage).splitlines()[0] == "9.1 % by layers, 90.9 % diagonal (132 trainable numbers)"
    optimizer = kf.NaturalGradient(model, kf.Gaussian())
    with pytest.warns(kf.NumericalWarning, match="91% of the parameters are outside every fit .* and 37 more"):
        optimizer.step(lambda: model(X), torch.zeros(5, 3))
    for text in (coverage, fisher.report(), optimizer.report()):
        lines = [line for line in str(text).splitlines() if "used by addcmul" in line]
        assert len(lines) == 1 and "and 37 more: " in lines[0]


class Bent(nn.Module):
    """A slope used in a way that nobody knows."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return torch.addcmul(x, x, self.slope)


def test_no_state_is_made_and_nothing_is_big(monkeypatch):
    monkeypatch.setattr(kf.Full, "init", lambda *a: pytest.fail("a matrix was made"))
    wide = nn.Sequential(nn.Linear(3, 2000), nn.Linear(2000, 2))
    assert kf.coverage(wide, X, fit="full").complete


@pytest.mark.parametrize("data", [X, (X, torch.zeros(5)), [X, "never read"], ({"input": X}, None), iter([X])])
def test_forms_of_data(data):
    assert kf.coverage(nn.Linear(3, 2), data).complete


def test_forward():
    found = kf.coverage(nn.Linear(3, 2), {"x": X, "n": 3}, forward=lambda model, batch: (model(batch["x"]), None))
    assert found.complete and found.share == 1


def tied():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    return nn.Sequential(first, second)


SUSPECTS = {
    "fine": lambda: nn.Linear(3, 2),
    "unused": lambda: Written(lambda m, x: m.a(x), a=nn.Linear(3, 2), b=nn.Linear(3, 2)),
    "twice with other biases": tied,
    "in two roles": lambda: Written(lambda m, x: F.linear(F.linear(x, m.w), m.w.t()), w=torch.randn(2, 3)),
    "in part": lambda: Written(lambda m, x: F.linear(x, m.w[:2]) + m.b, w=torch.randn(4, 3), b=torch.randn(2)),
    "by another operator too": lambda: Written(
        lambda m, x: F.linear(x, m.w) + torch.linalg.multi_dot((x, m.w.t())), w=torch.randn(2, 3)
    ),
    "as an input": lambda: Written(lambda m, x: m.l(x) + m.l(m.t.expand(5, 3)), l=nn.Linear(3, 2), t=torch.randn(1, 3)),
    "before the data": lambda: Written(lambda m, x: x * (m.g * torch.ones(4, 3)).mean(0), g=torch.randn(3)),
    "normalised as a whole": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2), dim=None),
    "expanded": lambda: Written(lambda m, x: F.linear(x, m.w.expand(2, 3)), w=torch.randn(1, 3)),
}


@pytest.mark.parametrize("fit", ["full", "kfac", "diagonal"])
@pytest.mark.parametrize("name", SUSPECTS)
def test_coverage_and_estimate_agree(name, fit):
    model = SUSPECTS[name]()
    coverage = kf.coverage(model, X, fit=fit)
    fallen = [row for row in coverage.rows if row.treatment.startswith("fallback: ")]
    known = {"fine", "unused", "twice with other biases", "in part", "as an input"} | (
        {"in two roles"} if fit == "kfac" else set()
    )
    assert (not fallen) == coverage.complete == (name in known)
    assert coverage.share == pytest.approx(1 - sum(row.numel for row in fallen) / sum(r.numel for r in coverage.rows))
    fisher = kf.estimate(model, X, kf.Gaussian(), fit=fit)
    methods = {block: info.method for block, info in fisher.info.blocks.items()}
    for row in coverage.rows:
        used = float(fisher.diagonal()[row.parameter].abs().sum()) > 0
        assert used == (row.treatment != "unused")
        assert not row.reason or methods[row.parameter] == row.treatment
    if not fallen:
        kf.estimate(model, X, kf.Gaussian(), fit=fit, strict=True)
        return
    with pytest.raises(kf.UnsupportedError) as caught:
        kf.estimate(model, X, kf.Gaussian(), fit=fit, strict=True)
    for row in fallen:
        assert row.operators and row.reason in str(caught.value)


COUPLED = {
    "centred": lambda: Written(lambda m, x: m.l1(m.l0(x) - m.l0(x).mean(0)), l0=nn.Linear(3, 3), l1=nn.Linear(3, 2)),
    "for each datum": lambda: Written(lambda m, x: m.l(x) + m.p, l=nn.Linear(3, 2), p=torch.randn(5, 2)),
    "below what is not known": lambda: Written(
        lambda m, x: (lambda h: h - h.mean(0))(torch.addcmul(x, x, m.s)), s=torch.ones(3)
    ),
}


@pytest.mark.parametrize("fit", ["full", "kfac", "diagonal"])
@pytest.mark.parametrize("name", COUPLED)
def test_coupled_data_are_refused(name, fit):
    model = COUPLED[name]()
    for run in (lambda: kf.coverage(model, X, fit=fit), lambda: kf.estimate(model, X, kf.Gaussian(), fit=fit)):
        with pytest.raises(kf.UnsupportedError, match="several examples"):
            run()


def test_what_cannot_be_treated_at_all_is_raised():
    for model, message in (
        (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), "train mode"),
        (Written(lambda m, x: m.l(x).detach(), l=nn.Linear(3, 2)), "depend on no trainable parameter"),
    ):
        with pytest.raises(kf.UnsupportedError, match=message):
            kf.coverage(model, X)
    with pytest.raises(kf.DataError, match="no batch"):
        kf.coverage(nn.Linear(3, 2), [])
    with pytest.raises(ValueError, match="no pattern matches bias"):
        kf.coverage(nn.Linear(3, 2), X, fit={"weight": "kfac"})
    with pytest.raises(RuntimeError) as caught:
        kf.coverage(nn.Linear(4, 2), X)
    assert "in the batch (torch.float32 [5, 3])" in caught.value.__notes__[0]
