"""`mask=`: positions that do not count, as a key or a function, with and without ignored targets."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronfisher as kf
from kronfisher.likelihoods import REGISTRY
from tests.helpers.checks import SETTLED
from tests.helpers.networks import Written
from tests.helpers.pairs import missing_pairs
from tests.helpers.truth import exact_fisher, kept

SEEDED = torch.Generator().manual_seed(0)


class Attentive(nn.Module):
    """One block of a transformer from its matrices, with a head per token or for the whole sequence."""

    def __init__(self, features, classes, pooled):
        super().__init__()
        self.pooled = pooled
        for name in ("query", "key", "value", "output"):
            self.add_module(name, nn.Linear(features, features))
        self.norm, self.head = nn.LayerNorm(features), nn.Linear(features, classes)

    def forward(self, x, attention_mask):
        bias = torch.zeros(attention_mask.shape, dtype=x.dtype).masked_fill(attention_mask == 0, -1e9)
        scores = self.query(x) @ self.key(x).mT + bias[:, None]
        x = self.norm(x + self.output(scores.softmax(-1) @ self.value(x)).tanh())
        if self.pooled:
            weights = attention_mask / attention_mask.sum(1, keepdim=True).clamp_min(1)
            return self.head((weights.to(x.dtype)[..., None] * x).sum(1))
        return self.head(x)


class Convolutional(nn.Module):
    """Two convolutions along a sequence; padded positions are set to zero in between, as they must."""

    def __init__(self, features, classes):
        super().__init__()
        self.first, self.second = nn.Conv1d(features, 5, 3, padding=1), nn.Conv1d(5, classes, 3, padding=1)

    def forward(self, x, attention_mask):
        keep = attention_mask[..., None].to(x.dtype)
        hidden = self.first((x * keep).mT).tanh().mT * keep
        return self.second(hidden.mT).mT


def padded(x, by):
    """A batch of sequences, some shorter than others, padded to a length that is `by` longer than needed."""
    lengths = torch.tensor([4, 2, 3, 4])
    mask = (torch.arange(4 + by) < lengths[:, None]).long()
    noise = torch.randn(len(x), by, x.shape[2], dtype=x.dtype, generator=torch.Generator().manual_seed(by))
    return {"x": torch.cat([x, noise], 1), "attention_mask": mask}


MODELS = {
    "tokens": lambda: Attentive(3, 2, pooled=False),
    "pooled": lambda: Attentive(3, 2, pooled=True),
    "convolutions": lambda: Convolutional(3, 2),
}
X = torch.randn(4, 4, 3, generator=SEEDED, dtype=torch.float64)


def masked_network(name):
    torch.manual_seed(1)
    return MODELS[name]().double()


def likelihoods(name):
    return kf.Categorical() if name == "pooled" else kf.Categorical(class_dim=-1), kf.Gaussian(), kf.Poisson()


PADDED = [(name, fit, (i + j) % 3) for i, name in enumerate(MODELS) for j, fit in enumerate(SETTLED)]
assert not missing_pairs(PADDED, MODELS, SETTLED, range(3))


@pytest.mark.parametrize(("name", "fit", "which"), PADDED)
def test_padding_a_batch_changes_nothing(name, fit, which):
    model, likelihood = masked_network(name), likelihoods(name)[which]
    plain = kf.estimate(model, padded(X, 0), likelihood, mask="attention_mask", fit=fit, labels="exact")
    for by in (1, 3):
        found = kf.estimate(model, padded(X, by), likelihood, mask="attention_mask", fit=fit, labels="exact")
        assert found.count == plain.count == 4 and found.rows == plain.rows
        assert (found.to_dense() - plain.to_dense()).norm() < 1e-10 * plain.to_dense().norm()
    unmasked = kf.estimate(model, padded(X, 3), likelihood, fit=fit, labels="exact")
    if name != "pooled" or fit.startswith("kfac"):
        assert (unmasked.to_dense() - plain.to_dense()).norm() > 1e-3 * plain.to_dense().norm()


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_is_the_mean_of_its_sequences(name):
    """Each sequence by itself, without any padding: the matrix is their mean."""
    model = masked_network(name)
    batch = padded(X, 2)
    for likelihood in likelihoods(name):
        found = kf.estimate(model, batch, likelihood, mask="attention_mask", fit="full", labels="exact")
        truth = torch.zeros_like(found.to_dense())
        for x, mask in zip(batch["x"], batch["attention_mask"], strict=True):
            alone = Written(lambda m, x: m.model(x, torch.ones(1, x.shape[1])), model=model)
            truth += exact_fisher(alone, x[None, mask == 1], likelihood) / 4
        assert (found.to_dense() - truth * kept(found)).norm() < 1e-9 * truth.norm()


@pytest.mark.parametrize("name", MODELS)
def test_sequences_without_any_position_do_not_count(name):
    model = masked_network(name)
    for likelihood in likelihoods(name):
        batch = padded(X, 1)
        batch["attention_mask"][2] = 0
        found = kf.estimate(model, batch, likelihood, mask="attention_mask", labels="exact")
        rest = {key: value[torch.tensor([0, 1, 3])] for key, value in batch.items()}
        expected = kf.estimate(model, rest, likelihood, mask="attention_mask", labels="exact")
        assert found.count == expected.count == 3 and found.rows == expected.rows
        assert (found.to_dense() - expected.to_dense()).norm() < 1e-10 * expected.to_dense().norm()


def test_rows_of_the_input_factor():
    model, batch = masked_network("tokens"), padded(X, 2)
    fisher = kf.estimate(model, batch, kf.Gaussian(), mask="attention_mask", fit="kfac")
    real = batch["x"][batch["attention_mask"] == 1]
    real = torch.cat([real, torch.ones(len(real), 1)], 1)
    assert fisher.rows["query.weight"] == fisher.rows["head.weight"] == 13
    torch.testing.assert_close(fisher["query.weight"].A[0], real.T @ real / 13 * fisher["query.weight"].A[0, 3, 3])


@pytest.mark.parametrize("labels", ["exact", "sampled", "observed"])
def test_key_function_and_ignored_targets_agree(labels):
    model, batch = masked_network("tokens"), padded(X, 2)
    likelihood = kf.Categorical(class_dim=-1)
    y = torch.randint(2, (4, 6), generator=torch.Generator().manual_seed(1))
    options = {"labels": labels, "fit": "ekfac", "seed": 3}
    ignored = y.masked_fill(batch["attention_mask"] == 0, -100)
    expected = kf.estimate(model, (batch, ignored), likelihood, **options)
    for mask in ("attention_mask", lambda b: b[0]["attention_mask"], lambda b: b[0]["attention_mask"].bool()):
        found = kf.estimate(model, [(batch, y)], likelihood, mask=mask, **options)
        assert found.rows == expected.rows
        torch.testing.assert_close(found.to_dense(), expected.to_dense())
        assert found.error((batch, y)).relative == pytest.approx(expected.error((batch, ignored)).relative)
    both = y.clone()
    both[0, 1], both[3] = -100, -100
    together = both.masked_fill(batch["attention_mask"] == 0, -100)
    found = kf.estimate(model, (batch, both), likelihood, mask="attention_mask", **options)
    expected = kf.estimate(model, (batch, together), likelihood, **options)
    assert found.count == expected.count == 3
    torch.testing.assert_close(found.to_dense(), expected.to_dense())


def test_a_mask_of_data():
    model, x, y = nn.Linear(3, 2).double(), torch.randn(6, 3).double(), torch.randint(2, (6,))
    use = torch.tensor([1, 0, 1, 1, 0, 0]).bool()
    for fit in SETTLED:
        found = kf.estimate(model, (x, y), kf.Categorical(), mask=lambda batch: use, fit=fit, labels="observed")
        expected = kf.estimate(model, (x[use], y[use]), kf.Categorical(), fit=fit, labels="observed")
        assert found.count == 3
        torch.testing.assert_close(found.to_dense(), expected.to_dense())
    with pytest.raises(kf.DataError, match="No example counts"):
        kf.estimate(model, (x, y), kf.Categorical(), mask=lambda batch: use & False)


@pytest.mark.parametrize("name", [name for name in REGISTRY if "weighted" not in name])
def test_masked_data_count_for_nothing_under_any_likelihood(name):
    entry = REGISTRY[name]
    outputs, targets = entry.example(torch.Generator().manual_seed(0), torch.float64)
    x = torch.randn(len(outputs), 3, dtype=torch.float64)
    model = Written(
        lambda m, x: m.l(x).reshape(len(x), *outputs.shape[1:]), l=nn.Linear(3, outputs[0].numel())
    ).double()
    keep = torch.arange(len(x)) != 1
    found = kf.estimate(model, (x, targets), entry.factory(), mask=lambda batch: keep, labels="exact")
    expected = kf.estimate(model, (x[keep], targets[keep]), entry.factory(), labels="exact")
    assert expected.to_dense().norm() > 0.01
    torch.testing.assert_close(found.to_dense(), expected.to_dense())


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("mask", r"mask='mask' is not a key of the batch or its inputs \(keys \['x', 'attention_mask'\]\). Name one"),
        (lambda b: [1, 0], "the mask is list, and there are 4 examples; it must be a tensor"),
        (lambda b: torch.ones(3, 6), r"the mask is \[3, 6\], and there are 4 examples"),
        (lambda b: torch.tensor(True), r"the mask is \[\], and there are 4 examples"),
        (
            lambda b: torch.ones(4, 6) / 2,
            r"the mask contains 0.5, and it must be true \(or 1\) where a position",
        ),
        (
            lambda b: torch.ones(4, 5),
            r"the mask has 5 positions for each example, and outputs \[4, 6, 2\] have another",
        ),
    ],
)
def test_messages(mask, message):
    with pytest.raises(kf.DataError, match="^batch 0: " + message):
        kf.estimate(masked_network("tokens"), [padded(X, 2)], kf.Gaussian(), mask=mask)


def test_keys_need_mappings():
    with pytest.raises(kf.DataError, match=r"is not a key of the batch or its inputs, which are not mappings"):
        kf.estimate(nn.Linear(3, 2), torch.randn(4, 3), kf.Gaussian(), mask="attention_mask")


def test_targets_with_other_positions_than_the_mask():
    model = Written(lambda m, x: F.avg_pool1d(m.l(x).mT, 2), l=nn.Linear(3, 4))
    y = torch.zeros(4, 3).long()
    with pytest.raises(kf.DataError, match=r"the mask has 6 positions .* outputs \[4, 4, 3\] have another number"):
        kf.estimate(model, (torch.randn(4, 6, 3), y), kf.Categorical(class_dim=1), mask=lambda b: torch.ones(4, 6))
