"""Batches, labels and masks of the real classes of transformers, against the losses that they compute themselves."""

import pytest
import torch

import kronfisher as kf
from kronfisher.capture.batches import as_batches
from kronfisher.capture.forward import run
from tests.helpers.optional import require

transformers = require("transformers")

SIZES = {
    "vocab_size": 17, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 16,
}  # fmt: skip


def encoding(labels):
    """A padded batch as a tokenizer returns it."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 17, (3, 6), generator=generator)
    mask = (torch.arange(6) < torch.tensor([[6], [4], [2]])).long()
    if labels == "tokens":
        labels = ids.masked_fill(mask == 0, -100)
    elif labels == "sequence":
        labels = torch.tensor([0, 2, 1])
    return transformers.BatchEncoding({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})


def causal():
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=False)
    return transformers.LlamaForCausalLM(config), "lm_head"


def older_causal():
    config = transformers.GPT2Config(vocab_size=17, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    return transformers.GPT2LMHeadModel(config), "transformer.ln_f"


def masked():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)), "cls.predictions.transform.dense"


def sequence():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=3)), "classifier"


def tokens():
    return transformers.BertForTokenClassification(transformers.BertConfig(**SIZES, num_labels=17)), "classifier"


MODELS = {"tokens": [causal, older_causal, masked, tokens], "sequence": [sequence]}
CASES = [(make, kind) for kind, several in MODELS.items() for make in several]
cases = pytest.mark.parametrize(("make", "kind"), CASES, ids=lambda x: getattr(x, "__name__", x))


def built(make):
    """The model, in which only one layer is trained."""
    torch.manual_seed(0)
    model, name = make()
    model = model.eval().requires_grad_(False)
    model.get_submodule(name).requires_grad_(True)
    return model.double()


@cases
def test_the_loss_is_the_models_own(make, kind):
    """What is run and what the labels are: the mean of our loss over counted positions is the loss of the model."""
    model, batch = built(make), encoding(kind)
    assert as_batches(batch) == ([batch], True)
    outputs, targets = run(model, batch, None, torch.device("cpu"), "batch 0")
    likelihood = kf.Categorical()
    likelihood.check(outputs.detach(), targets, labels="observed")
    mask = likelihood.positions(outputs, targets)
    assert mask is not None
    loss = -likelihood.log_prob(outputs, targets).sum() / mask.sum()
    torch.testing.assert_close(loss.float(), model(**batch).loss.float())  # some compute theirs in float32


@cases
def test_estimates_agree_with_autograd(make, kind):
    model, batch = built(make), encoding(kind)
    fisher = kf.estimate(model, [batch], kf.Categorical(), fit="full", labels="observed")
    truth = torch.zeros_like(fisher.to_dense())
    for k in range(3):
        alone = {key: value[k : k + 1] for key, value in batch.items()}
        found = model(**alone)
        count = (alone["labels"] != -100).sum() - int(make in (causal, older_causal))  # the loss is a mean over tokens
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(found.loss * count, parameters)])
        truth += torch.outer(gradient, gradient) / 3
    blocks = fisher.to_dense() != 0
    assert truth.norm() > 1e-6 and blocks.any()
    assert (fisher.to_dense() - truth * blocks).norm() < 1e-6 * truth.norm()


def test_the_attention_mask_makes_padding_nothing():
    model, batch = built(tokens), encoding("tokens")
    del batch["labels"]
    longer = {key: torch.nn.functional.pad(value, (0, 3)) for key, value in batch.items()}
    likelihood, options = kf.Categorical(class_dim=-1), {"mask": "attention_mask", "labels": "exact"}
    short, long = (kf.estimate(model, data, likelihood, **options) for data in (batch, longer))
    assert short.rows == long.rows and set(short.rows.values()) == {12}
    torch.testing.assert_close(short.to_dense(), long.to_dense())
    unmasked = kf.estimate(model, longer, likelihood, labels="exact")
    assert (unmasked.to_dense() - short.to_dense()).norm() > 1e-2 * short.to_dense().norm()


def test_models_without_logits_say_what_they_return():
    model = transformers.BertModel(transformers.BertConfig(**SIZES)).eval()
    batch = encoding("tokens")
    with pytest.raises(kf.DataError, match=r"returned BaseModelOutput.* with keys \['last_hidden_state'.*not a tensor"):
        kf.estimate(model, batch, kf.Categorical())
