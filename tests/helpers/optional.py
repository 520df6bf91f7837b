"""Packages that a user may lack: their tests are skipped there, and fail where continuous integration runs (``CI``)."""

import importlib
import os
import warnings

import pytest


def require(name):
    """The module, imported; a test that asks for a missing one is skipped, or fails if ``CI`` is set."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of other libraries
            return importlib.import_module(name)
    except ImportError as error:
        message = f'{name} cannot be imported ({error}): pip install "kronfisher[dev]"'
        if os.environ.get("CI"):
            pytest.fail(message, pytrace=False)
        pytest.skip(message, allow_module_level=True)
