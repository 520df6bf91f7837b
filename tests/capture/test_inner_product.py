"""Vectors are back-propagated from outputs without another tensor of that size."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode

import kronfisher as kf
from kronfisher.capture import inner_product as room
from kronfisher.capture.inner_product import Seed, back_propagate_together, inner_product


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_derivative_by_the_outputs_is_the_vector(dtype):
    outputs = torch.randn(5, 3, dtype=dtype, requires_grad=True)
    for vector in (torch.randn(5, 3), torch.randn(3, 5).T, torch.randn(5, 1)):
        (found,) = torch.autograd.grad(inner_product(outputs, vector), outputs)
        assert found.dtype == dtype and torch.equal(found, vector.to(dtype).expand(5, 3))
    layer = nn.Linear(4, 3).double()
    outputs = layer(torch.randn(5, 4).double())
    vectors = torch.randn(2, 5, 3).double()
    for vector in vectors:  # through one graph
        (found,) = torch.autograd.grad(inner_product(outputs, vector), layer.bias, retain_graph=True)
        torch.testing.assert_close(found, vector.sum(0))


@pytest.mark.parametrize("few", [0, 2**16], ids=["by a scalar", "by the engine"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_vectors_arrive_whichever_way_they_go(few, dtype, monkeypatch):
    monkeypatch.setattr("kronfisher.capture.inner_product._SMALL", few)
    layer = nn.Linear(4, 3, dtype=dtype)
    inputs, unused = torch.randn(5, 4, dtype=dtype), torch.zeros(2, requires_grad=True)
    outputs = layer(inputs)
    for vector in (torch.randn(5, 3), torch.randn(3, 5).T, torch.randn(5, 1)):
        whole = vector.to(dtype).expand(5, 3)
        found = Seed.of(outputs, vector).back_propagate([outputs, layer.bias, unused], retain=True)
        assert found[0].dtype == dtype and torch.equal(found[0], whole) and found[2] is None
        torch.testing.assert_close(found[1], whole.sum(0))
        assert layer.bias.grad is None
    Seed.of(outputs, vector).back_propagate([layer.bias], retain=False)
    with pytest.raises(RuntimeError, match="second time"):
        Seed.of(outputs, vector).back_propagate([layer.weight], retain=False)


def _refused(*args, **kwargs):
    raise TypeError("run_backward() takes other arguments")


def _wrong(function, *args, **kwargs):
    """`_vmap` with something else to be its second argument: nothing is mapped."""
    return function


WITHOUT = {
    "no engine": ("_engine_run_backward", None),
    "an engine of another form": ("_engine_run_backward", _refused),
    "an engine that adds to .grad": ("_engine_run_backward", lambda *args, **kwargs: (None,)),
    "no map": ("_vmap", None),
    "a map of another form": ("_vmap", _refused),
    "a map that maps nothing": ("_vmap", _wrong),
}


@pytest.fixture(params=WITHOUT.values(), ids=list(WITHOUT))
def another_torch(request, monkeypatch):
    """A version of torch without the functions that are not public, or with others of their names."""
    monkeypatch.setattr(room, *request.param)
    room._as_known.cache_clear()
    yield
    room._as_known.cache_clear()


def test_functions_that_are_not_public_are_used_as_this_torch_has_them():
    assert room._as_known()
    assert room._private("torch.autograd.graph", "no_such_name") is None
    assert room._private("torch.no_such_module", "no_such_name") is None


def test_other_versions_of_torch_take_the_public_way(another_torch, monkeypatch):
    """The same vectors arrive, one by one and together, and the same estimates are made."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, dtype=torch.float64)
    unused, outputs = torch.zeros(2, requires_grad=True), layer(torch.randn(5, 4, dtype=torch.float64))
    public, calls = torch.autograd.grad, []

    def counted(*args, **kwargs):
        calls.append(kwargs.get("is_grads_batched", False))
        return public(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    vectors, edges = torch.randn(2, 5, 3, dtype=torch.float64), [get_gradient_edge(x) for x in (layer.bias, unused)]
    for vector in vectors:
        found = Seed.of(outputs, vector).back_propagate(edges, retain=True)
        torch.testing.assert_close(found[0], vector.sum(0))
        assert found[1] is None and layer.bias.grad is None
    found = back_propagate_together(outputs, vectors, edges)
    assert found is not None and found[1] is None and calls == [False, False, True]
    torch.testing.assert_close(found[0], vectors.sum(1))
    model, x = nn.Sequential(layer, nn.Tanh(), nn.Linear(3, 4).double()), torch.randn(6, 4, dtype=torch.float64)
    estimate = partial(kf.estimate, model, x, kf.Categorical(), labels="exact")
    there = estimate(fit="kfoc")
    assert True in calls[3:]
    monkeypatch.undo()
    room._as_known.cache_clear()
    here = estimate(fit="kfoc")
    for name in here.info.blocks:
        torch.testing.assert_close(there[name].to_dense(), here[name].to_dense())


def test_what_the_model_raises_is_raised_again():
    """An error of a backward function of the user's is no reason to go through the graph a second time."""

    class Raises(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            raise TypeError("of the model's own")

    weight = torch.ones(2, requires_grad=True)
    with pytest.raises(TypeError, match="of the model's own"):
        Seed.of(Raises.apply(weight), torch.ones(2)).back_propagate([weight], retain=False)


def test_the_first_estimate_imports_no_symbolic_algebra():
    code = (
        "import sys, torch, kronfisher as kf\n"
        "known = 'sympy' in sys.modules\n"
        "kf.estimate(torch.nn.Linear(2, 3), torch.randn(5, 2), kf.Categorical(), labels='exact')\n"
        "assert known or 'sympy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class Made(TorchDispatchMode):
    """Lists what makes floating-point tensors of at least so many numbers in memory of their own."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers, self.operators = numbers, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, torch.Tensor)}
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel() >= self.numbers:
                self.operators += [str(func)] if tensor.untyped_storage().data_ptr() not in known else []
        return result


@pytest.mark.parametrize("samples", [1, 2])
def test_outputs_over_a_vocabulary_have_one_companion(samples):
    """A vector, which is the gradient as well; several draws are scaled besides. A probe makes one of its own."""
    model, x = nn.Linear(2, 70_000), torch.randn(64, 2)
    estimate = partial(kf.estimate, model, x, kf.Categorical(), fit=kf.KFAC(max_dim=64), samples=samples)
    expected = ["aten.addmm.default", *["aten.empty_like.default", "aten.div.Tensor"][:samples] * samples]
    for probe in (["aten.randn.generator"], []):
        with Made(64 * 70_000) as made:
            estimate()
        assert sorted(made.operators) == sorted(expected + probe)
