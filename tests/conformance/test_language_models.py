"""The log likelihood of every language model of the installed transformers is the loss that it computes itself."""

import logging
import warnings

import pytest
import torch

import kronfisher as kf
from kronfisher.capture.forward import run
from tests.helpers.language_models import CAUSAL, OTHER, batch, classes, tiny
from tests.helpers.optional import require

transformers = require("transformers")

SHIFTED_BEFORE = (
    "BartForCausalLM", "BigBirdPegasusForCausalLM", "BlenderbotForCausalLM", "BlenderbotSmallForCausalLM",
    "CpmAntForCausalLM", "FlaubertWithLMHeadModel", "MBartForCausalLM", "MarianForCausalLM", "MvpForCausalLM",
    "PLBartForCausalLM", "PegasusForCausalLM", "ProphetNetForCausalLM", "TrOCRForCausalLM", "WhisperForCausalLM",
    "XLMWithLMHeadModel", "XLNetLMHeadModel",
)  # fmt: skip
SOME = (
    *SHIFTED_BEFORE, "BertGenerationDecoder", "GPT2DoubleHeadsModel", "GPT2LMHeadModel", "LlamaForCausalLM",
    "LlavaForConditionalGeneration", "OPTForCausalLM", "T5ForConditionalGeneration", "BartForConditionalGeneration",
    "MarianMTModel", "FSMTForConditionalGeneration", "RobertaForCausalLM",
)  # fmt: skip


@pytest.fixture(autouse=True)
def quiet():
    """Many classes advise about settings that make no difference here."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings(action="ignore"):
        yield
    logging.disable(before)


def losses(model, data):
    """The model's own, and ours, as means over the labels that count."""
    with torch.no_grad():
        own = model(**data).loss
        outputs, targets = run(model, data, None, torch.device("cpu"), "batch 0")
    likelihood = kf.Categorical()
    likelihood.check(outputs, targets, labels="observed")
    count = likelihood.positions(outputs, targets).sum()
    return float(own), float(-likelihood.log_likelihood(outputs, targets) / count)


@pytest.mark.parametrize("name", SOME)
def test_the_log_likelihood_is_the_models_own_loss(name):
    """Seen: labels shifted twice for decoders that want shifted ones, and never for models of images and text."""
    own, ours = losses(tiny(getattr(transformers, name)), batch())
    assert ours == pytest.approx(own, rel=2e-6)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("pattern", "least"), [(CAUSAL, 150), (OTHER, 75)])
def test_the_log_likelihood_is_the_own_loss_of_every_class_that_can_be_built(pattern, least):
    wrong, done, failed = {}, [], {}
    for name, kind in classes(pattern).items():
        try:
            model, data = tiny(kind), batch()
            with torch.no_grad():
                assert model(**data).loss is not None
        except Exception as error:  # needs images, sound or sizes of its own
            failed[name] = error
            continue
        try:
            own, ours = losses(model, data)
        except kf.DataError as error:
            failed[name] = error
            continue
        done.append(name)
        if ours != pytest.approx(own, rel=2e-6):
            wrong[name] = (own, ours)
    assert not wrong and len(done) >= least, failed


def test_decoders_whose_inputs_labels_do_not_tell_want_them():
    """Seen: the decoder read the encoder's inputs, and its outputs were compared with the labels."""
    model, data = tiny(transformers.BlenderbotForConditionalGeneration), batch()
    with pytest.raises(kf.DataError, match=r"batch 0: Blenderbot.* Put 'decoder_input_ids' into the batch"):
        losses(model, data)
    own, ours = losses(model, {**data, "decoder_input_ids": data["input_ids"]})
    assert ours == pytest.approx(own, rel=2e-6)
