"""Every registered fit of every registered use under every registered likelihood, against dense truth.

What is registered later enters by itself. A fit whose formula is known here is compared with it, number by number;
every fit is held to what all of them promise: its error is the one it says, the same call gives the same bits, batches
and their order do not matter, sums are N means.
"""

from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import kronfisher as kf
import kronfisher.estimation.error as error_module
from kronfisher.fisher.blocks import Block
from kronfisher.fisher.layout import gather
from kronfisher.fits import FITS, resolve
from kronfisher.likelihoods import REGISTRY
from kronfisher.operators import Eigen, KroneckerBasis
from kronfisher.operators.factors import Factor
from tests.conformance.examples import EXAMPLES
from tests.conformance.problems import DRAWS, SEED, Problem, problem
from tests.conformance.taps import Tap
from tests.helpers.close import close
from tests.helpers.pairs import missing_pairs
from tests.helpers.truth import positions

LABELS = ("exact", "observed", "sampled")
# Where the likelihood matters little, uses and fits meet a weighted, a masked and a Gaussian one in turn.
FEW = ("categorical-weighted", "categorical-sequence", "gaussian-variances")

examples = pytest.mark.parametrize("example", EXAMPLES)
fits = pytest.mark.parametrize("fit", FITS)
# Auto makes six fits of every block: a third of the uses are enough.
SOME = {"auto": list(EXAMPLES)[1::3]}
# Where eigenvalues of K-FAC's sides agree, the eigenvectors are anybody's choice, and EKFAC's eigenvalues with them.
UNDEFINED = {("attention, more keys", "ekfac")}


class Turn(NamedTuple):
    """A use, a fit, and the likelihood and the kind of labels that both meet together."""

    example: str
    fit: str
    likelihood: str
    labels: str

    @property
    def problem(self) -> Problem:
        return problem(self.example, self.likelihood)


# Every use meets every fit; every two of use, fit, likelihood and labels meet, and all fits meet every two of the rest.
TURNS = [
    Turn(example, fit, FEW[(i + j) % len(FEW)], LABELS[(i // len(FEW) + j) % len(LABELS)])
    for j, fit in enumerate(FITS)
    for i, example in enumerate(SOME.get(fit, EXAMPLES))
    if (example, fit) not in UNDEFINED
]
# The tests of one turn run one after the other and share estimates: hence the scope, and the same places in both lists.
TURNS.sort(key=lambda turn: resolve(turn.fit).by_batch)
turns = pytest.mark.parametrize("turn", TURNS, ids="-".join, scope="module")
# What sums, order and repetition do to a fit hardly depends on the use. By default each turn meets one of the three,
# and all fits, and all uses, meet all three.
ONE_OF_THREE = ("sum", "bits", "order")


def by_turns(what: str) -> pytest.MarkDecorator:
    """All turns, of which a third is tried by default, the others are slow."""
    marks = [() if usual(turn) == what else pytest.mark.slow for turn in TURNS]
    values = [pytest.param(turn, marks=mark) for turn, mark in zip(TURNS, marks, strict=True)]
    return pytest.mark.parametrize("turn", values, ids="-".join, scope="module")


def usual(turn: Turn) -> str:
    """Which of the three a turn meets by default."""
    place = list(EXAMPLES).index(turn.example) + list(EXAMPLES).index(turn.example) // 3 + list(FITS).index(turn.fit)
    return ONE_OF_THREE[place % 3]


BATCHED = [turn for turn in TURNS if not resolve(turn.fit).by_batch]
free_of_batches = pytest.mark.parametrize("turn", BATCHED, ids="-".join, scope="module")


@pytest.mark.parametrize("some", [TURNS, BATCHED], ids=["turns", "free of batches"])
def test_every_two_choices_meet_in_some_turn(some):
    present = [fit for fit in FITS if some is TURNS or not resolve(fit).by_batch]
    missing = {(e, f) for f, those in SOME.items() for e in EXAMPLES if e not in those} | UNDEFINED
    assert missing_pairs(some, EXAMPLES, present, FEW, LABELS) <= missing
    assert {turn[1:] for turn in some} == set(product(present, FEW, LABELS))


def test_every_two_choices_meet_by_default():
    some = [(usual(turn), *turn[1:]) for turn in TURNS]
    assert not missing_pairs(some, ONE_OF_THREE, FITS, FEW, LABELS)
    uses = [(usual(turn), turn.example) for turn in TURNS]
    assert not missing_pairs(uses, ONE_OF_THREE, EXAMPLES)


def estimate(p: Problem, fit, labels: str = "exact", data=None, **options) -> kf.Fisher:
    options = {"samples": DRAWS, "seed": SEED, **options}
    return kf.estimate(p.model, p.batch if data is None else data, p.likelihood, fit=fit, labels=labels, **options)


@lru_cache(maxsize=4)
def whole(turn: Turn, labels: str = "exact") -> kf.Fisher:
    """The estimate from all data in one batch, made once for the tests of one turn."""
    return estimate(turn.problem, turn.fit, labels)


@lru_cache(maxsize=2)
def error(turn: Turn) -> Any:
    """The error of the estimate with exact labels."""
    return whole(turn).error(turn.problem.batch)


@examples
@pytest.mark.parametrize("likelihood", REGISTRY)
def test_full_across_layers_is_the_truth(example, likelihood):
    p = problem(example, likelihood)
    for labels in LABELS:
        fisher = estimate(p, kf.Full(across_layers=True), labels)
        close(fisher.to_dense(), p.truth(labels), what=labels)
        assert fisher.count == p.count and fisher.labels == labels


def kept(p: Problem, positions: int) -> Tensor:
    """Which positions of a layer count, ``[N, T]``: one by one if there are as many as outputs, else by datum."""
    mask = p.counted
    return (mask if mask.shape[1] == positions else mask.any(1, keepdim=True).expand(-1, positions)).double()


def factors(p: Problem, a: Tensor, g: Tensor, reduce: bool) -> tuple[Tensor, Tensor]:
    """K-FAC's A ``[H, I, I]`` and B ``[H, O, O]`` by the formula."""
    keep = kept(p, a.shape[2])
    if reduce:
        lengths = keep.sum(1)
        a = (a * keep[:, :, None]).sum(2, keepdim=True)
        g = g.sum(3, keepdim=True) / lengths.clamp_min(1)[:, None, None]
        keep = (lengths > 0).double()[:, None]
    A = torch.einsum("nt,hnti,hntj->hij", keep, a, a) / keep.sum()
    return A, torch.einsum("vhnto,vhntp->hop", g, g) / p.count


def kronecker(p: Problem, labels: str, reduce: bool) -> Tensor:
    """The whole matrix of K-FAC, ``[P, P]``."""
    dense = torch.zeros_like(p.truth(labels))
    for tap, a, g in p.rows(labels):
        A, B = factors(p, a, g, reduce)
        for h, index in enumerate(tap.index.flatten(1)):
            dense[index[:, None], index] = torch.kron(B[h].contiguous(), A[h].contiguous())
    return dense


def check_kfac(p: Problem, labels: str, fisher: kf.Fisher) -> None:
    close(fisher.to_dense(), kronecker(p, labels, reduce=False), what=labels)


def check_reduce(p: Problem, labels: str, fisher: kf.Fisher) -> None:
    close(fisher.to_dense(), kronecker(p, labels, reduce=True), what=labels)


def check_full(p: Problem, labels: str, fisher: kf.Fisher) -> None:
    truth, mask = p.truth(labels), torch.zeros_like(p.truth(labels))
    for blocks, _ in fisher.entries:
        index = places(p, blocks)
        mask[index[:, None], index] = 1
    for tap, _, _ in p.rows(labels):  # at least what K-FAC treats together
        index = tap.index.flatten()
        assert bool((mask[index[:, None], index] == 1).all())
    close(fisher.to_dense(), truth * mask, what=labels)


def check_diagonal(p: Problem, labels: str, fisher: kf.Fisher) -> None:
    close(fisher.to_dense(), p.truth(labels).diagonal().diag(), what=labels)


def check_ekfac(p: Problem, labels: str, fisher: kf.Fisher) -> None:
    truth = p.truth(labels)
    basis_error = estimate(p, "kfac", labels).error(p.batch)
    error = fisher.error(p.batch)
    for tap, a, g in p.rows(labels):
        operator = fisher[tap.name]
        assert isinstance(operator, Eigen) and isinstance(operator.basis, KroneckerBasis)
        check_eigenvectors(p, tap, a, g, operator.basis)
        B, A = (Factor.of(side).dense().contiguous() for side in (operator.basis.B, operator.basis.A))
        U = torch.block_diag(*(torch.kron(b, a) for b, a in zip(B, A, strict=True)))
        index = tap.index.flatten()
        block = truth[index[:, None], index]
        close(operator.values, (U.T @ block @ U).diagonal(), what=f"{labels}, {tap.name}")
        assert error.blocks[tap.name] <= basis_error.blocks[tap.name] + 1e-10, tap.name


def check_eigenvectors(p: Problem, tap: Tap, a: Tensor, g: Tensor, basis: KroneckerBasis) -> None:
    for side, vectors in zip(factors(p, a, g, reduce=False), (basis.A, basis.B), strict=True):
        vectors = Factor.of(vectors).dense()
        identity = torch.eye(side.shape[-1], dtype=side.dtype).expand_as(side)
        torch.testing.assert_close(vectors.mT @ vectors, identity, rtol=0, atol=1e-12)
        turned = vectors.mT @ side @ vectors
        off = turned - torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1))
        assert off.norm() <= 1e-10 * side.norm(), f"{tap.name}: not the eigenvectors of K-FAC"


def check_tkfac(p: Problem, labels: str, fisher: kf.Fisher) -> None:
    for tap, a, g in p.rows(labels):
        G = torch.einsum("vhnto,hnti->vhnoi", g, a)
        L, R = torch.einsum("vhnoi,vhnpi->hop", G, G), torch.einsum("vhnoi,vhnoj->hij", G, G)
        R = torch.diag_embed(R.diagonal(dim1=1, dim2=2)) if looked_up(fisher, tap) else R
        traces = G.square().sum((0, 2, 3, 4))
        parts = [torch.kron(left, right) / trace for left, right, trace in zip(L, R, traces, strict=True)]
        block = torch.block_diag(*parts) / p.count
        close(fisher[tap.name].to_dense(), block, what=f"{labels}, {tap.name}")
        index = tap.index.flatten()
        trace = p.truth(labels)[index, index].sum()
        assert float(fisher[tap.name].trace() / trace) == pytest.approx(1, abs=1e-10), tap.name


def looked_up(fisher: kf.Fisher, tap: Tap) -> bool:
    """Whether a block's inputs are looked up in a table: their side is kept as its diagonal."""
    blocks = [entry[0] for entry, _ in fisher.entries if len(entry) == 1]
    return any(block.onehot for block in blocks if block.name == tap.name)


def flip_flop(G: Tensor, count: int, fit: kf.KL, diagonal: bool) -> Tensor:
    """KL of one group from its gradients ``[n, O, I]``, by explicit inverses."""
    _, outputs, inputs = G.shape
    A = torch.eye(inputs, dtype=G.dtype)
    B = torch.eye(outputs, dtype=G.dtype)
    for _ in range(fit.iterations):
        inverse, old = torch.linalg.inv(A), A
        shift = fit.damping * inverse.trace() * torch.eye(outputs, dtype=G.dtype)
        B = (torch.einsum("noi,ij,npj->op", G, inverse, G) / count + shift) / inputs
        inverse = torch.linalg.inv(B)
        shift = fit.damping * inverse.trace() * torch.eye(inputs, dtype=G.dtype)
        A = (torch.einsum("noi,op,npj->ij", G, inverse, G) / count + shift) / outputs
        A = A.diagonal().diag() if diagonal else A
        if (A / A.norm() - old / old.norm()).norm() <= fit.tolerance:
            break
    return torch.kron(B.contiguous(), A.contiguous())


def check_kl(p: Problem, labels: str, fisher: kf.Fisher) -> None:
    for tap, a, g in p.rows(labels):
        G = torch.einsum("vhnto,hnti->hvnoi", g, a).flatten(1, 2)
        block = torch.block_diag(*(flip_flop(group, p.count, kf.KL(), looked_up(fisher, tap)) for group in G))
        close(fisher[tap.name].to_dense(), block, what=f"{labels}, {tap.name}")
        assert "converged" in fisher.info.blocks[tap.name].notes


FORMULAS = {
    "kl": check_kl,
    "tkfac": check_tkfac,
    "kfac": check_kfac,
    "kfac-reduce": check_reduce,
    "ekfac": check_ekfac,
    "diagonal": check_diagonal,
    "full": check_full,
}


# All four of them at once would be thousands. Under all kinds of labels every formula meets every use and, apart from
# that, every likelihood.
FORMS = [
    (example, fit, likelihood, LABELS[(i + j + k) % len(LABELS)])
    for i, example in enumerate(EXAMPLES)
    for j, fit in enumerate(FORMULAS)
    for k, likelihood in enumerate(list(REGISTRY)[(i + j) % 4 :: 4])
]


def test_every_two_choices_meet_in_some_formula():
    assert not missing_pairs(FORMS, EXAMPLES, FORMULAS, REGISTRY, LABELS)
    assert {(e, f, labels) for e, f, _, labels in FORMS} == set(product(EXAMPLES, FORMULAS, LABELS))
    assert {form[1:] for form in FORMS} == set(product(FORMULAS, REGISTRY, LABELS))


@pytest.mark.parametrize(("example", "fit", "likelihood", "labels"), FORMS)
def test_agrees_with_its_formula(example, fit, likelihood, labels):
    p = problem(example, likelihood)
    FORMULAS[fit](p, labels, estimate(p, fit, labels))


def places(p: Problem, blocks: tuple[Block, ...]) -> Tensor:
    """Places of the elements of some blocks in the flat vector of all parameters."""
    rows = {name: index[None] for name, index in positions(p.model).items()}
    return gather(blocks, rows)[0]


@turns
def test_error_is_the_dense_distance(turn, monkeypatch):
    p = turn.problem
    truth = p.truth("exact")
    fisher = whole(turn)
    difference, missed, total = truth - fisher.to_dense(), 0.0, 0.0
    expected = {}
    for (blocks, _), name in zip(fisher.entries, fisher.blocks, strict=True):
        index = places(p, blocks)
        far, norm = (matrix[index[:, None], index].norm() for matrix in (difference, truth))
        expected[name] = float(far / norm)
        missed, total = missed + far**2, total + norm**2
    # The truth as a matrix; or never formed, only inner products of samples.
    assert len(truth) <= error_module._WRITTEN_OUT
    found = [error(turn)]
    monkeypatch.setattr(error_module, "_WRITTEN_OUT", 0)
    found.append(fisher.error(p.batch))
    for each, absolute in zip(found, (1e-10, 3e-7), strict=True):
        assert each.count == p.count
        # An error of nearly zero is the root of a difference of squares: half the digits.
        tolerance = {"rel": 1e-7, "abs": absolute}
        assert each.blocks == pytest.approx(expected, **tolerance)
        assert each.relative == pytest.approx(float((missed / total).sqrt()), **tolerance)


@by_turns("sum")
def test_sum_is_count_times_mean(turn):
    p, fit = turn.problem, turn.fit
    mean, total = whole(turn), estimate(p, fit, reduction="sum")
    assert mean.count == total.count == p.count > 1
    close(total.to_dense(), p.count * mean.to_dense(), 1e-12, what="sum")
    assert total.error(p.batch).blocks == pytest.approx(error(turn).blocks, abs=1e-7)


@by_turns("bits")
def test_same_call_gives_the_same_bits(turn):
    first = whole(turn, turn.labels).to_dense()
    torch.rand(())  # the global random state may differ
    assert torch.equal(first, estimate(turn.problem, turn.fit, turn.labels).to_dense())
    if turn.labels == "sampled":
        assert not torch.equal(first, estimate(turn.problem, turn.fit, "sampled", seed=SEED + 1).to_dense())


@free_of_batches
def test_batches_do_not_matter(turn):
    p, fit = turn.problem, turn.fit
    # Draws of a label have to be those of the example, whatever the sizes of the batches before.
    size = {"exact": [2, len(p.x) - 2], "observed": [1] * len(p.x), "sampled": [1, 1, len(p.x) - 2]}[turn.labels]
    loader = list(zip(p.x.split(size), p.targets.split(size), strict=True))
    one, parts = whole(turn, turn.labels), estimate(p, fit, turn.labels, loader)
    assert parts.count == one.count
    # Iterations to a tolerance magnify the rounding of sums in another order; Auto's positive terms most (by 2e-3 to
    # 6e-3, as the processor has it).
    tolerance = 1e-10 if resolve(fit).linear else 1e-2 if fit == "auto" else 1e-6
    close(parts.to_dense(), one.to_dense(), tolerance)


@by_turns("order")
def test_order_does_not_matter(turn):
    p, fit = turn.problem, turn.fit
    order = torch.arange(len(p.x)).flip(0).roll(1)
    labels = "observed" if turn.labels == "observed" else "exact"  # those that are drawn belong to places
    permuted = estimate(p, fit, labels, (p.x[order], p.targets[order]))
    close(permuted.to_dense(), whole(turn, labels).to_dense(), 1e-10 if resolve(fit).linear else 5e-3)


@turns
def test_single_precision_agrees(turn):
    fit = turn.fit
    single = problem(turn.example, turn.likelihood, torch.float32)
    fisher = estimate(single, fit)
    assert fisher.dtype == torch.float32
    if fit in FORMULAS and fit != "ekfac":  # eigenvectors of eigenvalues that nearly agree need not
        close(fisher.to_dense().double(), whole(turn).to_dense(), 1e-3, what=fit)
    expected = error(turn).relative
    assert fisher.error(single.batch).relative == pytest.approx(expected, abs=1e-3)
