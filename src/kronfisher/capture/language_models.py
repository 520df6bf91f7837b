"""What labels mean to the language models of transformers: which token a position predicts, what a decoder reads."""

import re
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kronfisher.errors import DataError

__all__ = ["shift_labels", "with_decoder_inputs"]

_IGNORED = -100
# Labels of these models are those of the same tokens, and the output at a token predicts the next one. Transformers has
# no attribute that says so; its class names do, and a test compares them with the losses that the classes compute.
_LANGUAGE_MODEL = re.compile(
    r"(ForCausalLM|LMHeadModel|ModelWithLMHead|DoubleHeadsModel|ForConditionalGeneration|ForCausalImageModeling"
    r"|For(Vision|Protein)Text2Text|BertGenerationDecoder)$"
)
# These want labels that were shifted beforehand. Most are decoders of encoder-decoder models.
_SHIFTED_BEFORE = re.compile(
    r"((Bart|BigBirdPegasus|Blenderbot|BlenderbotSmall|CpmAnt|Marian|Mvp|Pegasus|ProphetNet|Speech2Text2|TrOCR|Whisper)"
    r"ForCausalLM|(XLNet|XLMWith|FlaubertWith)LMHeadModel)$"
)
# The decoders of these read shifted labels; that of FSMT reads the encoder's inputs, and its loss is of that.
_DECODES_LABELS = re.compile(r"((?<!FSMT)ForConditionalGeneration|MarianMTModel|EncoderDecoderModel)$")
_DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")


def shift_labels(labels: Tensor, outputs: Tensor, model: nn.Module) -> Tensor:
    """Move each label of a causal language model to the preceding token, as its own loss does; leave others alone.

    Args:
        labels: of the batch.
        outputs: logits; only ``[N, T, C]`` for labels ``[N, T]`` are those of a language model.
        model: the outermost of its modules that is known decides.
    """
    if outputs.ndim != 3 or labels.shape != outputs.shape[:2] or _is_encoder_decoder(model):
        return labels  # the decoder of an encoder-decoder model gets shifted labels as inputs
    for module in model.modules():
        name = type(module).__name__
        if _SHIFTED_BEFORE.search(name):
            return labels
        if _LANGUAGE_MODEL.search(name):
            return F.pad(labels[:, 1:], (0, 1), value=_IGNORED)
    return labels


def with_decoder_inputs(inputs: Mapping[str, Any], labels: Any, model: nn.Module, where: str) -> Mapping[str, Any]:
    """The inputs of an encoder-decoder model, with those of its decoder made of the labels where they are missing.

    So does the model itself where it is given labels. Without them it would fail, or read the encoder's inputs twice.

    Raises:
        DataError: the model does not say how.
    """
    if not isinstance(labels, Tensor) or any(key in inputs for key in _DECODER_INPUTS):
        return inputs
    if not _is_encoder_decoder(model) or not any(map(_decodes_labels, model.modules())):
        return inputs
    for module in model.modules():
        prepare = getattr(module, "prepare_decoder_input_ids_from_labels", None)
        if prepare is not None:
            return {**inputs, _DECODER_INPUTS[0]: prepare(labels)}
    raise DataError(
        f"{where}: {type(model).__name__} has an encoder and a decoder and does not say what its decoder reads for "
        f"given labels. Put {_DECODER_INPUTS[0]!r} into the batch."
    )


def _decodes_labels(module: nn.Module) -> bool:
    return _DECODES_LABELS.search(type(module).__name__) is not None


def _is_encoder_decoder(model: nn.Module) -> bool:
    """By the configuration of the model, or of the one in it where it is a plain wrapper."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return bool(getattr(next((config for config in configs if config is not None), None), "is_encoder_decoder", False))
