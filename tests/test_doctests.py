"""The examples in the docstrings of the public functions say what the functions return."""

from __future__ import annotations

import doctest
import inspect
from importlib import import_module

import pytest

import pukd_ray

WITH_EXAMPLES = (
    "AttentionHead",
    "MultiScaleExtractor",
    "bbe_prior",
    "class_weights",
    "load_config",
    "nnpu_risk",
    "selection.risk:proxy_accuracy",
    "worst_case_weights",
)
WITHOUT = {
    "load_student": "needs a finished run; README shows it",
    "run_pipeline": "takes minutes; README shows it",
}


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_are_right(name: str) -> None:
    module, _, attribute = name.rpartition(":")
    owner = import_module(f"pukd_ray.{module}") if module else pukd_ray
    # Without the module's own names: an example has to import what it uses.
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(owner, attribute), name, globs={})
    assert example.examples, f"{name} has no example"
    told: list[str] = []
    doctest.DocTestRunner(verbose=False).run(example, out=told.append)
    assert not told, "".join(told)


def test_every_public_function_has_an_example_or_a_reason() -> None:
    functions = {name for name in pukd_ray.__all__ if inspect.isfunction(getattr(pukd_ray, name))}
    assert functions - set(WITH_EXAMPLES) == set(WITHOUT)
