"""`import peft` under lorafa's name: every documented module and name, and what is said of those that are absent."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
from typing import Any

import pytest

from lorafa.errors import ConfigError
from toys.by_name import by_name, found_by_name
from toys.places import ROOT

TABLE: dict[str, Any] = {}
exec((ROOT / "src/lorafa/compat/table.py").read_text(encoding="utf-8"), TABLE)  # the package refuses beside PEFT
MODULES, ABSENT = TABLE["MODULES"], TABLE["ABSENT"]
NAMES_OF_ABSENT = {name for names in ABSENT.values() for name in names}

DOCUMENTED = (
    *("peft", "peft.functional", "peft.helpers", "peft.mapping_func", "peft.mixed_model", "peft.optimizers"),
    *("peft.tuners", "peft.tuners.lora", "peft.tuners.lora.config", "peft.tuners.lora.conversion"),
    *("peft.tuners.lora.intruders", "peft.utils", "peft.utils.error", "peft.utils.hotswap", "peft.utils.warning"),
    *("peft.utils.loftq_utils", "peft.utils.peft_types"),
)
"""Modules whose own names are all documented, or listed in ``__all__``."""

LOOK = """
import importlib, importlib.metadata, warnings
from lorafa.compat.table import ABSENT, MODULES
absent = {name: subject for subject, names in ABSENT.items() for name in names}
wrong = []
for module, names in MODULES.items():
    found = importlib.import_module(module)
    for name in names:
        try:
            value = getattr(found, name)
        except Exception as error:
            wrong.append(f"{module}.{name}: {error!r}")
            continue
        if name in absent:
            try:
                value()
            except NotImplementedError as error:
                if f"peft.{name} belongs to {absent[name]}" not in str(error):
                    wrong.append(f"{module}.{name}: {error}")
            else:
                wrong.append(f"{module}.{name} can be used")
        if set(names) - set(dir(found)):
            wrong.append(f"{module}: dir() lacks names")
import peft
from peft.tuners.lora.layer import LoraLayer, Linear
from peft import PromptLearningConfig, LoraConfig, PeftModel, PeftModelForCausalLM
from accelerate.utils import is_peft_model
from transformers.utils import is_peft_available
try:
    from peft import no_such_name
except ImportError as error:
    unknown = str(error)
say({
    "wrong": wrong, "unknown": unknown, "version": [peft.__version__, importlib.metadata.version("peft")],
    "available": bool(is_peft_available()), "file": peft.__spec__.origin,
    "same": issubclass(Linear, LoraLayer) and PeftModelForCausalLM is PeftModel,
    "absent": peft.PromptLearningConfig is peft.config.PromptLearningConfig,
    "method": isinstance(LoraConfig(), PromptLearningConfig),
    "prefix": peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType.LORA] is LoraConfig,
})
"""


@pytest.fixture(scope="module")
def looked() -> Any:
    return found_by_name(LOOK)


def test_every_name_is_there_or_raises_naming_itself_on_use(looked: Any) -> None:
    assert looked["wrong"] == []
    assert "peft" in looked["unknown"]
    assert "no_such_name" in looked["unknown"]


def test_what_is_absent_is_one_class_in_every_module(looked: Any) -> None:
    assert looked["absent"]


def test_version_and_availability_are_what_transformers_asks_for(looked: Any) -> None:
    assert looked["version"] == ["0.22.0", "0.22.0"]
    assert looked["available"]
    assert looked["file"] == "lorafa"


def test_classes_answer_isinstance_as_pefts(looked: Any) -> None:
    assert looked["same"]
    assert not looked["method"]
    assert looked["prefix"]


@pytest.mark.parametrize("module", DOCUMENTED)
def test_every_public_name_of_peft_is_in_the_table(module: str) -> None:
    real = importlib.import_module(module)
    own = [n for n, value in vars(real).items() if not n.startswith("_") and getattr(value, "__module__", "") == module]
    wanted = set(getattr(real, "__all__", own))
    assert wanted - set(MODULES[module]) == set()


@pytest.mark.parametrize("method", ["LoraModel", "PeftModel", "LoraConfig"])
def test_public_methods_and_properties_are_there(method: str) -> None:
    import peft

    import lorafa

    theirs, ours = getattr(peft, method), getattr(lorafa, method)
    of_torch = set(dir(importlib.import_module("torch").nn.Module))
    names = {name for name, _ in inspect.getmembers(theirs) if not name.startswith("_")} - of_torch
    assert names - set(dir(ours)) - set(NOT_METHODS.get(method, ())) == set()


NOT_METHODS = {
    "PeftModel": (
        # of prompt learning
        *("add_prompt_encoder", "get_prompt", "get_prompt_embedding_to_save", "set_additional_trainable_modules"),
    ),
}
"""What belongs to methods that lorafa does not have."""


def _pairs() -> dict[str, tuple[Any, Any]]:
    """Every function and class of the table that is not absent: name -> (PEFT's, ours)."""
    found: dict[str, tuple[Any, Any]] = {}
    for module, names in MODULES.items():
        wanted = [name for name in names if name not in NAMES_OF_ABSENT and name not in found]
        if not wanted:
            continue
        real = importlib.import_module(module)
        for name in wanted:
            home, _, inner = TABLE["HOMES"].get(name, f"lorafa:{name}").partition(":")
            if hasattr(real, name):
                found[name] = getattr(real, name), getattr(importlib.import_module(home), inner)
    return found


PAIRS = _pairs()
CLASSES = ("LoraConfig", "LoraLayer", "LoraModel", "PeftModel")
"""Those whose methods scripts call; what is called of others is called through them."""
CALLED: dict[str, tuple[Any, Any]] = {
    **{name: pair for name, pair in PAIRS.items() if inspect.isfunction(pair[0])},
    **{
        f"{of}.{name}": (theirs, getattr(PAIRS[of][1], name, None))
        for of in CLASSES
        for name, theirs in inspect.getmembers(PAIRS[of][0], callable)
        if not name.startswith("_") and name not in dir(importlib.import_module("torch").nn.Module)
    },
}
NOT_KEYWORDS = {
    "PeftModel.push_to_hub": "its settings are those of HubOptions, checked by name",
    "LoraConfig.push_to_hub": "the same",
    "LoraModel.tuner_layer_cls": "a class: a config makes layers",
    "PeftModel.get_prompt": "prompt learning",
    "PeftModel.get_prompt_embedding_to_save": "prompt learning",
}


def _keywords(called: Any) -> list[str]:
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [p.name for p in inspect.signature(called).parameters.values() if p.kind not in kinds]


@pytest.mark.parametrize("name", [name for name in CALLED if name not in NOT_KEYWORDS])
def test_every_keyword_of_peft_is_one_of_ours_or_the_call_says_why_not(name: str) -> None:
    theirs, ours = CALLED[name]
    assert ours is not None, "there is no such method"
    if (ours.__doc__ or "").startswith("Raises NotAvailableError"):
        return
    assert set(_keywords(theirs)) - set(_keywords(ours)) == set()


def test_names_without_an_equal_keyword_are_still_there() -> None:
    assert NOT_KEYWORDS.keys() - CALLED.keys() == set()
    assert len(CALLED) > 130


def test_a_peft_that_is_there_already_is_refused_by_the_line_that_brought_it(tmp_path: Any) -> None:
    script = tmp_path / "train.py"
    script.write_text("import json\nimport peft\nimport lorafa.compat\n")
    code = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    done = by_name(code, served=False)
    assert done.returncode == 1
    assert "peft itself has been imported already by line 2" in done.stderr
    assert ConfigError.__name__ in done.stderr


def test_peft_is_found_where_it_is_not_installed() -> None:
    code = """
import lorafa.compat, importlib.metadata, importlib.util
assert importlib.metadata.version("peft") == "0.22.0"
assert importlib.metadata.packages_distributions()["peft"] == ["peft"]
assert importlib.util.find_spec("peft.tuners.lora").origin == "lorafa"
assert importlib.util.find_spec("peft.no_such_module") is None
"""
    without_packages = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env=without_packages, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
