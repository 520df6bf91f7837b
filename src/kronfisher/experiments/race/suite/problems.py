"""The problems: each in one place."""

from pathlib import Path

import torch
from torch import nn

from kronfisher.experiments import data
from kronfisher.experiments.data import Dataset, variants
from kronfisher.experiments.networks.adapted import adapt_
from kronfisher.experiments.networks.attention import gpt, vit
from kronfisher.experiments.networks.feedforward import autoencoder, mlp
from kronfisher.experiments.networks.language import decoder, lstm
from kronfisher.experiments.networks.normalised import convnext, normalised
from kronfisher.experiments.networks.reconstructing import convolutional_autoencoder, unet, vae
from kronfisher.experiments.networks.tabular import embedded, residual
from kronfisher.experiments.race.order import Order
from kronfisher.experiments.race.suite.problem import Problem, State, register

__all__: list[str] = []

STEPS = 600
"""Of the training before the fine-tuning."""


def fashion(folder: Path | None) -> Dataset:
    """All of Fashion-MNIST, as images."""
    return data.load("fashion-mnist", data_dir=folder)


def digits(folder: Path | None) -> Dataset:
    """All of MNIST, as images."""
    return data.load("mnist", data_dir=folder)


def flat(dataset: Dataset) -> Dataset:
    """20,000 training images as vectors."""
    dataset = dataset.head(20_000)
    return dataset.flat()


def images(dataset: Dataset) -> Dataset:
    """Images that are their own targets."""
    parts = dataset.train_inputs, dataset.train_inputs, dataset.test_inputs, dataset.test_inputs
    return Dataset(dataset.name, *parts, task="probabilities", outputs=784)


def small_token(dataset: Dataset, seed: int) -> nn.Module:
    """A vision transformer whose class token starts near zero, as timm's."""
    model = vit(1, 28, 10, patch=7, width=64, heads=4, depth=3, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        nn.init.trunc_normal_(model.token, std=1e-6)
    return model


def small_tables(dataset: Dataset, seed: int) -> nn.Module:
    """A GPT whose tables start as GPT-2's: with the default's a tied last layer has huge logits."""
    model = gpt(128, 64, width=64, heads=4, depth=2, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for table in (model.words, model.places):
            nn.init.normal_(table.weight, std=0.02)
    return model


def pretrained(folder: Path | None) -> State:
    """The weights of a decoder after some steps of AdamW on Shakespeare; the same everywhere but for rounding."""
    problem = Problem("letters", "", variants.letters, lambda dataset, seed: decoder(128, 64, seed=seed))
    loaded = problem.load(folder)
    model, order = loaded.model(0), Order(loaded.size, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS, 3e-5)
    for _ in range(STEPS):
        rows = order.take(32)
        optimizer.zero_grad()
        loaded.loss(model(loaded.dataset.train_inputs[rows]), loaded.dataset.train_targets[rows]).backward()
        optimizer.step()
        schedule.step()
    return model.state_dict()


def adapted(dataset: Dataset, seed: int, state: State) -> nn.Module:
    """The pre-trained decoder with products of rank four beside its frozen layers; its last layer is trained."""
    model = decoder(128, 64)
    model.load_state_dict(state)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return adapt_(model, rank=4)


for problem in (
    Problem(
        "curves",
        "dense auto-encoder",
        lambda folder: data.load("curves"),
        lambda d, seed: autoencoder((784, 400, 200, 100, 50, 25, 6), seed=seed),
        batch=128,
    ),
    Problem(
        "conv-autoencoder",
        "convolutional auto-encoder",
        lambda folder: images(fashion(folder)),
        lambda d, seed: convolutional_autoencoder(seed=seed),
        evaluated=1_000,
    ),
    Problem(
        "batch-norm",
        "batch-normalised convolutions",
        fashion,
        lambda d, seed: normalised("batch", 1, 10, seed=seed),
        batch=64,
    ),
    Problem(
        "group-norm",
        "layer- or group-normalised convolutions",
        digits,
        lambda d, seed: normalised("group", 1, 10, seed=seed),
        batch=64,
    ),
    Problem(
        "depthwise",
        "depthwise convolutions",
        fashion,
        lambda d, seed: convnext(1, 10, width=32, seed=seed),
        batch=64,
        evaluated=1_000,
    ),
    Problem("vit", "vision transformer", fashion, small_token, batch=64, evaluated=1_000),
    Problem("gpt-tied", "GPT, tied embeddings", variants.letters, small_tables, batch=32, evaluated=500),
    Problem(
        "gpt-untied",
        "GPT, untied embeddings",
        variants.words,
        lambda d, seed: decoder(d.outputs, d.input_shape[0], seed=seed),
        batch=32,
        evaluated=500,
    ),
    Problem("lstm", "recurrent text", variants.letters, lambda d, seed: lstm(128, seed=seed), batch=32, evaluated=500),
    Problem(
        "regression",
        "tabular regression",
        lambda folder: data.load("naval-propulsion-plant", data_dir=folder),
        lambda d, seed: mlp(16, (128, 128), 1, seed=seed),
    ),
    Problem(
        "categories",
        "tabular classification with embeddings",
        variants.binned,
        lambda d, seed: embedded(9, 32, 10, seed=seed),
    ),
    Problem("counts", "counts", variants.ink, lambda d, seed: mlp(448, (256, 256), 21, seed=seed)),
    Problem(
        "segmentation",
        "segmentation",
        variants.scenes,
        lambda d, seed: unet(1, 11, seed=seed),
        batch=16,
        evaluated=300,
    ),
    Problem(
        "residual-mlp",
        "residual perceptron with layer norm",
        lambda folder: flat(fashion(folder)),
        lambda d, seed: residual(784, 10, seed=seed),
    ),
    Problem(
        "perceptron",
        "perceptron",
        lambda folder: flat(fashion(folder)),
        lambda d, seed: mlp(784, (256, 256), 10, seed=seed),
    ),
    Problem(
        "coordinates",
        "an image as a function of coordinates",
        variants.pixels,
        lambda d, seed: mlp(2, (64, 64, 64), 1, activation="tanh", seed=seed),
        batch=None,
    ),
    Problem(
        "lora",
        "fine-tuning by LoRA",
        lambda folder: variants.descriptions(),
        adapted,
        batch=32,
        evaluated=500,
        pretrain=pretrained,
    ),
    Problem(
        "vae",
        "variational auto-encoder",
        lambda folder: digits(folder).reconstruction(),
        lambda d, seed: vae(784, seed=seed),
    ),
):
    register(problem)
