"""A model that was fine-tuned by adapters (LoRA), from its training to the data behind its predictions."""

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.fisher.layout import gather
from kronfisher.fisher.vectors import read
from tests.helpers.close import close
from tests.helpers.optional import require
from tests.helpers.truth import gradients


class Reader(nn.Module):
    """Tokens to the class of their sequence."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(12, 8)
        self.query, self.value, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, tokens):
        x = self.words(tokens)
        weights = (self.query(x) @ x.mT / 8**0.5).softmax(-1)
        return self.head((weights @ self.value(x)).tanh().mean(1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of other libraries
def test_a_model_fine_tuned_by_adapters_is_traced_back_to_its_training_data(tmp_path):
    peft = require("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(Reader().double(), peft.LoraConfig(r=2, target_modules=["query", "value", "head"]))
    x = torch.randint(12, (64, 6))
    y = (x < 4).sum(1).clamp_max(2)
    y[5] = (y[5] + 1) % 3  # a wrong label
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    train = [(x[k : k + 16], y[k : k + 16]) for k in range(0, 64, 16)]
    fisher = kf.estimate(model.eval(), train, kf.Categorical(), fit="ekfac", labels="exact")
    assert len(fisher.names) == 6 and all("lora" in name for name in fisher.names)
    influence = kf.Influence(model, fisher, kf.Categorical())
    queries = x[:10], y[:10]
    scores = influence.scores(train, queries)
    assert not scores.fallback

    rows = gradients(model, x, kf.Categorical().observed(model(x).detach(), y)[None])[0]
    matrix, (places, _) = fisher.to_dense(), read(torch.arange(fisher.dim), fisher.shapes)
    for (blocks, _), value in zip(fisher.entries, influence.damping.values(), strict=True):
        index = gather(blocks, places)[0]
        matrix[index, index] += value
    close(scores.values, rows[:10] @ torch.linalg.solve(matrix, rows.T) / 64, 1e-10)

    losses = -kf.Categorical().log_prob(model(x), y).detach()
    asked = losses[:10].topk(3).indices  # queries that still have a gradient; each is among the training data
    cosine = kf.Influence(model, fisher, kf.Categorical(), normalize="cosine").scores(train, queries)
    assert torch.equal(cosine.top(1).indices[asked, 0], asked)
    assert int(influence.self_scores(train).argmax()) == 5
    kept = influence.scores(train, queries, path=tmp_path / "scores")
    close(kept.values, scores.values, 1e-14)
    found = influence.index(train, tmp_path / "index", size=20).scores(queries)
    assert bool(((found.values - scores.values).abs() <= found.bounds * (1 + 1e-9)).all())
