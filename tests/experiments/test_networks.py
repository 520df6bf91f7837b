"""Networks: they fit their data, are what their papers say, and depend on their seed alone."""

import pytest
import torch
from torch import nn

from kronfisher.experiments import data, networks, training
from kronfisher.experiments.data import Dataset
from kronfisher.experiments.networks.adapted import adapt_
from kronfisher.experiments.networks.language import decoder, lstm
from kronfisher.experiments.networks.normalised import convnext, normalised
from kronfisher.experiments.networks.reconstructing import convolutional_autoencoder, unet, vae
from kronfisher.experiments.networks.tabular import embedded, residual
from tests.helpers.close import close


def tiny(shape, outputs, name="tiny"):
    inputs = torch.rand(3, *shape)
    return Dataset(name, inputs, torch.zeros(3, outputs), inputs, torch.zeros(3, outputs), "values", outputs)


@pytest.mark.parametrize("name", ["mlp", "convnet", "lenet5", "resnet", "alexnet"])
@pytest.mark.parametrize(("shape", "outputs"), [((1, 28, 28), 10), ((3, 12, 12), 4), ((1, 8, 8), 10), ((64,), 2)])
def test_networks_fit_their_data(name, shape, outputs):
    dataset = tiny(shape, outputs)
    model = networks.for_data(name, dataset).eval()
    assert model(dataset.test_inputs).shape == (3, outputs)


@pytest.mark.parametrize(("name", "pixels"), [("curves", 784), ("mnist", 784), ("faces", 625), ("digits", 64)])
def test_autoencoders_have_the_published_widths(name, pixels):
    dataset = tiny((pixels,), pixels, name)
    model = networks.for_data("autoencoder", dataset)
    widths = {
        "curves": [400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784],
        "mnist": [1000, 500, 250, 30, 250, 500, 1000, 784],
        "faces": [2000, 1000, 500, 30, 500, 1000, 2000, 625],
        "digits": [48, 24, 6, 24, 48, 64],
    }[name]
    assert [m.out_features for m in model if isinstance(m, nn.Linear)] == widths
    assert sum(isinstance(m, nn.Sigmoid) for m in model) == len(widths) - 2  # neither the code nor the output
    assert isinstance(model[-1], nn.Linear)
    assert model(dataset.test_inputs).shape == (3, pixels)


def test_sparse_initialisation():
    model = networks.autoencoder((784, 400, 6), seed=0)
    for layer in model:
        if isinstance(layer, nn.Linear):
            assert ((layer.weight != 0).sum(1) == min(15, layer.in_features)).all()
            assert (layer.bias == 0).all()
    values = model[0].weight[model[0].weight != 0]
    assert values.mean().abs() < 0.05 and (values.std() - 1).abs() < 0.05


def test_rectified_autoencoder_rectifies_its_code_and_keeps_signals_alive():
    model = networks.autoencoder((784, 400, 200, 100, 50, 25, 6), activation="relu", seed=0)
    kinds = [type(m) for m in model]
    assert kinds == [nn.Linear, nn.ReLU] * 11 + [nn.Linear]
    size = model(torch.rand(50, 784)).square().mean().sqrt()
    assert 0.01 < size < 10
    with pytest.raises(ValueError, match='"sigmoid" or "relu"'):
        networks.autoencoder((784, 400, 6), activation="tanh")


def test_lenet5_is_lenet5():
    model = networks.for_data("lenet5", tiny((1, 28, 28), 10))
    shapes = [tuple(p.shape) for p in model.parameters() if p.ndim > 1]
    assert shapes == [(6, 1, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84)]


@pytest.mark.parametrize("name", ["mlp", "convnet", "lenet5", "resnet"])
def test_initial_weights_depend_on_the_seed_alone(name):
    dataset = tiny((1, 8, 8), 10)
    before = torch.get_rng_state()
    first, other = networks.for_data(name, dataset, seed=1), networks.for_data(name, dataset, seed=2)
    torch.rand(5)
    again = networks.for_data(name, dataset, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(first.parameters(), other.parameters(), strict=True))
    torch.set_rng_state(before)
    networks.for_data(name, dataset, seed=1)
    assert torch.equal(before, torch.get_rng_state())


def test_table_networks_have_one_hidden_layer_of_50():
    assert [tuple(p.shape) for p in networks.for_data("mlp", tiny((13,), 1)).parameters()] == [
        (50, 13),
        (50,),
        (1, 50),
        (1,),
    ]


@pytest.mark.parametrize(
    ("name", "dataset", "message"),
    [
        ("vgg", tiny((1, 8, 8), 10), "no network 'vgg'.*lenet5"),
        ("lenet5", tiny((13,), 1), r"lenet5 takes square images.*\[13\]"),
        ("resnet", tiny((1, 8, 9), 2), "square images"),
        ("alexnet", tiny((1, 7, 7), 2), "at least 8×8 pixels"),
        ("autoencoder", tiny((1, 8, 8), 10), "64 inputs and 10 outputs"),
        ("autoencoder", tiny((13,), 13), "784, 625, 64 pixels"),
    ],
)
def test_what_does_not_fit_is_refused(name, dataset, message):
    with pytest.raises(ValueError, match=message):
        networks.for_data(name, dataset)


def test_activation_is_refused_where_there_is_none_to_choose():
    with pytest.raises(ValueError, match=r"lenet5 has its own units; .* mlp and autoencoder"):
        networks.for_data("lenet5", data.load("digits"), activation="tanh")


def letters(pieces=40, length=8):
    tokens = torch.arange(pieces * length + 1) % 5
    inputs, targets = (tokens[k : k + pieces * length].view(pieces, length) for k in (0, 1))
    return data.Dataset("letters", inputs, targets, inputs[:4], targets[:4], task="classes", outputs=5)


def test_text_is_for_the_gpt_and_learned():
    dataset = letters()
    model = networks.for_data("gpt", dataset)
    training.train(model, dataset, epochs=8, lr=0.01, batch_size=8)
    found = training.evaluate(model, dataset)
    assert found["accuracy"] == 1 and found["loss"] < 2  # eight letters, each the next of the alphabet
    for name, other in (("mlp", dataset), ("vit", dataset), ("gpt", data.load("digits"))):
        with pytest.raises(ValueError, match="do not go together"):
            networks.for_data(name, other)


def test_a_vision_transformer_takes_images_and_rows_of_pixels():
    assert networks.for_data("vit", tiny((3, 8, 8), 7))(torch.zeros(2, 3, 8, 8)).shape == (2, 7)
    assert networks.for_data("vit", tiny((64,), 7))(torch.zeros(2, 64)).shape == (2, 7)
    with pytest.raises(ValueError, match="a multiple of 4"):
        networks.for_data("vit", tiny((1, 10, 10), 7))


def test_the_suite_s_networks_have_the_outputs_of_their_data():
    images, tokens = torch.rand(3, 1, 28, 28), torch.randint(9, (3, 5))
    for norm in ("batch", "group", "layer"):
        assert normalised(norm, 1, 10)(images).shape == (3, 10)
    assert convnext(1, 10)(images).shape == (3, 10) and convolutional_autoencoder()(images).shape == images.shape
    assert unet(1, 11)(torch.rand(3, 1, 40, 40)).shape == (3, 11, 40, 40)
    assert decoder(9, 5)(tokens).shape == lstm(9)(tokens).shape == (3, 5, 9)
    assert embedded(5, 9, 4)(tokens).shape == (3, 4) and residual(7, 2)(torch.rand(3, 7)).shape == (3, 2)


def test_a_decoder_sees_no_later_token():
    tokens, model = torch.randint(9, (2, 5)), decoder(9, 5)
    other = tokens.clone()
    other[:, 3:] = 0
    close(model(tokens)[:, :3], model(other)[:, :3])
    assert not torch.allclose(model(tokens)[:, 4], model(other)[:, 4])


def test_a_variational_autoencoder_has_its_divergence_as_penalty():
    model, x = vae(6, hidden=4, code=2), torch.rand(5, 6)
    model(x)
    mean, logarithm = model.encoder(x).chunk(2, dim=1)
    posterior = torch.distributions.Normal(mean, (0.5 * logarithm).exp())
    divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    close(model.penalty, divergence)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_an_adapted_network_is_at_first_as_it_was_and_trains_only_what_was_added():
    model, tokens = decoder(9, 5), torch.randint(9, (2, 5))
    before = model(tokens)
    adapt_(model, rank=2)
    assert torch.equal(model(tokens), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    added = {name for name in trained if name.endswith(("down.weight", "up.weight")) and ".base." not in name}
    assert trained - added == {"head.weight"} and len(added) == 2 * 2 * 7
