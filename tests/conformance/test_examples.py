"""Every operator that the library understands has an example that the conformance tests run."""

from functools import cache

import pytest
import torch
from torch.overrides import TorchFunctionMode

from kronfisher.layers import OPERATORS, REWRITES
from tests.conformance.examples import EXAMPLES


class Calls(TorchFunctionMode):
    """Notes every operator that is called."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.add(func)
        return func(*args, **(kwargs or {}))


@cache
def called():
    """The operators that some example calls."""
    with Calls() as calls:
        for build in EXAMPLES.values():
            module, shape = build()
            module(torch.randn(shape))
    return calls.seen


@pytest.mark.parametrize("operator", [*OPERATORS, *REWRITES], ids=lambda operator: operator.__name__)
def test_every_operator_has_an_example(operator):
    table = OPERATORS | REWRITES
    same = {other for other, handler in table.items() if handler is table[operator]}
    assert same & called(), f"{operator} has no example in tests/conformance/examples.py"
