"""Errors, spectra, comparisons, coverage and training read and refuse batches as an estimate does: cases × entries.

The cases are those of the posteriors' tests, where estimates and all entries of posteriors are tried.
"""

import copy

import pytest
import torch

import kronfisher as kf
from tests.helpers.targets import CASES, IDS, TinyForCausalLM, Wrapped, X


def posterior_inputs(model, likelihood):
    inputs = IDS if isinstance(model, TinyForCausalLM) else X
    return (inputs, (None, torch.ones(len(inputs)))) if isinstance(likelihood, kf.Weighted) else inputs


def train(model, likelihood, batch):
    """A step on a copy; one that is refused moves no weight."""
    model = copy.deepcopy(model)
    before = [p.clone() for p in model.parameters()]
    optimizer = kf.NaturalGradient(model, likelihood)
    x, targets = batch
    try:
        optimizer.step(lambda: model(x).logits if isinstance(model, Wrapped) else model(x), targets)
    except kf.DataError:
        assert all(map(torch.equal, before, model.parameters()))
        raise


@pytest.mark.parametrize("case", CASES)
def test_every_entry_accepts_or_refuses_the_same_batches(case):
    """Seen: a loader's first batch, where it is a list, taken for two batches by a comparison."""
    model, likelihood, batch, error = CASES[case]
    fisher = kf.estimate(model, posterior_inputs(model, likelihood), likelihood, labels="exact", fit="diagonal")
    compared = {"fits": ["diagonal"], "labels": "observed"}
    entries = [lambda: kf.compare(model, [batch], likelihood, **compared)]
    if not isinstance(batch, list):  # a list is one batch in a list only
        entries.append(lambda: kf.compare(model, batch, likelihood, **compared))
    if error is None or "no targets" not in error:  # exact labels need none
        entries += [lambda: fisher.error([batch]), lambda: fisher.spectrum([batch])]
    if type(batch) is tuple and len(batch) == 2 and isinstance(batch[0], torch.Tensor):
        entries.append(lambda: train(model, likelihood, batch))
    for entry in entries:
        if error is None:
            entry()
        else:
            with pytest.raises(kf.DataError, match=error):
                entry()
    if case != "three parts":  # which targets there are does not matter to coverage, only what goes into the model
        assert all(row.structure == "by layers" for row in kf.coverage(model, [batch]).rows)
