"""The autograd function that is being applied is told by its name, whether torch applies it in Python or not."""

import pytest
import torch

from kronfisher.capture import capture


@pytest.mark.parametrize("in_python", [True, False])
def test_the_innermost_function_is_named(in_python, monkeypatch):
    if not in_python:  # as since torch 2.14
        monkeypatch.setattr(capture, "_APPLY", None)
    elif capture._APPLY is None:
        pytest.skip("this torch applies functions outside Python")
    seen = []

    class Inner(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(capture._running_function())
            return x * 2

    class Outer(torch.autograd.Function):
        @staticmethod
        def forward(x):
            Inner.apply(x)
            seen.append(capture._running_function())
            return x * 3

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

    class Module(torch.nn.Module):
        def forward(self, x):
            seen.append(capture._running_function())
            return Outer.apply(x)

    Module()(torch.ones(2, requires_grad=True))
    assert seen == ["", "Inner", "Outer"]
