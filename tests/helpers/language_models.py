"""Tiny language models of every class that the installed transformers has, each from its own configuration."""

import inspect
import re
import warnings

import torch

from tests.helpers.optional import require

VOCABULARY, TOKENS, MOST = 17, 6, 20_000_000

SIZES = {
    **dict.fromkeys(("vocab_size",), VOCABULARY),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "intermediate_size", "embedding_size", "word_embed_proj_dim", "d_ff",
         "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), 16),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "decoder_layers", "encoder_layers",
         "num_attention_heads", "n_head", "num_key_value_heads", "num_heads", "decoder_attention_heads",
         "encoder_attention_heads", "num_experts", "num_local_experts", "n_routed_experts"), 2),
    **dict.fromkeys(
        ("head_dim", "d_kv", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "moe_intermediate_size",
         "shared_expert_intermediate_size"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "rotary_dim"), 4),
    **dict.fromkeys(("num_experts_per_tok", "n_group", "topk_group", "first_k_dense_replace", "bos_token_id"), 1),
    **dict.fromkeys(("pad_token_id", "dropout", "attention_dropout", "hidden_dropout", "use_cache"), 0),
    "max_position_embeddings": 32, "n_positions": 32, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
LOSSES = {"ProphetNet": {"disable_ngram_loss": True}}  # its own is a mean over several predictions of one token

CAUSAL = re.compile(r"(CausalLM|LMHead)")
OTHER = re.compile(r"(ForConditionalGeneration|DoubleHeadsModel|Text2Text|BertGenerationDecoder|MTModel)$")


def classes(pattern):
    """Name → class, of those that take tokens and labels."""
    transformers, found = require("transformers"), {}
    for name in dir(transformers):
        if pattern.search(name) and not name.startswith(("TF", "Flax", "Auto")):
            kind = getattr(transformers, name)
            if {"labels", "input_ids"} <= set(inspect.signature(kind.forward).parameters):
                found[name] = kind
    return found


def shrink(config):
    """Sizes of a configuration, and of those in it."""
    known = set(vars(config)) | set(getattr(config, "attribute_map", {}))
    for key in known & set(SIZES):
        if isinstance(value := getattr(config, key, None), int | float):
            setattr(config, key, type(value)(SIZES[key]))
    for part in vars(config).values():
        if hasattr(part, "attribute_map"):
            shrink(part)


def tiny(kind):
    """A model of a few thousand parameters, in eval mode.

    Raises:
        Exception: whatever a class raises that needs more than small sizes; a ValueError if it is not small.
    """
    default = kind.config_class()
    found = {key: getattr(default, key, None) for key in SIZES}
    sizes = {key: type(value)(SIZES[key]) for key, value in found.items() if isinstance(value, int | float)}
    try:
        config = kind.config_class(**sizes)
    except Exception:  # a check of its own
        config = default
    shrink(config)
    for name, settings in LOSSES.items():
        if name in kind.__name__:
            config.update(settings)
    if getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = SIZES["decoder_start_token_id"]
    if hasattr(config, "is_decoder") and CAUSAL.search(kind.__name__):
        config.is_decoder = True
    with torch.device("meta"):
        number = sum(p.numel() for p in kind(config).parameters())
    if number > MOST:
        raise ValueError(f"{number} parameters")
    torch.manual_seed(0)
    with warnings.catch_warnings(action="ignore"):
        return kind(config).eval()


def batch():
    """Tokens, and labels that differ from them, some of which do not count."""
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(3, VOCABULARY, (2, TOKENS), generator=generator) for _ in range(2))
    labels[1, TOKENS - 2 :] = -100
    return {"input_ids": ids, "labels": labels}
