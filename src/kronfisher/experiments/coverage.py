"""The coverage of networks as people have them: ``python -m kronfisher.experiments.coverage > docs/coverage.md``.

The networks of the ``transformers`` and ``peft`` libraries are built from configurations with random weights; nothing
is downloaded; they need the extra ``kronfisher[transformers]``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from kronfisher.capture.forward import Forward
from kronfisher.estimation.coverage import Coverage, coverage
from kronfisher.experiments.networks import resnet
from kronfisher.experiments.networks.attention import gpt, separable, vit

__all__ = ["EXTERNAL", "NETWORKS", "Subject", "page"]

WORDS = 40  # in the vocabularies here


@dataclass(frozen=True)
class Subject:
    """A network to look at.

    Attributes:
        model: in eval mode.
        batch: inputs of a few data.
        forward: how they go through it, as for `estimate`.
    """

    model: nn.Module
    batch: Tensor
    forward: Forward | None = None

    def coverage(self, fit: str = "kfac") -> Coverage:
        """The report, without an estimate."""
        return coverage(self.model, self.batch, fit=fit, forward=self.forward)


def _tokens(rows: int = 3, length: int = 6) -> Tensor:
    return torch.randint(3, WORDS, (rows, length), generator=torch.Generator().manual_seed(0))


def _images(channels: int, side: int) -> Tensor:
    return torch.randn(3, channels, side, side, generator=torch.Generator().manual_seed(0))


def _logits(model: nn.Module, batch: Tensor) -> tuple[Tensor, None]:
    return model(batch).logits, None


NETWORKS: dict[str, Callable[[], Subject]] = {
    "A small vision transformer": lambda: Subject(vit(1, 8, 10).eval(), _images(1, 8)),
    "A small GPT": lambda: Subject(gpt(WORDS, 8).eval(), _tokens()),
    "A ResNet with batch normalisation": lambda: Subject(resnet(1, 8, 10).eval(), _images(1, 8)),
    "A ResNet with depthwise convolutions": lambda: Subject(separable(1, 8, 10).eval(), _images(1, 8)),
}
"""Title → builder of networks that need nothing but torch."""


def _external(kind: str, config: str, **options: Any) -> Callable[[], Subject]:
    def build() -> Subject:
        transformers = import_module("transformers")
        settings = getattr(transformers, config)(**options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(transformers, kind)(settings).eval()
        batch = _tokens() if "vocab_size" in options else _images(3, 8)
        return Subject(model, batch, _logits)

    return build


_SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
_TEXT = {"vocab_size": WORDS, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_gpt2 = _external("GPT2LMHeadModel", "GPT2Config", n_positions=8, n_embd=8, n_layer=2, n_head=2, **_TEXT)


def _with_adapters() -> Subject:
    plain, peft = _gpt2(), import_module("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Subject(peft.get_peft_model(plain.model, config).eval(), plain.batch, _logits)


EXTERNAL: dict[str, Callable[[], Subject]] = {
    "GPT-2 (transformers)": _gpt2,
    "BERT (transformers)": _external("BertForMaskedLM", "BertConfig", max_position_embeddings=8, **_SMALL, **_TEXT),
    "Llama (transformers)": _external(
        "LlamaForCausalLM", "LlamaConfig", num_key_value_heads=1, max_position_embeddings=8, **_SMALL, **_TEXT
    ),
    "ViT (transformers)": _external(
        "ViTForImageClassification", "ViTConfig", image_size=8, patch_size=4, num_labels=5, **_SMALL
    ),
    "ResNet (transformers)": _external(
        "ResNetForImageClassification", "ResNetConfig",
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=5, layer_type="basic",
    ),
    "GPT-2 with low-rank adapters (peft)": _with_adapters,
}  # fmt: skip
"""Title → builder of networks of other libraries."""

HEAD = """# Coverage

The report of `kronfisher.coverage(model, batch)` for some networks: which operators of torch use each parameter, and
how `estimate(..., fit="kfac")` would treat it. Nothing is skipped in silence: coverage is proved on the autograd graph,
and a parameter that is used in a way that is not understood gets the exact diagonal from per-example gradients, is
listed as `fallback` with the reason, and raises under `estimate(..., strict=True)`.

This page is written by `python -m kronfisher.experiments.coverage > docs/coverage.md`, with random weights.
"""


def page() -> str:
    """The text of ``docs/coverage.md``.

    Raises:
        ImportError: transformers or peft are missing; ``pip install "kronfisher[transformers]"``.
    """
    try:
        versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "peft"))
    except ImportError as error:
        raise ImportError('this page needs transformers and peft; pip install "kronfisher[transformers]"') from error
    parts = [HEAD]
    for title, build in {**NETWORKS, **EXTERNAL}.items():
        parts.append(f"## {title}\n\n```\n{build().coverage()}\n```\n")
    parts.append(f"Networks of other libraries: {versions}.\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
