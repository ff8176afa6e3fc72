"""The scripts of recipes/ as modules."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

from toys.places import ROOT


def recipe(name: str) -> Any:
    """The script of that name, loaded and not run."""
    spec = spec_from_file_location(f"recipe_{name}", ROOT / "recipes" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
