"""Reports in the logs of other libraries."""

import sys

import pytest
import torch

import kronfisher as kf
from kronfisher.integrations import log_with_trainer, measurements
from tests.helpers.optional import require
from tests.helpers.training import batches, network

QUIET = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of other libraries


def test_measurements_are_those_of_the_report():
    model = network()
    optimizer = kf.NaturalGradient(model, kf.Categorical(), step=kf.QuadraticModel())
    for x, y in batches(7):
        optimizer.step(lambda x=x: model(x), y)
    found, report = measurements(optimizer), optimizer.report()
    assert found["kronfisher/damping"] == report.damping and found["kronfisher/step_size"] == report.step_size
    assert found["kronfisher/coverage"] == 1.0 and found["kronfisher/seconds"] > 0
    assert all(isinstance(value, float) for value in found.values())
    assert set(measurements(optimizer, "own.")) == {name.replace("kronfisher/", "own.") for name in found}


class Scaled(torch.nn.Module):
    """A network with numbers that are used in a way that no layer explains."""

    def __init__(self):
        super().__init__()
        self.first, self.odd = torch.nn.Linear(4, 3, bias=False), torch.nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.first(torch.cumsum(x * self.odd.sin(), 1))


def test_coverage_counts_numbers(recwarn):
    model = Scaled()
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    optimizer.step(lambda: model(torch.randn(30, 4)), torch.randint(3, (30,)))
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    outside = sum(sizes[name] for name in optimizer.report().uncovered)
    assert measurements(optimizer)["kronfisher/coverage"] == 1 - outside / 16


@QUIET
def test_a_trainer_logs_them_with_its_reporters(tmp_path):
    transformers = require("transformers")
    config = transformers.GPT2Config(vocab_size=7, n_positions=6, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    data = [{"input_ids": row, "labels": row} for row in (torch.arange(16)[:, None] + torch.arange(6)) % 7]
    seen = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **options):
            seen.append(dict(logs))

    optimizer = kf.NaturalGradient(model, kf.Categorical())
    optimizer.attach()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=8, report_to=[], logging_steps=2,
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    options = {"optimizers": (optimizer, scheduler), "callbacks": [Reporter()]}
    trainer = transformers.Trainer(model, arguments, train_dataset=data, **options)
    log_with_trainer(trainer, optimizer)
    trainer.train()
    for entries in (seen, trainer.state.log_history):
        ours = [entry for entry in entries if "kronfisher/coverage" in entry]
        assert len([entry for entry in entries if "loss" in entry]) == 3  # the trainer's own are there, too
        assert len(ours) == 3 and ours[-1]["kronfisher/seconds"] > ours[0]["kronfisher/seconds"] > 0
        assert 0.9 < ours[-1]["kronfisher/coverage"] <= 1.0


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"kronfisher\[transformers\]"):
        log_with_trainer(None, None)
