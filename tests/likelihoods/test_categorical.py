import re

import pytest
import torch
from torch.nn import functional

from kronfisher.errors import DataError
from kronfisher.likelihoods import Categorical, Draws

WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0], dtype=torch.float64)


def logits(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def indices(*shape, classes=5):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(1))


def cross_entropy(outputs, targets, class_dim, **settings):
    """torch's own loss of every example, with the classes where torch wants them."""
    soft = targets.is_floating_point()
    outputs = outputs.movedim(class_dim, 1)
    targets = targets.movedim(class_dim, 1) if soft else targets
    losses = functional.cross_entropy(outputs, targets, reduction="none", **settings)
    return losses.reshape(len(outputs), -1).sum(1)


def assert_matches_torch(categorical, outputs, targets, class_dim, **settings):
    def loss(x):
        return cross_entropy(x, targets, class_dim, **settings)

    torch.testing.assert_close(-categorical.log_prob(outputs, targets), loss(outputs))
    gradient = torch.func.grad(lambda x: loss(x).sum())(outputs)
    torch.testing.assert_close(categorical.observed(outputs, targets), gradient, rtol=0, atol=1e-12)
    n, size = len(outputs), outputs[0].numel()
    full = torch.func.jacrev(torch.func.jacrev(lambda x: loss(x).sum()))(outputs).reshape(n, size, n, size)
    roots = torch.stack(list(categorical.exact(outputs, targets))).flatten(2)
    assert len(roots) == categorical.columns(outputs, targets)
    torch.testing.assert_close(
        torch.einsum("vni,vnj->nij", roots, roots), full.diagonal(dim1=0, dim2=2).movedim(-1, 0), rtol=0, atol=1e-10
    )


LAYOUTS = {  # shape of the outputs, dimension of the classes, shape of the targets
    "[N, C]": ((3, 5), 1, (3,)),
    "[N, T, C]": ((3, 2, 5), -1, (3, 2)),
    "[N, C, T]": ((3, 5, 2), 1, (3, 2)),
    "[N, C, H, W]": ((3, 5, 2, 1), 1, (3, 2, 1)),
    "[N, H, W, C]": ((3, 2, 1, 5), -1, (3, 2, 1)),
}


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weighted"])
@pytest.mark.parametrize("explicit", [False, True], ids=["by shape", "by class_dim"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_weights_and_masks_agree_with_torch(layout, explicit, weight):
    shape, class_dim, target_shape = LAYOUTS[layout]
    outputs, targets = logits(*shape), indices(*target_shape)
    for ignored in (-100, 2):
        targets.view(-1)[1] = ignored
        categorical = Categorical(ignored, weight, class_dim if explicit else None)
        categorical.check(outputs, targets, labels="observed")
        assert_matches_torch(categorical, outputs, targets, class_dim, weight=weight, ignore_index=ignored)
        expected = (targets != ignored).reshape(3, -1)
        positions = categorical.positions(outputs, targets)
        assert positions is not None and torch.equal(positions, expected)


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weighted"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_class_probabilities_agree_with_torch(layout, weight):
    shape, class_dim, _ = LAYOUTS[layout]
    outputs = logits(*shape)
    targets = logits(*shape).mul(2).softmax(class_dim)
    categorical = Categorical(weight=weight, class_dim=class_dim)
    categorical.check(outputs, targets, labels="observed")
    assert categorical.positions(outputs, targets) is None
    assert_matches_torch(categorical, outputs, targets, class_dim, weight=weight)


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weighted"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_label_smoothing_agrees_with_torch(layout, weight):
    shape, class_dim, target_shape = LAYOUTS[layout]
    outputs, targets = logits(*shape), indices(*target_shape)
    targets.view(-1)[1] = 2
    categorical = Categorical(2, weight, class_dim, label_smoothing=0.3)
    settings = {"weight": weight, "label_smoothing": 0.3}
    assert_matches_torch(categorical, outputs, targets, class_dim, ignore_index=2, **settings)
    soft = logits(*shape).mul(2).softmax(class_dim)
    assert_matches_torch(categorical, outputs, soft, class_dim, **settings)


def test_label_smoothing_leaves_the_fisher_of_the_model():
    """Drawn labels are the model's own: smoothed as well they would give (1-α)² of the exact matrix."""
    outputs, targets = logits(3, 5), indices(3)
    plain, smooth = Categorical(), Categorical(label_smoothing=0.3)
    assert torch.equal(smooth.sampled(outputs, None, Draws(0)), plain.sampled(outputs, None, Draws(0)))
    torch.testing.assert_close(smooth.sampled(outputs, targets, Draws(0)), plain.sampled(outputs, None, Draws(0)))
    for one, other in zip(smooth.exact(outputs, targets), plain.exact(outputs, targets), strict=True):
        torch.testing.assert_close(one, other)
    assert (smooth.observed(outputs, targets) - plain.observed(outputs, targets)).abs().max() > 0.1
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"label_smoothing=.* must be in \[0, 1\)"):
            Categorical(label_smoothing=wrong)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.int64], ids=str)
def test_any_integer_type_labels(dtype):
    # ignore_index = -100 is 156 as uint8, which is a label here.
    outputs, targets = logits(2, 200), torch.tensor([156, 3] if dtype == torch.uint8 else [-100, 3]).to(dtype)
    categorical = Categorical()
    categorical.check(outputs, targets, labels="observed")
    wide = targets.long()
    assert torch.equal(categorical.observed(outputs, targets), categorical.observed(outputs, wide))
    positions = categorical.positions(outputs, targets)
    assert positions is not None and positions.flatten().tolist() == [dtype == torch.uint8, True]


def test_exact_has_one_column_less_than_classes_and_comes_lazily():
    outputs = logits(2, 3, 4)
    categorical = Categorical(class_dim=-1)
    assert categorical.columns(outputs) == 3 * 3
    vectors = categorical.exact(outputs)
    first = next(vectors)
    assert (first[:, 0] != 0).all() and (first[:, 1:] == 0).all()
    assert len(list(vectors)) == 8


def test_square_root_is_the_cholesky_factor():
    p = logits(1, 6).softmax(-1)[0]
    root = torch.stack(list(Categorical().exact(p.log()[None])))[:, 0].T
    assert torch.equal(root, root.tril())
    truth = torch.linalg.cholesky((p.diag() - p.outer(p))[:-1, :-1])
    torch.testing.assert_close(root[:-1], truth)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]])
@pytest.mark.parametrize("gap", [1.0, 20.0, 60.0, 1e4])
def test_confident_square_roots_keep_their_digits(order, gap):
    outputs = (torch.tensor([0.0, 1.0, 2.0, 3.0])[order] * gap)[None]
    roots = torch.stack(list(Categorical().exact(outputs)))[:, 0]
    double = torch.stack(list(Categorical().exact(outputs.double())))[:, 0]
    # Roots of probabilities that underflow in float32, below 1e-38, are lost.
    torch.testing.assert_close(roots.double(), double, rtol=1e-4, atol=1e-18)
    p = outputs[0].double().softmax(-1)
    torch.testing.assert_close(roots.double().T @ roots.double(), p.diag() - p.outer(p), rtol=0, atol=1e-6)


def test_confident_gradients_keep_their_digits():
    outputs, targets = torch.tensor([[30.0, 0.0, 0.0]]), torch.tensor([0])
    truth = Categorical().observed(outputs.double(), targets)
    assert truth[0, 0] < 0
    torch.testing.assert_close(Categorical().observed(outputs, targets).double(), truth, rtol=1e-5, atol=0)


def test_sample_has_the_probabilities():
    row = torch.tensor([0.0, 1.0, -1e4, 2.0, -1e4], dtype=torch.float64)
    p, count = row.softmax(-1), 20000
    for outputs, categorical in (
        (row.expand(count, 5), Categorical()),
        (row.expand(count // 4, 4, 5), Categorical(class_dim=-1)),
        (row.expand(count // 4, 4, 5).transpose(1, 2), Categorical(class_dim=1)),
    ):
        sample = categorical.sample(outputs, Draws(0))
        assert sample.dtype == torch.int64
        frequency = sample.flatten().bincount(minlength=5) / count
        assert ((frequency - p).abs() <= 4 * (p * (1 - p) / count).sqrt()).all()


@pytest.mark.parametrize("uniform", [1e-300, 2**-54, 1 - 2**-53])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_classes_of_probability_zero_are_never_drawn(monkeypatch, uniform, dtype):
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, uniform, dtype=torch.float64))
    outputs = torch.tensor([[-1e4, 0.0, -1e4, 1.0, -1e4]], dtype=dtype)
    assert Categorical().sample(outputs, Draws(0)).item() in (1, 3)


def test_padding_adds_nothing():
    outputs, targets = logits(3, 4, 5), indices(3, 4)
    targets[:, 2:] = -100
    categorical = Categorical(class_dim=-1)
    torch.testing.assert_close(
        categorical.log_prob(outputs, targets), categorical.log_prob(outputs[:, :2], targets[:, :2])
    )
    torch.testing.assert_close(
        categorical.observed(outputs, targets)[:, :2], categorical.observed(outputs[:, :2], targets[:, :2])
    )
    assert (categorical.observed(outputs, targets)[:, 2:] == 0).all()


def test_a_datum_without_any_label_is_zero():
    outputs, targets = logits(2, 3, 5), indices(2, 3)
    targets[0] = -100
    categorical = Categorical()
    categorical.check(outputs, targets)
    assert (categorical.observed(outputs, targets)[0] == 0).all()
    assert (categorical.sampled(outputs, targets, Draws(0))[0] == 0).all()
    assert categorical.log_prob(outputs, targets)[0] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_dim": 2}, "class_dim=2 must be 1 for"),
        ({"weight": torch.tensor([1.0, -1.0])}, "weight must be one non-negative, finite number per class"),
        ({"weight": torch.tensor([1.0, torch.nan])}, "weight must be one non-negative, finite number per class"),
        ({"weight": torch.ones(2, 2)}, "weight must be one non-negative, finite number per class"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Categorical(**settings)


@pytest.mark.parametrize(
    ("settings", "shape", "targets", "message"),
    [
        ({}, (4,), indices(4), "Categorical needs logits [N, C], [N, T, C] or [N, C, ...], found [4]; for one logit"),
        ({}, (4, 1), indices(4), "needs at least two classes, found 1 in dimension 1 of [4, 1]; for one logit"),
        ({"weight": torch.ones(3)}, (4, 5), indices(4), "has 3 class weights for 5 classes in dimension 1 of outputs"),
        ({"weight": torch.ones(5)}, (4, 5), None, "Categorical with class weights needs targets, found none; give"),
        ({}, (4, 5), torch.zeros(4), "integer class indices, found torch.float32 of shape [4]; convert them with"),
        ({}, (4, 5), torch.zeros(4, dtype=torch.bool), "integer class indices, found torch.bool of shape [4]; conv"),
        ({}, (4, 5), indices(4, 1), "Categorical needs targets of shape [4], found [4, 1]; reshape"),
        ({}, (4, 5), torch.tensor([0, 5, 1, 9]), "label 5 is out of range for 5 classes (0 to 4); labels start at 0"),
        ({}, (4, 5), torch.tensor([0, -1, 1, 2]), "label -1 is out of range for 5 classes (0 to 4); labels start at"),
        ({"ignore_index": 0}, (2, 5), torch.tensor([0, -100]), "label -100 is out of range for 5 classes (0 to 4); "),
        ({}, (4, 5), torch.ones(4, 5), "non-negative and sum to one over dimension 1; normalise"),
        ({}, (4, 2), torch.tensor([2.0, -1.0]).expand(4, 2), "non-negative and sum to one over dimension 1; normalise"),
        ({}, (4, 5), torch.full((4, 5), torch.nan), "non-negative and sum to one over dimension 1; normalise"),
        ({}, (4, 5), torch.ones(4, 3) / 3, "with class probabilities needs targets of shape [4, 5], found [4, 3]; re"),
        ({}, (4, 5, 3), None, "outputs [4, 5, 3] with no targets do not show which dimension holds the classes: class"),
        ({}, (4, 3, 3), indices(4, 3), "outputs [4, 3, 3] with targets [4, 3] do not show which dimension holds the"),
        ({}, (4, 5, 3), indices(4, 7), "[4, 3] for class_dim=1, [4, 5] for class_dim=-1; say Categorical(class_dim=1)"),
        (
            {},
            (4, 5, 3),
            torch.ones(4, 5, 3) / 5,
            "outputs [4, 5, 3] with targets [4, 5, 3] do not show which dimension",
        ),
        ({"class_dim": 1}, (4, 5, 3), indices(4, 5), "Categorical needs targets of shape [4, 3], found [4, 5]; resh"),
    ],
)
def test_messages(settings, shape, targets, message):
    with pytest.raises(DataError, match="^batch 7: .*" + re.escape(message)):
        Categorical(**settings).check(torch.zeros(shape), targets, "batch 7")


@pytest.mark.parametrize("method", ["observed", "log_prob", "exact", "sampled"])
def test_wrong_targets_are_refused_without_check_too(method):
    outputs = torch.zeros(4, 5)
    for categorical, targets in (
        (Categorical(), torch.zeros(4, 1).long()),
        (Categorical(), torch.zeros(4)),
        (Categorical(weight=torch.ones(5)), None),
    ):
        with pytest.raises(DataError, match=r"Categorical needs targets of shape \[4(, 5)?\], found"):
            if method == "sampled":
                categorical.sampled(outputs, targets, Draws(0))
            elif method == "exact":
                list(categorical.exact(outputs, targets))
            else:
                getattr(categorical, method)(outputs, targets)


def test_sample_of_ambiguous_layout_is_refused():
    with pytest.raises(DataError, match="do not show which dimension holds the classes"):
        Categorical().sample(torch.zeros(4, 5, 3), Draws(0))
