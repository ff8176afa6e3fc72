"""A model whose class is code in its own folder, which says that it has run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

CODE = '''
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

with Path({ran!r}).open("a") as said:
    said.write("ran\\n")

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
'''
CLASSES = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}


def give_own_code(model: Path, ran: Path, name: str = "own") -> None:
    """Have the folder of a Llama bring its class, in a module of that name.

    Args:
        ran: a file that gets a line each time the code is executed.
    """
    config = json.loads((model / "config.json").read_text())
    (model / f"{name}.py").write_text(CODE.format(ran=str(ran)))
    classes = {key: value.replace("own.", f"{name}.") for key, value in CLASSES.items()}
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"], "auto_map": classes}
    (model / "config.json").write_text(json.dumps(config))


def keep_code_in(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Where transformers copies code of models to, in place of the user's cache; what it registers goes again."""
    patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
    patch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked on a prompt"))
