"""Adapter files and configs that were changed at random: refused by lorafa's own errors, in time, the model untouched.

The quick budget is small. The long one says how many examples it makes: ``LORAFA_FUZZ=20000``; hypothesis prints what
reproduces a failure.
"""

from __future__ import annotations

import copy
import json
import os
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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.errors import TEXT, LoraError
from toys.models import Two

QUICK, LONG = 60, int(os.environ.get("LORAFA_FUZZ", "3000"))
SECONDS = 2.0
NAMES = ("adapter_config.json", "adapter_model.safetensors")


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": Two(), "layers": nn.ModuleList([Two(), Two()])})


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


EXPRESSIONS = ["(", "(a+)+b", ".*", ".*first", "a{9999999}", "(?i)first", "first|a", "^a.first", "", "\\", "x" * 5000]
ODD: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 9), st.sampled_from([10**9, 10**30, -(10**400), 2**63, 0]),
    st.floats(), st.text(max_size=5), st.sampled_from(EXPRESSIONS),
)  # fmt: skip
KEYS = st.text(max_size=3) | st.sampled_from(EXPRESSIONS)
VALUES = st.recursive(
    ODD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


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
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"]["lorafa"] = json.dumps(own)
    text = json.dumps(header).encode()
    made = {NAMES[0]: json.dumps(config).encode(), NAMES[1]: struct.pack("<Q", len(text)) + text + rest}
    name = draw(st.sampled_from([None, None, *NAMES]))
    if name is not None:
        at, way = draw(st.integers(0, len(made[name]) - 1)), draw(st.integers(0, 3))
        made[name] = damaged(made[name], at, way, draw(st.binary(max_size=4)))
    return made


def damaged(content: bytes, at: int, way: int, new: bytes) -> bytes:
    """The content cut at a place, or with other, more or fewer bytes there."""
    end = [len(content), at + len(new), at, at + 4][way]
    return content[:at] + (new if way in (1, 2) else b"") + content[end:]


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


budget = settings(deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)


@settings(budget, max_examples=QUICK)
@given(files())
def test_changed_files_are_refused_or_loaded(made: dict[str, bytes]) -> None:
    load(made)


@settings(budget, max_examples=QUICK)
@given(CONFIGS)
def test_changed_configs_are_refused_or_carried_out(fields: dict[str, Any]) -> None:
    configure(fields)


@pytest.mark.slow
@settings(budget, max_examples=LONG)
@given(files())
def test_many_changed_files_are_refused_or_loaded(made: dict[str, bytes]) -> None:
    load(made)


@pytest.mark.slow
@settings(budget, max_examples=LONG)
@given(CONFIGS)
def test_many_changed_configs_are_refused_or_carried_out(fields: dict[str, Any]) -> None:
    configure(fields)
