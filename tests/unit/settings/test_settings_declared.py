"""What is read of settings without torch is what the classes say; and nothing that is read for help loads torch."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from typing import Any

import pytest

from lorafa.optimizers import OPTIMIZERS
from lorafa.registry import Registry
from lorafa.settings.declared import declared
from lorafa.settings.typed import field_docs

PLACES = {
    "OPTIMIZERS": "lorafa.optimizers",
    "DATASETS": "lorafa.data",
    "EVALS": "lorafa.evals",
    "RANK_RULES": "lorafa.calibration",
    "STARTS": "lorafa.train.settings.init",
    "INITIALIZERS": "lorafa.initializers",
}


def unread(table: str) -> Registry[Any]:
    """A registry as it is before anybody asked for its objects: its module is run once more, on the side."""
    import_module(PLACES[table])  # its dataclasses look it up by its name
    spec = find_spec(PLACES[table])
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Registry[Any] = getattr(module, table)
    return found


@pytest.mark.parametrize("table", PLACES)
def test_settings_read_from_source_are_those_of_the_class(table: str) -> None:
    registry = unread(table)
    read = {name: declared(registry, name).settings for name in registry.names()}
    assert all(registry.place(name) for name in registry.names())
    for name in registry.names():
        kind = registry.get(name).settings
        expected = []
        if isinstance(kind, type):  # else a field of PEFT's has them, or there are none
            docs = field_docs(kind)
            expected = [(field.name, field.default, docs[field.name]) for field in fields(kind)]
        assert [(key.name, key.default, key.doc) for key in read[name]] == expected, name


def test_an_object_that_is_here_is_asked_itself() -> None:
    with OPTIMIZERS.added("again", OPTIMIZERS.get("lora_fa")):
        found = declared(OPTIMIZERS, "again")
    assert [key.name for key in found.settings] == ["betas", "eps", "algorithm"]
    assert found.keywords["lr"] == 2e-3
