"""The examples in the docstrings of models/ are true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import models

MODULES = [module.name for module in pkgutil.iter_modules(models.__path__, "models.")]


@pytest.mark.parametrize("name", MODULES)
def test_every_example_of_the_module_holds(name: str):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0
