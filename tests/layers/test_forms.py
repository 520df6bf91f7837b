"""However one writes an operation, every fit says the same of it, or refuses; it never says something else."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronfisher as kf
from tests.helpers.truth import kept


class Written(nn.Module):
    def __init__(self, function, **parameters):
        super().__init__()
        self.function = function
        for name, p in parameters.items():
            self.register_parameter(name, nn.Parameter(p))

    def forward(self, x):
        return self.function(self, x).tanh().flatten(1)


# The first of each list is what the others have to agree with.
PRODUCT = [
    lambda m, x: F.linear(x, m.w),
    lambda m, x: F.linear(input=x, weight=m.w, bias=None),
    lambda m, x: x @ m.w.t(),
    lambda m, x: torch.matmul(x, m.w.T),
    lambda m, x: torch.mm(x, m.w.mT),
    lambda m, x: x.mm(m.w.t()),
    lambda m, x: x.matmul(m.w.transpose(0, 1)),
    lambda m, x: (m.w @ x.t()).t(),
    lambda m, x: m.w.mm(x.t()).t(),
    lambda m, x: torch.matmul(m.w, x[..., None])[..., 0],
    lambda m, x: F.conv1d(x[..., None], m.w[..., None])[..., 0],
    lambda m, x: F.conv2d(x[..., None, None], m.w[..., None, None]).flatten(1),
    lambda m, x: torch.addmm(x.new_ones(4), x, m.w.t()) - 1,
    lambda m, x: x.new_ones(1).addmm(x, m.w.t()) - 1,
    lambda m, x: F.linear(x, m.w[:2]).new_zeros(()) + F.linear(x, m.w),
]
AFFINE = [
    lambda m, x: F.linear(x, m.w, m.b),
    lambda m, x: torch.addmm(m.b, x, m.w.t()),
    lambda m, x: torch.addmm(input=m.b, mat1=x, mat2=m.w.t(), beta=1, alpha=1),
    lambda m, x: m.b.addmm(x, m.w.t()),
    lambda m, x: F.conv1d(x[..., None], m.w[..., None], m.b)[..., 0],
    lambda m, x: F.conv1d(input=x[:, :, None], weight=m.w[..., None], bias=m.b, stride=(1,), padding="valid")[..., 0],
]
SCALE = [
    lambda m, x: x * m.p,
    lambda m, x: m.p * x,
    lambda m, x: torch.mul(x, m.p),
    lambda m, x: torch.mul(m.p, x),
    lambda m, x: torch.multiply(x, other=m.p),
    lambda m, x: m.p.mul(x),
    lambda m, x: x.clone().mul_(m.p),
    lambda m, x: x.__rmul__(m.p),
    lambda m, x: x * m.p[None],
    lambda m, x: x * m.p.view(1, 3).expand(len(x), 3),
]
SHIFT = [
    lambda m, x: x - m.p,
    lambda m, x: -(m.p - x),
    lambda m, x: torch.sub(x, m.p, alpha=1),
    lambda m, x: x.clone().sub_(m.p),
    lambda m, x: -m.p.sub(x),
    lambda m, x: (-x + m.p).neg(),
    lambda m, x: torch.add(-x, other=m.p).neg(),
    lambda m, x: m.p.add(-x).neg(),
    lambda m, x: (-x).add_(m.p).neg(),
]
GROUPS = {"product": PRODUCT, "affine": AFFINE, "scale": SCALE, "shift": SHIFT}
ALIKE = [pytest.param(name, k, id=f"{name}-{k}") for name, group in GROUPS.items() for k in range(1, len(group))]


def model(group, function):
    torch.manual_seed(1)
    if group in ("scale", "shift"):
        return Written(function, p=torch.randn(3).double())
    own = {"w": torch.randn(4, 3).double()} | ({"b": torch.randn(4).double()} if group == "affine" else {})
    return Written(function, **own)


def estimate(written, fit, x=None, **options):
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(2)).double() if x is None else x
    return kf.estimate(written, x, kf.Gaussian(0.5), fit=fit, labels="exact", **options)


# One of every kind: what forms share is decided before any fit sees them.
SEVERAL = ("diagonal", "full", "kfac", "kfac-reduce", "kfoc", "ekfac", "kronecker-sum")


@pytest.mark.parametrize("fit", SEVERAL)
@pytest.mark.parametrize(("group", "number"), ALIKE)
def test_forms_agree(group, number, fit):
    first, other = (estimate(model(group, GROUPS[group][k]), fit, strict=True).to_dense() for k in (0, number))
    assert first.norm() > 0.01
    assert (other - first).norm() < 1e-12 * first.norm()


# May be left to the fallback, must not be wrong: what each is, and how it is written.
ODD = {
    "reversed product": (lambda m, x: x @ m.w, lambda m, x: m.w.__rmatmul__(x)),
    "product by keyword": (lambda m, x: x @ m.w, lambda m, x: torch.mm(x, mat2=m.w)),
    "einsum": (lambda m, x: x @ m.w, lambda m, x: torch.einsum("ni,io->no", x, m.w)),
    "tensordot": (lambda m, x: x @ m.w, lambda m, x: torch.tensordot(x, m.w, 1)),
    "addmm with factors": (
        lambda m, x: 0.5 * (x @ m.w) + 2,
        lambda m, x: torch.addmm(x, x, m.w, beta=0, alpha=0.5) + 2,
    ),
    "scaled weight": (lambda m, x: 3 * (x @ m.w), lambda m, x: x @ (3 * m.w)),
    "weight squared": (lambda m, x: (x @ m.w) @ m.w.detach(), lambda m, x: x @ (m.w @ m.w.detach())),
    "symmetric": (lambda m, x: x @ m.w + x @ m.w.t().detach(), lambda m, x: x @ (m.w + m.w.t().detach())),
    "add with a factor": (lambda m, x: x + m.w[0] + m.w[0], lambda m, x: torch.add(x, m.w[0], alpha=2)),
    "subtract": (lambda m, x: x @ m.w, lambda m, x: torch.subtract(x @ m.w, 0 * m.w)),
    "reversed subtraction": (lambda m, x: m.w[0] - x, lambda m, x: torch.rsub(x, m.w[0])),
    "division": (lambda m, x: x / m.w[0].clone(), lambda m, x: torch.div(x, m.w[0])),
    "row vector": (lambda m, x: x @ m.w[:, :1], lambda m, x: F.linear(x, m.w[:, 0])[:, None]),
    "matrix vector": (lambda m, x: x @ m.w[:, :1], lambda m, x: (x @ m.w[:, 0])[:, None]),
    "bmm": (lambda m, x: x @ m.w, lambda m, x: torch.bmm(x[:, None], m.w.expand(len(x), -1, -1))[:, 0]),
    "lookup": (lambda m, x: m.w[:1] * x, lambda m, x: m.w[torch.zeros(len(x), dtype=torch.long)] * x),
    "concatenated": (  # each piece is a layer
        lambda m, x: x[:, :2] @ m.w[:2] + x[:, 2:] @ m.w[2:],
        lambda m, x: x @ torch.cat([m.w[:2], m.w[2:]]),
    ),
    "masked": (lambda m, x: x @ m.w, lambda m, x: x @ torch.where(m.w > 0, m.w, m.w)),
    "linear of linear": (lambda m, x: (x @ m.w) @ m.w.t(), lambda m, x: F.linear(x, F.linear(m.w, m.w))),
    "weight in both roles": (lambda m, x: F.linear(x, m.w), lambda m, x: F.linear(m.w, x).t()),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("fit", [*SEVERAL, "across"])
def test_odd_forms_are_right(name, fit):
    """Square matrices and as many data as features: nothing fails by its shape."""
    meaning, written = ODD[name]
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(3)).double()
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(4)).double()
    one, two = Written(meaning, w=weight), Written(written, w=weight)
    torch.testing.assert_close(one(x), two(x), rtol=0, atol=1e-12)
    fisher = estimate(two, kf.Full(across_layers=True) if fit == "across" else fit, x)
    found, alone = (
        fisher.to_dense(),
        any(block.method.startswith("fallback: ") for block in fisher.info.blocks.values()),
    )
    if alone and fit != "across":
        with pytest.raises(kf.UnsupportedError, match="w"):
            estimate(two, fit, x, strict=True)
    if fit in ("across", "diagonal", "full") or alone:
        J = torch.func.vmap(
            torch.func.jacrev(lambda w, x: torch.func.functional_call(two, {"w": w}, (x[None],))[0]), (None, 0)
        )
        rows = J(weight, x).flatten(2)
        truth = 2 * torch.einsum("kcp,kcq->pq", rows, rows) / len(x)
        if fit == "full":
            truth = truth * kept(fisher)
        elif fit != "across":
            truth = truth.diagonal().diag()
    else:
        truth = estimate(one, fit, x, strict=True).to_dense()
    assert (found - truth).norm() < 1e-10 * truth.norm()
