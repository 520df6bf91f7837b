"""Networks as people have them are covered completely, their gradients are autograd's, and the page says so."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import kronfisher as kf
from kronfisher.experiments.coverage import EXTERNAL, HEAD, NETWORKS
from kronfisher.likelihoods import Draws
from tests.helpers.optional import require

PAGE = Path(__file__).resolve().parents[2] / "docs" / "coverage.md"
ALL = {**NETWORKS, **EXTERNAL}
DEAR = {"A small vision transformer": {"positions"}}  # whose dense factor costs more than a pass over its three images


def built(title):
    if title in EXTERNAL:
        for package in ("transformers", "peft"):
            require(package)
    subject = ALL[title]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in subject.model.parameters():  # nothing may be an identity, nor zero
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return subject


def truth(subject, likelihood):
    """The diagonal, one backward pass for each datum in a forward pass of its own."""
    parameters = {name: p for name, p in subject.model.named_parameters() if p.requires_grad}
    run = subject.forward or (lambda model, batch: (model(batch), None))
    outputs = run(subject.model, subject.batch)[0].detach()
    vectors = likelihood.sampled(outputs, None, Draws(0, 0))
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for k in range(len(outputs)):
        own = run(subject.model, subject.batch[k : k + 1])[0]
        found = torch.autograd.grad(own, list(parameters.values()), vectors[k : k + 1], materialize_grads=True)
        for name, gradient in zip(parameters, found, strict=True):
            total[name] += gradient**2 / len(outputs)
    return total


networks = pytest.mark.parametrize("title", ALL)
quiet = pytest.mark.filterwarnings("ignore")  # of other libraries


@networks
@quiet
def test_covered_completely(title):
    subject = built(title)
    coverage = subject.coverage()
    assert coverage.complete and coverage.share == 1.0
    names = {name for name, p in subject.model.named_parameters() if p.requires_grad}
    assert {row.parameter for row in coverage.rows} == names
    assert all(row.operators and row.treatment.startswith(("KFAC", "Diagonal")) for row in coverage.rows)
    assert {row.parameter for row in coverage.rows if row.treatment == "Diagonal()"} == DEAR.get(title, set())


@networks
@quiet
def test_diagonals_are_autograd_s(title):
    subject = built(title)
    subject.model.double()
    batch = subject.batch.double() if subject.batch.is_floating_point() else subject.batch
    subject = type(subject)(subject.model, batch, subject.forward)
    likelihood = kf.Categorical(class_dim=-1)
    expected = truth(subject, likelihood)
    fisher = kf.estimate(subject.model, subject.batch, likelihood, fit="diagonal", forward=subject.forward)
    assert fisher.diagonal().keys() == expected.keys()
    for name, found in fisher.diagonal().items():
        scale = max(float(expected[name].norm()), 1e-12)
        assert float((found - expected[name]).norm()) <= 1e-10 * scale + 1e-16, name


@networks
@quiet
@pytest.mark.parametrize("fit", ["kfac", "ekfac"])
def test_a_step_can_be_taken(title, fit):
    subject = built(title)
    fisher = kf.estimate(
        subject.model, subject.batch, kf.Categorical(class_dim=-1), fit=fit, forward=subject.forward, strict=True
    )
    gradient = {name: torch.ones_like(p) for name, p in subject.model.named_parameters() if p.requires_grad}
    step = (fisher + 0.1).solve(gradient)
    again = (fisher + 0.1) @ step
    for name, found in again.items():
        assert torch.allclose(found, gradient[name], atol=1e-2), name


def tables(text):
    return {title: body.strip() for title, body in re.findall(r"## (.*?)\n\n```\n(.*?)```", text, flags=re.DOTALL)}


@networks
@quiet
def test_the_page_is_up_to_date(title):
    text = PAGE.read_text()
    assert text.startswith(HEAD) and list(tables(text)) == list(ALL)
    if title in EXTERNAL:
        here = [f"{require(name).__name__} {version(name)}" for name in ("transformers", "peft")]
        if not all(each in text for each in here):
            pytest.skip("the page was written with other versions of transformers and peft")
    assert tables(text)[title] == str(ALL[title]().coverage())
