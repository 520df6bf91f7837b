"""Packages that a user may lack: their tests are skipped there, and fail where continuous integration runs (``CI``)."""

import importlib
import importlib.util
import os
import re
import sys
import warnings
from functools import cache

import pytest
import torch

LIBRARIES = []  # operators declared here live as long as their library


def require(name):
    """The module, imported; a test that asks for a missing one is skipped, or fails if ``CI`` is set."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of other libraries
            mend_torchvision()
            return importlib.import_module(name)
    except ImportError as error:
        message = f'{name} cannot be imported ({error}): pip install "kronfisher[dev]"'
        if os.environ.get("CI"):
            pytest.fail(message, pytrace=False)
        pytest.skip(message, allow_module_level=True)


@cache
def mend_torchvision():
    """Make torchvision importable, which laplace-torch brings and transformers imports wherever it finds it.

    Beside a torch for CPUs alone, torchvision's build for CUDA finds no kernels, and its import stops at the first
    operator that it wants to describe. No test calls one: it is enough that each has a name.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    LIBRARIES.append(library)
    while True:
        try:
            importlib.import_module("torchvision")
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            library.define(f"{missing[1]}(Tensor x) -> Tensor")
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
        else:
            return
