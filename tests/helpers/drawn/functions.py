"""Functions and modules of torch by its own lists, and the forms in which they may be called on activations.

`torch.overrides.get_overridable_functions` names everything that may be called on tensors, `torch.nn.modules` all
modules. Nothing is drawn from what is registered in the library.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import get_overridable_functions

__all__ = ["BUILT", "FORMS", "OPTIONS", "Weight", "functions", "modules"]

# Words in the names of functions that are about memory, devices, graphs or randomness, or have no unique result.
_AVOIDED = {
    "backward", "hook", "hooks", "grad", "set", "resize", "share", "pin", "cuda", "xpu", "cpu", "mtia", "ipu", "data",
    "storage", "stream", "detach", "apply", "map", "map2", "quant", "quantize", "module", "numpy", "tolist",
    "item", "pickle", "reduce", "sparse", "mkldnn", "rand", "randn", "randint", "dropout", "dropout1d", "dropout2d",
    "dropout3d", "bernoulli", "poisson", "normal", "multinomial", "uniform", "exponential", "geometric", "cauchy",
    "rrelu", "gumbel", "fractional", "empty", "deepcopy", "array", "dlpack", "names", "align", "rename", "refine",
    "cudnn", "miopen", "fbgemm", "requires", "setstate", "nested", "new", "vmap", "compile", "svd", "svdvals", "eig",
    "eigh", "eigvals", "eigvalsh", "lobpcg", "qr", "geqrf", "orgqr", "ormqr", "lowrank", "like", "put_", "binomial",
    "combinations", "cartesian",
}  # fmt: skip
_EXACT = {"scatter_reduce", "scatter_reduce_", "index_reduce", "index_reduce_", "copysign"}  # despite their words
_PLACES = (torch, F, torch.special, torch.linalg, torch.functional, Tensor)


@cache
def functions(kind: str) -> list[Callable]:
    """Functions of torch on tensors, in a fixed order; "weighted": of `nn.functional`, documented with a weight."""
    found = {}
    for place, members in get_overridable_functions().items():
        if place is F or (kind != "weighted" and any(place is each for each in _PLACES)):
            for function in members:
                name = getattr(function, "__name__", "")
                if kind == "weighted" and "weight" not in (function.__doc__ or ""):
                    continue
                if name and (name in _EXACT or not _AVOIDED & {*name.strip("_").split("_"), name}):
                    found.setdefault((getattr(place, "__name__", str(place)), name), function)
    return [found[key] for key in sorted(found)]


@cache
def modules(weighted: bool) -> list[type[nn.Module]]:
    """Modules of torch, without containers and losses; `weighted`: those documented with a weight."""
    found = [each for name in sorted(nn.modules.__all__) if issubclass(each := getattr(nn, name), nn.Module)]
    odd = ("Loss", "Lazy", "Container", "Module", "List", "Dict", "Base", "Sequential", "Sync", "Fractional", "RReLU")
    found = [each for each in found if not any(word in each.__name__ for word in odd)]
    return [each for each in found if "weight" in (each.__doc__ or "")] if weighted else found


@dataclass(frozen=True)
class Weight:
    """An argument that is to be a parameter of this shape, or the rows of one that the ids of a batch pick."""

    shape: tuple[int, ...]
    picked: bool = False


Form = Callable[[random.Random, Tensor], tuple[Any, ...]]


def _p(*shape: int) -> Weight:
    return Weight(shape)


def _broadcast(r: random.Random, h: Tensor) -> Weight:
    """A shape that broadcasts to the activations, without their first axis."""
    shape = [size if r.random() < 0.5 else 1 for size in h.shape[1:]]
    return Weight(tuple(shape[r.randrange(len(shape) + 1) :]))


_OF_STACKS = ["...ti,tio->...to", "...ti,tio->...o", "b...ti,tio->...tob", "...ti,tjo,...tj->...io"]
_OF_TWO = ["...i,ir,ro->...o", "...i,ir,ro->...ro", "...i,ir,ro->...r", "...i,ir,ro->o...r"]
_OF_SCALES = ["...ti,ti->...ti", "...ti,ti->...t", "...ti,ti->..."]

# Ways to call a function; "h" are activations, "h'" others, "ids" indices of the batch, and what is drawn is constant.
FORMS: dict[str, Form] = {
    "h p": lambda r, h: ("h", _p(h.shape[-1])),
    "h broadcast": lambda r, h: ("h", _broadcast(r, h)),
    "p h": lambda r, h: (_p(h.shape[-1]), "h"),
    "broadcast h": lambda r, h: (_broadcast(r, h), "h"),
    "h matrix": lambda r, h: ("h", _p(h.shape[-1], 3)),
    "matrix h": lambda r, h: (_p(3, h.shape[-2]), "h"),
    "h square": lambda r, h: ("h", _p(h.shape[-1], h.shape[-1])),
    "h rows": lambda r, h: ("h", _p(3, h.shape[-1])),
    "h rows p": lambda r, h: ("h", _p(3, h.shape[-1]), _p(3)),
    "h p p": lambda r, h: ("h", _p(h.shape[-1]), _p(h.shape[-1])),
    "p h matrix": lambda r, h: (_p(3), "h", _p(h.shape[-1], 3)),
    "p h h": lambda r, h: (_p(h.shape[-1]), "h", "h'"),
    "h h p": lambda r, h: ("h", "h'", _p(h.shape[-1])),
    "h h bilinear": lambda r, h: ("h", "h'", _p(2, h.shape[-1], h.shape[-1]), _p(2)),
    "h shape p p": lambda r, h: ("h", (h.shape[-1],), _p(h.shape[-1]), _p(h.shape[-1])),
    "h 1 p p": lambda r, h: ("h", 1, _p(h.shape[1]), _p(h.shape[1])),
    "h statistics p p": lambda r, h: (
        "h", torch.zeros(h.shape[1]), torch.full((h.shape[1],), 0.7), _p(h.shape[1]), _p(h.shape[1])
    ),
    "h kernel": lambda r, h: ("h", _p(2, h.shape[1], *[2] * (h.dim() - 2))),
    "h kernel p": lambda r, h: (
        "h", _p(4, h.shape[1], *[r.choice([1, 2]) for _ in h.shape[2:]]), _p(4), r.choice([1, 2]), r.choice([0, 1])
    ),
    "h kernels p": lambda r, h: ("h", _p(h.shape[1], 2, *[2] * (h.dim() - 2)), _p(2)),
    "h depthwise": lambda r, h: (
        "h", _p(2 * h.shape[1], 1, *[2] * (h.dim() - 2)), None, r.choice([1, 2]), 1, 1, h.shape[1]
    ),
    "ids rows": lambda r, h: ("ids", _p(5, 3)),
    "rows ids": lambda r, h: (_p(5, 3), "ids"),
    "rows 0 id": lambda r, h: (_p(5, 3), 0, "id"),
    "list with p": lambda r, h: (["h", "h'", _p(1, *h.shape[1:])], r.randrange(h.dim())),
    "einsum": lambda r, h: (r.choice(["...i,io->...o", "...i,i->...i", "...i,...i,io->...o"]), "h", _p(h.shape[-1], 3)),
    "einsum of a stack": lambda r, h: (r.choice(_OF_STACKS), "h", _p(h.shape[-2], h.shape[-1], 3)),
    "einsum of scales": lambda r, h: (r.choice(_OF_SCALES), "h", _p(*h.shape[-2:])),
    "einsum of a picked": lambda r, h: ("b...i,bio->b...o", "h", Weight((5, h.shape[-1], 3), True)),
    "einsum of several picked": lambda r, h: (
        "b...i,oi,boi->b...o", "h", _p(2, h.shape[-1]), Weight((5, 2, h.shape[-1]), True)
    ),
    "einsum of several": lambda r, h: (r.choice(_OF_TWO), "h", _p(h.shape[-1], 3), _p(3, 2)),
    "einsum of several, weights first": lambda r, h: ("ro,ir,...i->...o", _p(3, 2), _p(h.shape[-1], 3), "h"),
    "einsum of a scale and a matrix": lambda r, h: (
        r.choice(["...i,i,io->...o", "...i,i,io->...io"]), "h", _p(h.shape[-1]), _p(h.shape[-1], 2)
    ),
    "einsum of three": lambda r, h: (
        "...i,ij,jk,k->...k", "h", _p(h.shape[-1], 2), _p(2, 3), _p(3)
    ),
    "einsum of two paths": lambda r, h: (
        r.choice(["...i,ir,...j,jr->...r", "...i,ir,...j,jr->..."]), "h", _p(h.shape[-1], 2), "h'", _p(h.shape[-1], 2)
    ),
    "h picked": lambda r, h: ("h", Weight((5, h.shape[-1], 3), True)),
    "h picked rows": lambda r, h: ("h", Weight((5, h.shape[-1]), True)),
    "h stack": lambda r, h: ("h", _p(h.shape[1], h.shape[-1], 3)),
    "h p number": lambda r, h: ("h", _p(h.shape[-1]), 0.5),
    "h": lambda r, h: ("h",),
    "h h": lambda r, h: ("h", "h'"),
    "h dim": lambda r, h: ("h", r.randrange(-h.dim(), h.dim())),
    "h dims": lambda r, h: ("h", (r.randrange(1, h.dim()),)),
    "h number": lambda r, h: ("h", r.choice([2, 0.5, 1])),
    "h dim dim": lambda r, h: ("h", *r.sample(range(-h.dim(), h.dim()), 2)),
    "h number dim": lambda r, h: ("h", r.choice([1, 2]), r.randrange(-h.dim(), h.dim())),
    "h h number": lambda r, h: ("h", "h'", 0.3),
    "list": lambda r, h: (["h", "h'"], r.randrange(-h.dim(), h.dim())),
    "h h h": lambda r, h: ("h", "h'", "h"),
    "h dim index": lambda r, h: ("h", -1, torch.tensor([1, 0])),
    "index": lambda r, h: ("h", (slice(None), *r.choice([(0,), (slice(1, None),), (torch.tensor([1, 0, 1]),)]))),
    "h chosen number": lambda r, h: ("h", torch.arange(h.shape[-1]) % 2 == 0, 0.5),
    "chosen h h": lambda r, h: (torch.arange(h.shape[-1]) % 2 == 0, "h", "h'"),
    "chosen h p": lambda r, h: (torch.arange(h.shape[-1]) % 2 == 0, "h", _p(h.shape[-1])),
}  # fmt: skip
# Keywords that some functions and modules take.
OPTIONS: list[dict[str, Any]] = [
    {"alpha": 0.5}, {"beta": 0.5}, {"stride": 2}, {"padding": 1}, {"dilation": 2}, {"padding": "same"}, {"groups": 2},
    {"keepdim": True}, {"dim": 1}, {"dim": -1}, {"eps": 0.1}, {"bias": False}, {"value": 0.5}, {"padding_idx": 1},
    {"mode": "sum"}, {"mode": "max"}, {"is_causal": True}, {"training": True}, {"output_padding": 1}, {"p": 1.5},
    {"scale_grad_by_freq": True}, {"max_norm": 1.0}, {"stride": 2, "padding": 1},
]  # fmt: skip
# Arguments with which modules are built.
BUILT: list[Callable[[random.Random, Tensor], tuple[Any, ...]]] = [
    lambda r, h: (),
    lambda r, h: (h.shape[-1],),
    lambda r, h: (h.shape[1],),
    lambda r, h: (h.shape[-1], 3),
    lambda r, h: (h.shape[1], 2, 2),
    lambda r, h: (h.shape[1], 4, 2, 2, 1),
    lambda r, h: (h.shape[-1], r.choice([1, 2])),
    lambda r, h: (h.shape[-1], 2, 3),
    lambda r, h: (5, 3),
    lambda r, h: (1, h.shape[1]),
    lambda r, h: (h.shape[-1], h.shape[-1], 2),
    lambda r, h: (2,),
    lambda r, h: (1, 0.5),
]
