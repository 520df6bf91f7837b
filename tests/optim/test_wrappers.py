"""Libraries that wrap optimisers and models, or run the loop themselves."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import kronfisher as kf
from tests.helpers.optional import require
from tests.helpers.training import batches, network, weights

QUIET = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of other libraries


@QUIET
def test_accelerate():
    accelerate = require("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model, plain = network(), network()
    optimizer, expected = (kf.NaturalGradient(m, kf.Categorical()) for m in (model, plain))
    prepared, wrapped = accelerator.prepare(model, optimizer)
    x, y = batches(1)[0]
    accelerator.backward(cross_entropy(prepared(x), y))
    with pytest.raises(kf.UnsupportedError, match=r"optimizer\.attach"):
        wrapped.step()
    optimizer.attach()
    expected.attach()
    for x, y in batches(8):
        for run, step in ((prepared, wrapped), (plain, expected)):
            step.zero_grad()
            accelerator.backward(cross_entropy(run(x), y))
            step.step()
    assert torch.equal(weights(model), weights(plain)) and not torch.equal(weights(model), weights(network()))
    assert optimizer.report().overdue == 0


@QUIET
def test_the_trainer_of_transformers(tmp_path):
    transformers = require("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=11, n_positions=12, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    tokens = (torch.arange(64)[:, None] + torch.arange(12)) % 11
    data = [{"input_ids": row, "labels": row} for row in tokens]
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    optimizer.attach()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=20, per_device_train_batch_size=8, gradient_accumulation_steps=2,
        report_to=[], logging_steps=5, save_strategy="no", use_cpu=True, disable_tqdm=True, max_grad_norm=1.0,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, scheduler))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert optimizer.steps == 20 and optimizer.report().overdue == optimizer.report().skipped == 0


@QUIET
def test_peft_trains_its_adapters_alone():
    peft = require("peft")
    base = network()
    frozen = weights(base).clone()
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0", "2"]))
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    x, _ = batches(1, n=64)[0]
    y = x.argmax(1) % 3
    losses = [float(optimizer.step(lambda: model(x), y)) for _ in range(40)]
    assert losses[-1] < 0.8 * losses[0] and not optimizer.report().uncovered
    own = torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "lora" not in n])
    assert torch.equal(own, frozen)


def test_a_copy_of_an_attached_model_is_saved_and_loaded(tmp_path):
    model, (x, y) = network(nn.Identity()), batches(1)[0]
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    optimizer.attach()
    cross_entropy(model(x), y).backward()
    optimizer.step()
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(again(x), model(x))
