"""In-place changes of what weights and inputs become: exact, or refused with the name and operator."""

import pytest
import torch
from torch import nn

import kronfisher as kf
from tests.helpers.checks import assert_exact, assert_fallback
from tests.helpers.networks import Written, linears


def relu(y):
    return y.relu_()


def flat_relu(y):
    y.view(-1).relu_()
    return y


def slice_assignment(y):
    y[..., :2] = 0
    return y


def slice_values(y):
    y[..., :2] = y[..., 2:4] * 2
    return y


def slice_tanh(y):
    y[..., :2].tanh_()
    return y


def slice_add(y):
    y[..., 1:3] += 1.5
    return y.relu_()


def select_relu(y):
    y[0].relu_()
    return y


def transposed_tanh(y):
    y.transpose(0, -1).tanh_()
    return y


def chunked(y):
    first, second = (part.clone() for part in y.chunk(2, dim=-1))
    return torch.cat([first.relu_(), second.mul_(2)], dim=-1)


def twice(y):
    y += 1
    y *= 2
    return y.sigmoid_()


IN_PLACE = [
    relu,
    flat_relu,
    slice_assignment,
    slice_values,
    slice_tanh,
    slice_add,
    select_relu,
    transposed_tanh,
    chunked,
]


IN_PLACE += [twice]


@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 3), (4, 2, 2, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_in_place_after_linear(change, shape, bias):
    model = linears(lambda m, x: m.l1(change(m.l0(x))).flatten(1), (3, 4), (4, 2), bias=bias)
    assert_exact(model, torch.randn(shape))


@pytest.mark.parametrize("change", [relu, flat_relu, slice_assignment, slice_tanh, twice])
@pytest.mark.parametrize(
    "layer, shape",
    [
        (lambda: nn.Conv1d(3, 4, 2), (4, 3, 5)),
        (lambda: nn.Conv2d(3, 4, 2, bias=False), (3, 3, 4, 4)),
        (lambda: nn.LayerNorm(5), (4, 3, 5)),
        (lambda: nn.GroupNorm(2, 4), (3, 4, 5)),
        (lambda: nn.BatchNorm1d(3).eval(), (4, 3, 5)),
    ],
    ids=["conv1d", "conv2d", "layernorm", "groupnorm", "batchnorm"],
)
def test_in_place_after_other_layers(change, layer, shape):
    assert_exact(Written(lambda m, x: change(m.layer(x)).flatten(1), layer=layer()), torch.randn(shape))


@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_that_are_parts_of_larger_ones(shape, bias):
    """The gradient of the second arrives as a window somewhere inside that of both."""

    def forward(m, x):
        first, second = torch.cat([m.l0(x), m.l1(x).relu_()]).chunk(2)
        return (first.tanh() * second + torch.stack([m.l0(x), m.l2(x)]).sin()[1]).flatten(1)

    assert_exact(linears(forward, (3, 2), (3, 2), (3, 2), bias=bias), torch.randn(shape))


def test_gradients_that_come_in_some_columns_only():
    """Each column of exact labels reaches one half; the inputs of the other must be counted when its turn comes."""
    model = linears(lambda m, x: torch.cat([m.l0(x), Half.apply(m.l1(x))], 1), (3, 2), (3, 2))
    x = torch.randn(5, 3)
    fisher = kf.estimate(model, x, kf.Gaussian(), labels="exact", fit="kfac")
    rows = torch.cat([x, torch.ones(5, 1)], 1)
    for name in fisher.blocks:
        assert torch.allclose(fisher[name].A[0], rows.T @ rows / 5, atol=1e-6)


class Half(torch.autograd.Function):
    """Keeps a zero gradient to itself."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g if g.any() else None


def test_parameter_added_in_place():
    def forward(m, x):
        x = x.clone()
        x[:, :2] += m.p
        x *= m.q
        return (x - 1).mul_(m.r)

    assert_exact(Written(forward, p=torch.randn(2), q=torch.randn(3), r=torch.randn(())), torch.randn(5, 3))


def test_parameter_added_to_a_view_that_lives_on():
    def forward(m, x):
        x = x * m.q
        part = x[:, :2]
        part += m.p  # x changes with it, and the model goes on with both
        part.tanh_()
        return x * 3 + part.sum(1, keepdim=True)

    assert_exact(Written(forward, p=torch.randn(2), q=torch.randn(3)), torch.randn(5, 3))


def test_unsupported_use_before_one_in_place():
    """The graph of an operator in place goes on into what was there before; that is not its own."""

    def forward(m, x):
        x = torch.maximum(x, m.p)
        x[:, :2] += m.p[:2]
        x[:, 2:] *= m.p[2:]
        return x

    assert_fallback(Written(forward, p=torch.randn(3)), torch.randn(5, 3), "p: used by maximum")


def test_inputs_modified_after_use_are_refused():
    def forward(m, x):
        hidden = x * 2
        y = m.l0(hidden)
        hidden += 1
        return m.l1(y) + m.l1(hidden)

    model, x = linears(forward, (3, 3), (3, 2)), torch.randn(5, 3)
    with pytest.raises(kf.UnsupportedError, match=r"l0\.weight: the input of this layer was modified in place"):
        kf.estimate(model, x, kf.Gaussian())
    model.l0.weight.requires_grad_(False)  # a bias alone does not need them
    assert_exact(model, x)


def test_out_argument_is_torch_s_own_refusal():
    model = Written(lambda m, x: torch.add(x, m.p, out=torch.empty(5, 3)), p=torch.randn(3))
    with pytest.raises(RuntimeError, match="out="):
        kf.estimate(model, torch.randn(5, 3), kf.Gaussian())


def _twice(m, x):
    h = m.l0(x)
    part = h[:, :2]
    part.atan2_(m.p)
    part.tanh_()
    return h


def _by_another(m, x):
    h, met = m.l0(x), torch.maximum(x[:, :2], m.p)
    part = h[:, :2]
    part.atan2_(m.p)
    part *= met
    return h


def _transposed_twice(m, x):
    h = m.l0(x).t().sin()  # in memory as it was before
    part = h[:2].t()
    part.atan2_(m.p)
    part.tanh_()
    return h.t()


def _then_base(m, x):
    h = m.l0(x)
    h[:, :2].atan2_(m.p)
    return h.tanh_()


def _assigned(m, x):
    h = m.l0(x) * 1
    h[:, :2] = m.p
    h[:, :2] *= x[:, :2]
    return h


def _assigned_by_index(m, x):
    h = m.l0(x) * 1
    h[:, [0, 2]] = m.p
    return h * x[:, :1]


MEETINGS = [_twice, _by_another, _transposed_twice, _then_base, _assigned, _assigned_by_index]


@pytest.mark.parametrize("forward", MEETINGS)
def test_a_part_that_meets_a_parameter_and_is_changed_again(forward):
    """Seen: an assertion of torch's own, because the gradient of a view with another history was asked for."""
    model = Written(forward, l0=nn.Linear(3, 4), p=torch.randn(2))
    assert_fallback(model, torch.randn(5, 3), "p: used by (atan2|setitem)(, maximum)?")


@pytest.mark.parametrize("forward", MEETINGS)
def test_examples_that_are_coupled_after_a_part_met_a_parameter_are_refused(forward):
    """Seen: not refused, because no gradient arrived at the view."""

    def coupled(m, x):
        h = forward(m, x)
        return h - h.mean(0)

    model = Written(coupled, l0=nn.Linear(3, 4).requires_grad_(False), p=torch.randn(2))
    with pytest.raises(kf.UnsupportedError, match=r"atan2|setitem"):
        kf.estimate(model, torch.randn(5, 3), kf.Gaussian(), fit="diagonal")


def test_parts_that_meet_no_parameter_may_be_coupled():
    """Only the part of a tensor that a parameter went into is looked at."""

    def forward(m, x):
        h = torch.cat([x, x.sin()], 1) * m.q.detach()
        h[:, :2].atan2_(m.p)
        h[:, 2] = m.p[0]
        return torch.cat([h[:, :3], h[:, 3:] - h[:, 3:].mean(0)], 1) * x[:, :1]

    model = Written(forward, p=torch.randn(2), q=torch.randn(1))
    model.q.requires_grad_(False)
    assert_fallback(model, torch.randn(5, 3), "p: used by atan2, setitem")


def _doubled(b, q):
    b.mul_(2)


def _assigned_to(b, q):
    b[0] = q[0]


def _part_tripled(b, q):
    b[:2].mul_(3)


@pytest.mark.parametrize("change", [_doubled, _assigned_to, _part_tripled])
def test_vectors_that_were_computed_and_change_between_uses(change):
    """Seen: twice the right number, as gradients went back through what the vector had become."""

    def forward(m, x):
        b = m.p.exp() * 1
        y = (x + b).sin()
        change(b, m.q)
        return (y + b).tanh()

    model, x = Written(forward, p=torch.randn(3), q=torch.randn(3)), torch.randn(5, 3)
    for fit in ("diagonal", kf.Full(across_layers=True)):
        assert_exact(model, x, fit=fit)


def test_a_vector_that_is_assembled_is_a_layer():
    def forward(m, x):
        b = torch.zeros(3)
        b[0] = m.p[1]
        b[1:] = m.q[1:].exp()
        return (x + b).tanh()

    model, x = Written(forward, p=torch.randn(3), q=torch.randn(3)), torch.randn(5, 3)
    assert_exact(model, x, fit=kf.Full(across_layers=True))
    assert kf.coverage(model, x).complete


def test_what_is_a_view_of_data_for_torch_alone_has_a_gradient_of_its_own():
    """Seen: an error of torch's, as its base was asked for the gradient, and took no part in the graph."""
    forward = lambda m, x: m.o(torch.slice_inverse(x, m.p.exp(), 1) + x).tanh()  # noqa: E731
    model, x = Written(forward, p=torch.randn(4, 3), o=nn.Linear(3, 2)).double(), torch.randn(4, 3).double()
    assert torch.slice_inverse(x, model.p.exp(), 1)._base is x
    for fit in ("diagonal", "full"):
        assert_exact(model, x, fit=fit)
