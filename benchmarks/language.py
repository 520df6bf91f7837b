"""K-FAC or K-FOC of all parameters of GPT-2 (124 M, random weights) on 8 × 256 tokens, in this process, on one thread.

python benchmarks/language.py [--fit kfoc] [--repeats N] [--profile] [--memory]

Needs transformers. Printed as one line of JSON: seconds of `estimate`, of a forward and backward pass with parameter
gradients (fb), of the bare products ``AᵀA`` and ``GᵀG`` of all layers (gemm; second moments of vocabularies are sums of
squares), all taken in turn; and the peak of resident memory above what the model takes. With --memory that alone, of a
process in which glibc returns what is freed, as in the memory table of run.py: by default it keeps much of it.
"""

import argparse
import cProfile
import json
import pstats
import statistics
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from resident import peak, return_freed_memory
from torch import Tensor, nn

import kronfisher as kf

WIDE = 10240


def gpt2(layers: int) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=layers)).eval()


def backward(model: nn.Module, tokens: Tensor) -> None:
    """As in training."""
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=tokens).logits
    F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"]


def rows(model: nn.Module, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Inputs with a column of ones and output gradients of every linear layer."""
    pairs: list[tuple[Tensor, Tensor]] = []

    def hook(layer: nn.Module, inputs: tuple[Tensor], outputs: Tensor) -> None:
        a = inputs[0].detach().flatten(0, 1)
        a = torch.cat([a, a.new_ones(len(a), 1)], dim=1) if getattr(layer, "bias", None) is not None else a
        outputs.register_hook(lambda gradient: pairs.append((a, gradient.flatten(0, 1).contiguous())))

    handles = [layer.register_forward_hook(hook) for layer in layers_of(model)]
    backward(model, tokens)
    for handle in handles:
        handle.remove()
    return pairs


def products(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for pair in pairs:
        for side in pair:
            _ = side.t() @ side if side.shape[1] <= WIDE else side.square().sum(0)


def seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def measure(fit: str, layers: int, repeats: int, profile: bool, memory: bool) -> dict[str, object]:
    model, likelihood = gpt2(layers), kf.Categorical(class_dim=-1)
    tokens = torch.randint(50257, (8, 256))

    def own() -> kf.Fisher:  # strict: every parameter is covered, or this raises
        return kf.estimate(model, [{"input_ids": tokens}], likelihood, fit=fit, strict=True)

    extra, _ = peak(own)
    if memory:
        return {"GiB": round(extra / 2**30, 2)}
    if profile:
        with cProfile.Profile() as profiler:
            own()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    times: dict[str, list[float]] = {"own": [], "fb": [], "gemm": []}
    pairs = rows(model, tokens)
    for _ in range(repeats):
        times["fb"].append(seconds(lambda: backward(model, tokens)))
        model.zero_grad(set_to_none=True)
        times["gemm"].append(seconds(lambda: products(pairs)))
        times["own"].append(seconds(own))
    ratios = [own / (fb + gemm) for own, fb, gemm in zip(*times.values(), strict=True)]
    medians = {name: round(statistics.median(values), 2) for name, values in times.items()}
    return {"ratio": round(statistics.median(ratios), 3), **medians, "GiB": round(extra / 2**30, 2)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", choices=["kfac", "kfoc"], default="kfac")
    parser.add_argument("--layers", type=int, default=12, help="fewer are for a quick look")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    if options.memory:
        return_freed_memory()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(json.dumps(measure(options.fit, options.layers, options.repeats, options.profile, options.memory)))
