"""Adapter files and configs that were changed at random: refused by lorafa's own errors, in time, the model untouched.

How many examples the long tests make, :mod:`toys.fuzzing` says; hypothesis prints what reproduces a failure.
"""

from __future__ import annotations

import copy
import json
import struct
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.errors import TEXT, LoraError
from toys.fuzzing import BUDGET, SECONDS, VALUES, damage, many
from toys.models import Two

QUICK = 60
NAMES = ("adapter_config.json", "adapter_model.safetensors")


@cache
def _base() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": Two(), "layers": nn.ModuleList([Two(), Two()])})


def base() -> nn.Module:
    return copy.deepcopy(_base())  # seeding takes ten times as long as loading an adapter


@cache
def adapter(kind: str) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Config, header and data of a saved adapter."""
    settings_of = {"plain": {}, "dora": {"use_dora": True}, "moved": {"init_lora_weights": "pissa"}}[kind]
    config = LoraConfig(r=2, target_modules=["first"], rank_pattern={"a.first": 3}, **settings_of)
    with TemporaryDirectory() as place:
        get_peft_model(base(), config).save_pretrained(place)
        PeftModel.from_pretrained(base(), place)  # what is imported when first used is no part of the time
        config_text, data = ((Path(place) / name).read_bytes() for name in NAMES)
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(config_text), json.loads(data[8 : 8 + length]), data[8 + length :]


OWN = ("base", "start", "config", "own", "fallbacks", "quantized", "version")


@st.composite
def files(draw: st.DrawFn) -> dict[str, bytes]:
    """The two files of an adapter, of which a few places are other ones."""
    config, header, rest = copy.deepcopy(adapter(draw(st.sampled_from(["plain", "dora", "moved"]))))
    own = json.loads(header["__metadata__"]["lorafa"])
    for _ in range(draw(st.integers(1, 3))):
        where = draw(st.sampled_from(["field", "entry", "tensor", "own", "layer"]))
        if where == "field":
            config[draw(st.sampled_from(sorted(config)) | st.text(max_size=4))] = draw(VALUES)
        elif where == "entry":
            header[draw(st.sampled_from(sorted(header)))] = draw(VALUES)
        elif where == "tensor":
            entry = header[draw(st.sampled_from(sorted(header)))]
            if isinstance(entry, dict):
                entry[draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = draw(VALUES)
        elif where == "own":
            own[draw(st.sampled_from(OWN))] = draw(VALUES)
        elif isinstance(own.get("base"), dict):
            described = {"shape": draw(VALUES), "dtype": "float16", "hash": "x", "sample": draw(VALUES)}
            own["base"]["a.first"] = draw(st.just(described) | VALUES)
    whose = draw(st.sampled_from(["lorafa's", "without its config", "another program's"]))
    if whose == "without its config":  # which would refuse most other configs before they are used
        own.pop("config", None)
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"]["lorafa"] = json.dumps(own)
    if whose == "another program's":
        header.pop("__metadata__", None)
    text = json.dumps(header).encode()
    made = {NAMES[0]: json.dumps(config).encode(), NAMES[1]: struct.pack("<Q", len(text)) + text + rest}
    name = draw(st.sampled_from([None, None, *NAMES]))
    if name is not None:
        made[name] = draw(damage(made[name]))
    return made


def held(call: Callable[[nn.Module], object]) -> None:
    """What is called with a fresh model succeeds, or raises a LoraError of a screen at most and leaves it as it was."""
    model = base()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [value.requires_grad for value in model.parameters()]
    said: LoraError | None = None
    start = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call(model)
    except LoraError as error:
        said = error
    assert time.process_time() - start < SECONDS
    if said is not None:
        assert len(str(said)) <= TEXT + 100
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert [value.requires_grad for value in model.parameters()] == flags


def load(made: dict[str, bytes]) -> None:
    with TemporaryDirectory() as place:
        for name, content in made.items():
            (Path(place) / name).write_bytes(content)
        held(lambda model: PeftModel.from_pretrained(model, place))


FIELDS = [name for name in LoraConfig.__dataclass_fields__ if name not in ("megatron_config",)]
CONFIGS = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4)


def configure(fields: dict[str, Any]) -> None:
    held(lambda model: get_peft_model(model, LoraConfig(**{"target_modules": ["first"], **fields})))


@settings(BUDGET, max_examples=QUICK)
@given(files())
def test_changed_files_are_refused_or_loaded(made: dict[str, bytes]) -> None:
    load(made)


@settings(BUDGET, max_examples=QUICK)
@given(CONFIGS)
def test_changed_configs_are_refused_or_carried_out(fields: dict[str, Any]) -> None:
    configure(fields)


@pytest.mark.slow
def test_many_changed_files_are_refused_or_loaded() -> None:
    many(files(), load, 100_000)


@pytest.mark.slow
def test_many_changed_configs_are_refused_or_carried_out() -> None:
    many(CONFIGS, configure, 20_000)
