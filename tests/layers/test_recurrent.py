"""Recurrent layers in all their ways: what torch computes, exact where fits are exact, and as written with F.linear."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import kronfisher as kf
from kronfisher.capture.capture import Capture
from kronfisher.capture.graph import walk
from kronfisher.fits import FITS
from kronfisher.layers.recurrent import StepUse
from tests.helpers.checks import assert_exact
from tests.helpers.networks import Written
from tests.helpers.truth import exact_fisher

N, T, I, H = 3, 4, 2, 3  # examples, steps, widths

LENGTHS = torch.tensor([2, 4, 3])


def inputs(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).double()


def layer(kind, seed=0, **options):
    torch.manual_seed(seed)
    return kind(I, H, **options).double()


def padded(module):
    """Outputs at all steps, examples first."""

    def forward(m, x):
        outputs = m.l(x if module.batch_first else x.transpose(0, 1))[0]
        return (outputs if module.batch_first else outputs.transpose(0, 1)).tanh()

    return Written(forward, l=module)


def packed(module, lengths=LENGTHS, **options):
    """Outputs at all steps of sequences of different lengths, which are packed."""

    def forward(m, x):
        sequences = pack_padded_sequence(x, lengths, batch_first=True, **options)
        return pad_packed_sequence(m.l(sequences)[0], batch_first=True, total_length=T)[0].tanh()

    return Written(forward, l=module)


def last_states(module):
    """The last hidden states of all layers, and the last cells of an LSTM."""

    def forward(m, x):
        states = m.l(x.transpose(0, 1))[1]
        return torch.cat(states if isinstance(states, tuple) else (states,), dim=-1).transpose(0, 1).flatten(1)

    return Written(forward, l=module)


MODELS = {
    "lstm": lambda: padded(layer(nn.LSTM)),
    "lstm, two directions and layers": lambda: padded(layer(nn.LSTM, num_layers=2, bidirectional=True)),
    "lstm, batch first, no biases": lambda: padded(layer(nn.LSTM, batch_first=True, bias=False)),
    "lstm, projected": lambda: padded(layer(nn.LSTM, proj_size=2, num_layers=2, batch_first=True, bidirectional=True)),
    "gru": lambda: padded(layer(nn.GRU)),
    "gru, two directions and layers": lambda: padded(layer(nn.GRU, num_layers=2, bidirectional=True)),
    "gru, no biases": lambda: padded(layer(nn.GRU, bias=False, batch_first=True)),
    "rnn": lambda: padded(layer(nn.RNN, num_layers=2)),
    "rnn, relu, no biases": lambda: padded(layer(nn.RNN, 1, nonlinearity="relu", bias=False, bidirectional=True)),
    "packed lstm": lambda: packed(layer(nn.LSTM, num_layers=2, bidirectional=True), enforce_sorted=False),
    "packed lstm, projected": lambda: packed(layer(nn.LSTM, proj_size=2), enforce_sorted=False),
    "packed gru": lambda: packed(layer(nn.GRU, bidirectional=True), enforce_sorted=False),
    "packed rnn, sorted": lambda: packed(layer(nn.RNN, bidirectional=True), lengths=torch.tensor([4, 2, 1])),
    "last states of an lstm": lambda: last_states(layer(nn.LSTM, num_layers=2, bidirectional=True)),
    "last states of a gru": lambda: last_states(layer(nn.GRU, num_layers=2)),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_way(name):
    model, x = MODELS[name](), inputs(N, T, I)
    with Capture(dict(model.named_parameters())) as capture:
        seen = model(x)
    assert torch.allclose(seen, model(x), rtol=0, atol=1e-12)
    assert walk(capture.recording, seen).unclaimed == {}
    truth = exact_fisher(model, x)
    fisher = assert_exact(model, x, fit=kf.Full(across_layers=True), tolerance=1e-10, truth=truth)
    assert fisher.dim == sum(p.numel() for p in model.parameters())
    assert_exact(model, x, fit="full", tolerance=1e-10, truth=truth)
    assert_exact(model, x, fit="diagonal", tolerance=1e-10, truth=truth)
    coverage = kf.coverage(model, x)
    assert coverage.complete and coverage.share == 1
    matrices = sum(p.dim() > 1 for p in model.parameters())
    kfac = kf.estimate(model, x, kf.Gaussian(), strict=True)
    assert len(kfac.blocks) == matrices and all(kfac[b].structure.startswith("kronecker") for b in kfac.blocks)


@pytest.mark.parametrize(
    "name",
    [
        "packed gru",
        pytest.param("packed lstm", marks=pytest.mark.slow),
        pytest.param("packed rnn, sorted", marks=pytest.mark.slow),
    ],
)
def test_packed_batches_of_other_lengths_and_orders_add_up(name):
    lengths = torch.tensor([4, 2, 1]) if "sorted" in name else LENGTHS.clone()
    module = MODELS[name]().l

    def forward(m, x):  # the lengths come with the data
        sequences = pack_padded_sequence(x[..., :I], x[:, 0, I].long(), batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(m.l(sequences)[0], batch_first=True, total_length=T)[0].tanh()

    model = Written(forward, l=module)
    one = torch.cat([inputs(N, T, I), lengths.double()[:, None, None].expand(N, T, 1)], dim=2)
    two = torch.cat([inputs(N, T, I).cos(), torch.tensor([1.0, 4.0, 4.0])[:, None, None].expand(N, T, 1)], dim=2)
    batches, truth = [(one,), (two,)], exact_fisher(model, [one, two])
    assert_exact(model, batches, fit=kf.Full(across_layers=True), tolerance=1e-10, truth=truth)
    assert_exact(model, batches, fit="diagonal", tolerance=1e-10, truth=truth)
    together, apart = (kf.estimate(model, x, kf.Gaussian(), labels="exact") for x in (batches, [*one.split(1), two]))
    assert torch.allclose(together.to_dense(), apart.to_dense(), atol=1e-12)


def written(kind, module, x, lengths=None):
    """One layer in one direction, step by step with F.linear, inputs ``[N, T, I]`` and outputs ``[N, T, H]``."""
    state = [x.new_zeros(len(x), H) for _ in range(2 if kind is nn.LSTM else 1)]
    outputs = []
    for t in range(x.shape[1]):
        before = F.linear(x[:, t], module.weight_ih_l0, module.bias_ih_l0)
        after = F.linear(state[0], module.weight_hh_l0, module.bias_hh_l0)
        if kind is nn.LSTM:
            i, f, g, o = (before + after).chunk(4, 1)
            cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
            state = [o.sigmoid() * cell.tanh(), cell]
        elif kind is nn.GRU:
            (r, z, n), (s, y, m) = before.chunk(3, 1), after.chunk(3, 1)
            z = (z + y).sigmoid()
            state = [(1 - z) * (n + (r + s).sigmoid() * m).tanh() + z * state[0]]
        else:
            state = [(before + after).tanh()]
        outputs.append(state[0])
    return torch.stack(outputs, dim=1)


def kinds_in_turn():
    """Every fit with every kind of layer; one kind for each fit is tried by default, the others are slow."""
    for place, fit in enumerate(fit for fit in FITS if fit not in ("auto", "tridiagonal")):
        for number, kind in enumerate((nn.LSTM, nn.GRU, nn.RNN)):
            yield pytest.param(kind, fit, marks=() if number == place % 3 else pytest.mark.slow)


@pytest.mark.parametrize(("kind", "fit"), [*kinds_in_turn()])
def test_the_same_as_written_with_linear(kind, fit):
    fused = Written(lambda m, x: m.l(x)[0].tanh(), l=layer(kind, batch_first=True))
    loop = Written(lambda m, x: written(kind, m.l, x).tanh(), l=fused.l)
    x = inputs(N, T, I)
    ours, theirs = (kf.estimate(model, x, kf.Gaussian(), fit=fit, strict=True) for model in (fused, loop))
    assert ours.to_dense().norm() > 0
    assert torch.allclose(ours.to_dense(), theirs.to_dense(), atol=1e-9)


CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CELLS)
def test_cells_in_a_loop(name, bias):
    def forward(m, x):
        state, outputs = None, []
        for t in range(T):
            state = m.cell(x[:, t], state)
            outputs.append(state[0] if name == "lstm" else state)
        return torch.stack(outputs, dim=1).tanh()

    model = Written(forward, cell=layer(CELLS[name], bias=bias))
    x = inputs(N, T, I)
    truth = exact_fisher(model, x)
    assert_exact(model, x, fit=kf.Full(across_layers=True), tolerance=1e-10, truth=truth)
    assert_exact(model, x, fit="diagonal", tolerance=1e-10, truth=truth)
    kfac = kf.estimate(model, x, kf.Gaussian(), strict=True)
    assert len(kfac.blocks) == 2
    module = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[name](I, H, batch_first=True, bias=bias).double()
    module.load_state_dict({f"{key}_l0": value for key, value in model.cell.state_dict().items()})
    fused = kf.estimate(Written(lambda m, x: m.l(x)[0].tanh(), l=module), x, kf.Gaussian(), strict=True)
    assert torch.allclose(kfac.to_dense(), fused.to_dense(), atol=1e-12)


def test_padding_counts_as_no_position():
    """K-FAC of packed sequences is that of the same sequences one by one, each without padding."""
    module = layer(nn.GRU, batch_first=True)
    x = inputs(N, T, I)
    together = kf.estimate(packed(module, enforce_sorted=False), x, kf.Gaussian(), labels="exact")
    alone = Written(lambda m, x: F.pad(m.l(x)[0].tanh(), (0, 0, 0, T - x.shape[1])), l=module)
    batches = [x[k : k + 1, :length] for k, length in enumerate(LENGTHS.tolist())]
    apart = kf.estimate(alone, batches, kf.Gaussian(), labels="exact")
    assert torch.allclose(together.to_dense(), apart.to_dense(), atol=1e-12)


@pytest.mark.parametrize("spread", ["expand", "repeat"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_learned_initial_states(kind, spread):
    def forward(m, x):
        sizes = (1, len(x), 1) if spread == "repeat" else (-1, len(x), -1)
        first = getattr(m.h, spread)(*sizes)
        state = (first, getattr(m.c, spread)(*sizes)) if kind is nn.LSTM else first
        return m.l(x.transpose(0, 1), state)[0].transpose(0, 1).tanh()

    members = {"h": inputs(1, 1, H), **({"c": inputs(1, 1, H).cos()} if kind is nn.LSTM else {})}
    model = Written(forward, l=layer(kind), **members)
    x = inputs(N, T, I)
    assert_exact(model, x, fit=kf.Full(across_layers=True), tolerance=1e-10)
    assert kf.coverage(model, x).complete


def test_states_that_come_from_another_layer():
    def forward(m, x):
        _, state = m.encoder(x.transpose(0, 1))
        return m.decoder(x.flip(1).transpose(0, 1), state)[0].transpose(0, 1).tanh()

    model = Written(forward, encoder=layer(nn.LSTM), decoder=layer(nn.LSTM, seed=1))
    x = inputs(N, T, I)
    assert_exact(model, x, fit=kf.Full(across_layers=True), tolerance=1e-10)
    assert kf.coverage(model, x).complete


@pytest.mark.parametrize("frozen", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "hh_l0", "ih_l0", "l0"])
def test_frozen_parts(frozen):
    model = Written(lambda m, x: m.o(m.l(x)[0]), l=layer(nn.GRU, batch_first=True), o=nn.Linear(H, 2).double())
    for name, p in model.l.named_parameters():
        p.requires_grad_(frozen not in name)
    x = inputs(N, T, I)
    assert_exact(model, x, fit=kf.Full(across_layers=True), tolerance=1e-10)
    assert kf.coverage(model, x).complete


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_dropout_draws_as_it_does_without_us(kind):
    module = layer(kind, num_layers=3, dropout=0.5)
    x = inputs(T, N, I)
    torch.manual_seed(3)
    plain = module(x)[0]
    torch.manual_seed(3)
    with Capture(dict(module.named_parameters())):
        seen = module(x)[0]
    assert torch.allclose(plain, seen, atol=1e-12)
    torch.manual_seed(4)
    assert not torch.allclose(plain, module(x)[0], atol=1e-3)


def test_a_second_derivative_through_the_steps_is_no_use_that_is_known():
    def forward(m, x):
        x = x.clone().requires_grad_()
        energy = m.l(x)[0].square().sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0].flatten(1)

    model = Written(forward, l=layer(nn.GRU, batch_first=True))
    x = inputs(N, T, I)
    assert not kf.coverage(model, x).complete
    assert_exact(model, x, fit=kf.Full(across_layers=True), tolerance=1e-10)


def test_weights_that_are_shared_by_both_directions_and_layers():
    """One tensor at several places of one kernel: uses of one block."""
    module = layer(nn.RNN, batch_first=True, bidirectional=True)
    module.weight_hh_l0_reverse, module.bias_ih_l0_reverse = module.weight_hh_l0, module.bias_ih_l0
    module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
    model = padded(module)
    assert_exact(model, inputs(N, T, I), fit=kf.Full(across_layers=True), tolerance=1e-10)


def test_half_precision_inside_autocast():
    model = Written(lambda m, x: m.l(x)[0].float(), l=nn.LSTM(I, H, batch_first=True))
    x = inputs(N, T, I).float()
    plain = kf.estimate(model, x, kf.Gaussian(), labels="exact").to_dense()
    with torch.autocast("cpu", torch.bfloat16):
        half = kf.estimate(model, x, kf.Gaussian(), labels="exact").to_dense()
    assert float((plain - half).norm() / plain.norm()) < 0.05


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_training_is_as_of_steps_written_with_linear(kind):
    x = inputs(20, T, I)
    y = (x[:, -1, 0] > 0).long()
    losses = []
    for forward in (lambda m, x: m.l(x)[0], lambda m, x: written(kind, m.l, x)):
        model = Written(
            lambda m, x, forward=forward: m.o(forward(m, x)[:, -1]),
            l=layer(kind, batch_first=True),
            o=nn.Linear(H, 2).double(),
        )
        optimizer = kf.NaturalGradient(model, kf.Categorical(), step=kf.QuadraticModel())
        losses.append(torch.tensor([float(optimizer.step(lambda m=model: m(x), y)) for _ in range(8)]))
        statistics = optimizer.parts.statistics
        assert not statistics.uncovered and len(statistics.layers) == 3
        assert optimizer.parts.step_size.exact, optimizer.parts.step_size.refusal
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("kind", "times"), [(nn.LSTM, 1), (nn.RNN, 1), (nn.GRU, 2)])
def test_gradients_of_gates_are_multiplied_once_where_inputs_and_hidden_states_have_the_same(kind, times, monkeypatch):
    """A GRU's reset gate multiplies those of the hidden states."""
    made, gradients = [], StepUse.gradients
    monkeypatch.setattr(StepUse, "gradients", lambda *args: made.append(1) or gradients(*args))
    fisher = kf.estimate(padded(layer(kind)), inputs(N, T, I), kf.Gaussian(), fit="kfac")
    assert len(made) == times
    of_inputs, of_hidden = (fisher[f"l.weight_{name}_l0"].B for name in ("ih", "hh"))
    assert torch.equal(of_inputs, of_hidden) == (times == 1)
