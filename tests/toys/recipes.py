"""The scripts of recipes/ as modules, and its plans."""

from __future__ import annotations

from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

from lorafa.runs.plan import Plan
from toys.places import ROOT


def recipe(name: str) -> Any:
    """The script of that name, loaded and not run."""
    spec = spec_from_file_location(f"recipe_{name}", ROOT / "recipes" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def plan_of(path: str) -> Plan:
    """A comparison's plan with the settings of all its runs, which take a third of a second each."""
    return Plan.read(path)
