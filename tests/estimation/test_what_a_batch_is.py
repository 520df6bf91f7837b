"""What a batch is taken for: lists of two tensors, masks in the place of targets, packed sequences, labels alone."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, TensorDataset

import kronfisher as kf
from kronfisher.errors import DataError
from tests.helpers.checks import assert_exact
from tests.helpers.networks import Written

N = 8


def autoencoder():
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3))


def test_a_list_of_two_tensors_is_refused_with_both_readings():
    x, y, model = torch.randn(N, 3), torch.randn(N, 3), autoencoder()
    batch = next(iter(DataLoader(TensorDataset(x, y), batch_size=N)))
    assert isinstance(batch, list)
    for data in (batch, [x.numpy(), y.numpy()]):
        for read in (kf.estimate, kf.coverage):
            with pytest.raises(
                DataError, match=r"list of two tensors of one length.*tuple\(data\).*for inputs in data"
            ):
                read(model, data, kf.Gaussian()) if read is kf.estimate else read(model, data)
    assert kf.estimate(model, tuple(batch), kf.Gaussian()).count == N
    fisher = kf.estimate(model, [(inputs,) for inputs in batch], kf.Gaussian())
    assert fisher.count == 2 * N
    with pytest.raises(DataError, match="list of two tensors"):
        fisher.error(batch)
    # parts of one tensor, other lengths and other numbers of batches are batches
    for data in (list(x.split(4)), [x[:5], y[:4]], [x, y, x], [batch, batch]):
        kf.estimate(model, data, kf.Gaussian())


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, ids, mask=None):
        return self.head(self.embedding(ids).tanh())


def test_what_was_taken_for_targets_is_reported():
    ids, targets = torch.randint(7, (N, 5)), torch.randint(7, (N, 5))
    fisher = kf.estimate(Tokens(), [(ids, targets), (ids[:3], targets[:3])], kf.Categorical(class_dim=-1))
    assert "targets: int64 [8, 5] a batch" in " ".join(str(fisher.report()).split())
    assert "targets" not in kf.estimate(Tokens(), ids, kf.Categorical(class_dim=-1)).report().facts
    weighted = kf.estimate(Tokens(), (ids, (targets, torch.ones(N))), kf.Weighted(kf.Categorical(class_dim=-1)))
    assert weighted.report().facts["targets"] == "tuple"


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_masks_in_the_place_of_targets(dtype):
    ids, mask = torch.randint(7, (N, 5)), torch.ones(N, 5)
    data = (ids, mask.to(dtype))
    with pytest.warns(UserWarning, match="taken for its targets, which this estimate does not need") as caught:
        kf.estimate(Tokens(), data, kf.Categorical(class_dim=-1), labels="exact")
    assert "mask=lambda batch: batch[0][1]" in str(caught[0].message)
    with pytest.raises(DataError, match=r"integer class indices, found torch\.bool"):
        kf.estimate(Tokens(), (ids, mask.bool()), kf.Categorical(class_dim=-1))
    mask[:, 3:] = 0  # the advice
    data = (ids, mask.to(dtype))
    fisher = kf.estimate(
        Tokens(), (data,), kf.Categorical(class_dim=-1), mask=lambda batch: batch[0][1], labels="exact"
    )
    assert fisher.info.blocks["embedding.weight"].rows == int(mask.sum())


def test_labels_that_are_labels_are_not_doubted():
    ids, x = torch.randint(7, (N, 5)), torch.randn(N, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kf.estimate(
            Tokens(), (ids, torch.ones(N, 5, dtype=torch.long)), kf.Categorical(class_dim=-1), labels="observed"
        )
        kf.estimate(autoencoder(), (x, torch.ones(N, 3, dtype=torch.bool)), kf.Bernoulli())
        kf.estimate(autoencoder(), (x, torch.ones(N, 3, dtype=torch.long)), kf.Poisson())
        kf.estimate(autoencoder(), (x, torch.ones(N, dtype=torch.long)), kf.Categorical())


def test_packed_sequences_are_one_input():
    sequences = [torch.randn(n, 3) for n in (4, 3, 2)]
    model = Written(lambda m, x: m.head(m.rnn(x)[1][-1]), rnn=nn.GRU(3, 4, bias=False), head=nn.Linear(4, 2))
    packed = pack_sequence(sequences)
    alone = [kf.estimate(model, pack_sequence([s]), kf.Gaussian(), fit="full", labels="exact") for s in sequences]
    mean = sum(fisher.to_dense() for fisher in alone) / 3
    for data in (packed, (packed, torch.randn(3, 2)), [(packed,)]):
        found = assert_exact(model, packed, truth=mean) if data is packed else None
        found = found or kf.estimate(model, data, kf.Gaussian(), fit="full", labels="exact")
        torch.testing.assert_close(found.to_dense(), mean)
    kf.estimate(model, [(packed,), (pack_sequence(sequences[:2]),)], kf.Gaussian(), fit="ekfac")


def test_labels_alone():
    with pytest.raises(DataError, match="batch 0 has labels and no inputs"):
        kf.estimate(Tokens(), {"labels": torch.randint(7, (N, 5))}, kf.Categorical(class_dim=-1))


def test_gradients_that_are_none():
    model = autoencoder()
    fisher = kf.estimate(model, torch.randn(N, 3), kf.Gaussian()) + 1.0
    model[2](torch.randn(2, 2)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for use in (fisher.solve, fisher.__matmul__):
        with pytest.raises(DataError, match=r"0\.weight is NoneType, 0\.bias is NoneType.*torch\.zeros_like"):
            use(gradients)
    filled = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    assert not fisher.solve(filled)["0.weight"].any()


def test_a_model_that_changes_its_inputs():
    model = Written(lambda m, x: m.l(x.mul_(1.1)), l=nn.Linear(3, 2))
    for data in ([torch.randn(N, 3)], [torch.randn(N, 3)[None][0]]):
        with pytest.raises(DataError, match=r"the model modifies its inputs in place.*x = x\.clone\(\)"):
            kf.estimate(model, data, kf.Gaussian(), fit="ekfac")
    loader = DataLoader(TensorDataset(torch.randn(N, 3)), batch_size=4)  # which makes its batches anew
    kf.estimate(model, loader, kf.Gaussian(), fit="ekfac")
    copying = Written(lambda m, x: m.l(x.clone().mul_(1.1)), l=nn.Linear(3, 2))
    kf.estimate(copying, [torch.randn(N, 3)], kf.Gaussian(), fit="ekfac")
