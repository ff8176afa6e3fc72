"""Files that others made to do harm: each is refused with an error of lorafa's, in time, and the model is as it was."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.errors import TEXT, AdapterError, CheckpointError, ConfigError, LoraError, SourceError
from lorafa.storage.base_weights import shards
from lorafa.storage.parsed import from_json, from_yaml
from lorafa.surgery.patterns import numbers_of
from toys.models import Two

SECONDS = 2.0


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({f"layers.{i}".replace(".", "_"): Two() for i in range(2)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["first"], rank_pattern={"layers_0.first": 4}))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def set_config(folder: Path, **fields: Any) -> None:
    """Change the config of a file that says nothing of it, as those of other programs do."""
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def header_of(folder: Path) -> tuple[dict[str, Any], bytes]:
    data = (folder / "adapter_model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def set_header(folder: Path, text: str, rest: bytes) -> None:
    octets = text.encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(octets)) + octets + rest)


def set_own(folder: Path, **entries: Any) -> None:
    header, rest = header_of(folder)
    own = json.loads(header["__metadata__"]["lorafa"]) | entries
    header["__metadata__"]["lorafa"] = json.dumps(own)
    set_header(folder, json.dumps(header), rest)


def refused(folder: Path, said: str) -> None:
    """Loading is refused in time, with a text of a screen at most, and nothing of the model is another."""
    model = base()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: value.requires_grad for name, value in model.named_parameters()}
    start = time.process_time()
    with pytest.raises(LoraError, match=said) as caught:
        PeftModel.from_pretrained(model, folder)
    assert time.process_time() - start < SECONDS
    assert len(str(caught.value)) <= TEXT + 100
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: value.requires_grad for name, value in model.named_parameters()} == flags


DEEP = "[" * 100_000


def test_json_that_nests_without_end_is_refused_wherever_it_stands(folder: Path) -> None:
    header, rest = header_of(folder)
    set_header(folder, DEEP, rest)
    refused(folder, "is no safetensors file")
    header["__metadata__"]["lorafa"] = DEEP
    set_header(folder, json.dumps(header), rest)
    refused(folder, "is not json: it nests too deep")
    (folder / "adapter_config.json").write_text(DEEP)
    refused(folder, "nests too deep")


ENTRIES = [
    {"data_offsets": [None, None]}, {"data_offsets": ["0", "4"]}, {"data_offsets": [0]}, {"data_offsets": 3},
    {"data_offsets": [-1, 10**30]}, {"shape": "x"}, {"shape": [10**30]}, {"shape": [-4, 5]}, {"dtype": 3},
    {"dtype": "X"}, {"shape": [1.5]}, {"data_offsets": [True, True]}, {"data_offsets": [9, 1]},
]  # fmt: skip


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_headers_with_odd_entries_are_refused(folder: Path, entry: dict[str, Any]) -> None:
    header, rest = header_of(folder)
    key = next(key for key in header if key != "__metadata__")
    header[key] |= entry
    set_header(folder, json.dumps(header), rest)
    refused(folder, r"safetensors file|damaged|was cut off")
    header[key] = 5
    set_header(folder, json.dumps(header), rest)
    refused(folder, "is no safetensors file")


LAYER = "layers_0.first"
OWN = [
    {"start": 1}, {"base": ["x"]}, {"fallbacks": [LAYER]}, {"quantized": {LAYER: {"shape": [1]}}},
    {"base": {LAYER: {}}}, {"base": {LAYER: {"shape": ["x"], "dtype": "float16", "hash": "x", "sample": []}}},
    {"base": {LAYER: {"shape": [10, 12], "dtype": "float16", "hash": "x", "sample": ["x"]}}},
    {"base": {LAYER: {"shape": [10, 12], "dtype": "float16", "hash": "x", "sample": [0.5, 10**50]}}},
    {"base": {LAYER: {"shape": [10, 12], "dtype": "float16", "hash": "x", "sample": [0.5]}}},
    {"base": {}, "quantized": {LAYER: {"shape": [10, 12], "dtype": "float16", "hash": "x", "sample": [0.5]}}},
    {"own": {"init_seed": "x"}}, {"own": {"freeze_A": 3}}, {"config": {"r": [], "lora_alpha": {}}},
]  # fmt: skip


@pytest.mark.parametrize("entries", OWN, ids=str)
def test_own_entries_of_odd_types_are_refused(folder: Path, entries: dict[str, Any]) -> None:
    set_own(folder, **entries)
    refused(folder, "")


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"r": 10**30}, "at most 64 bits"),
    ({"r": 10**9}, "r must be at most 16777216"),
    ({"r": 2**24}, "by its config A and B have"),
    ({"rank_pattern": {"first": 2**20}}, "by its config A and B have"),
    ({"lora_alpha": 10**400}, "lora_alpha must be a number"),
    ({"target_modules": r"(([a-z_.0-9])+)+[XY]"}, "take too long|does not fit|matches nothing|names no layer"),
    ({"target_modules": r"((.*?)*?)*?" * 3 + "[XY]"}, "take too long|does not fit|matches nothing|names no layer"),
    ({"target_modules": "a{99999999999}"}, "repeats more than"),
    ({"target_modules": "a{4000000000}"}, "repeats more than"),
    ({"target_modules": "(" * 5000 + ")" * 5000}, "no regular expression"),
    ({"target_modules": "(a|b)" * 100_000}, "more than 32768 characters"),
    ({"rank_pattern": {f".*{i}[a-z]+": 2 for i in range(30_000)}}, "more than 32768 characters"),
    ({"rank_pattern": {"(?i)x": 2}}, "no regular expression"),
    ({"modules_to_save": ["("]}, "no regular expression"),
    ({"layers_to_transform": [0], "layers_pattern": "("}, "no regular expression"),
    ({"layers_to_transform": list(range(30_000)) * 2}, "more than once"),
    ({"layers_to_transform": [int("9" * 4000)]}, "must hold integers"),
    ({"x" * 1_000_000: "y"}, "does not know"),
    ({"unknown": "y" * 1_000_000}, "does not know"),
    ({"bias": "y" * 1_000_000}, "bias has no value"),
    ({"peft_type": ["LORA"]}, "peft_type"),
    ({"peft_type": {}}, ""),
    ({"init_lora_weights": ["x"]}, "init_lora_weights"),
    ({"init_lora_weights": {"a": 1}}, "init_lora_weights"),
    ({"loftq_config": [1], "init_lora_weights": "loftq"}, "loftq_config"),
    ({"layer_replication": [[0, 10**12]]}, ""),
    ({"layer_replication": [[0, 1]] * 100_000}, ""),
    ({"trainable_token_indices": {"first": [10**18]}}, ""),
    ({"target_parameters": ["first.weight"] * 10_000}, ""),
    ({"alora_invocation_tokens": [10**30]}, ""),
    ({"eva_config": {"rho": "x"}, "init_lora_weights": "eva"}, ""),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "said"), FIELDS, ids=[str(fields)[:50] for fields, _ in FIELDS])
def test_configs_that_ask_for_the_impossible_are_refused(folder: Path, fields: dict[str, Any], said: str) -> None:
    set_config(folder, **fields)
    refused(folder, said)


def test_a_number_of_thousands_of_digits_is_refused(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace('"r": 2', '"r": ' + "1" * 5000))
    refused(folder, "is not a json file")
    path.write_text(path.read_text().replace('"r": ' + "1" * 5000, '"r": 1e999'))
    refused(folder, "r must be an integer")


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.int8, torch.int64])
def test_whole_numbers_are_no_factors(folder: Path, dtype: torch.dtype) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({key: value.to(dtype) for key, value in load_file(path).items()}, path)
    refused(folder, f"holds whole numbers \\({dtype}\\)")


def test_floats_of_eight_bits_load_as_the_numbers_they_are(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    small = {key: value.to(torch.float8_e4m3fn) for key, value in load_file(path).items()}
    save_file(small, path)
    loaded = PeftModel.from_pretrained(base(), folder, ignore_base_mismatch=True)
    key = "base_model.model.layers_0.first.lora_A"
    live = dict(loaded.named_parameters())[f"{key}.default.weight"]
    assert torch.equal(live.float(), small[f"{key}.weight"].float())


def test_a_file_of_a_megabyte_of_other_names_is_refused_in_time(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    names = (f"base_model.model.other.{i}.mlp.experts.{i % 7}.first.lora_{f}.weight" for i in range(3000) for f in "AB")
    save_file({name: torch.zeros(1) for name in names}, path)
    refused(folder, "does not fit|no layout|not in the model")


def test_rank_patterns_that_name_each_of_a_thousand_layers_are_looked_up() -> None:
    names = [f"model.layers.{i}.mlp.{part}_proj" for i in range(500) for part in ("up", "down")]
    config = LoraConfig(target_modules=["up_proj"], rank_pattern={f"^{name}": 1 + i for i, name in enumerate(names)})
    start = time.process_time()
    assert [numbers_of(config, name)[0] for name in names] == list(range(1, 1001))
    assert time.process_time() - start < 1


@pytest.mark.parametrize("name", ["a/b", "/else/where", "a\\b", "a\0b", "\ud800", "a\nb", "x" * 300, "../x", 3, ""])
def test_adapter_names_that_lead_elsewhere_are_refused(name: Any) -> None:
    with pytest.raises(AdapterError):
        get_peft_model(base(), LoraConfig(target_modules=["first"]), adapter_name=name)
    model = get_peft_model(base(), LoraConfig(target_modules=["first"]))
    with pytest.raises(AdapterError):
        model.add_adapter(name, LoraConfig(target_modules=["first"]))


@pytest.mark.parametrize("name", ["my adapter", "ä", "v2-final_3", "user:x", "a+b@c"])
def test_other_names_are_those_of_folders(name: str, tmp_path: Path) -> None:
    get_peft_model(base(), LoraConfig(target_modules=["first"]), adapter_name=name).save_pretrained(tmp_path)
    assert (tmp_path / name / "adapter_model.safetensors").is_file()


FILES = [5, None, [], {}, "x" * 5000, "../x.safetensors", "/etc/x.safetensors", "a/../x", "a\0b", "", "C:x", "\ud800"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: repr(file)[:20])
def test_weight_maps_that_lead_out_of_their_folder_are_refused(tmp_path: Path, file: Any) -> None:
    index = tmp_path / "in" / "model.safetensors.index.json"
    index.parent.mkdir()
    save_file({"w": torch.ones(1)}, tmp_path / "x.safetensors")
    index.write_text(json.dumps({"weight_map": {"w": file}}))
    with pytest.raises(CheckpointError, match="which is no name or lies outside of its folder"):
        shards(index)
    index.write_text(json.dumps({"weight_map": {"w": "sub/x.safetensors"}}))
    with pytest.raises(SourceError, match="is not in its folder"):
        shards(index)


NAMES = ["evil\ntags:\n- injected\n---", 'a"b', "a: b", "[x]", "true", "x\ud800y", "a`b\n# c", "owner/name"]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_the_head_of_the_card_holds_what_the_base_is_called_and_no_more(tmp_path: Path, name: str) -> None:
    yaml = pytest.importorskip("yaml")
    config = LoraConfig(target_modules=["first"], base_model_name_or_path=name)
    get_peft_model(base(), config).save_pretrained(tmp_path)
    _, head, *_ = (tmp_path / "README.md").read_text(encoding="utf-8").split("---\n")
    read = yaml.safe_load(head)
    assert read.keys() == {"base_model", "library_name", "tags"}
    assert read["base_model"].encode("utf-16", "surrogatepass") == name.encode("utf-16", "surrogatepass")
    assert read["tags"] == ["lora"]


JSON: list[Callable[[], str]] = [lambda: DEEP, lambda: '{"a":' * 100_000, lambda: "1" * 5000, lambda: "{", lambda: ""]
YAML = [
    "[" * 100_000, "- " * 100_000, "a: &a [*a]", "a: 2020-99-99", "{a: " * 5000, "? [a]\n: 1", "a: *b",
    "!!python/name:os.system",
    "a: &a [1, 1]\n" + "".join(f"{k}: &{k} [{', '.join([f'*{p}'] * 9)}]\n" for p, k in pairwise("abcdefghi")),
    "a: " + "1" * 5000, "\0", "a: !!timestamp x", "a: 0b_", "[" + "[]," * 333_333 + "[]]", "- a\n" * 250_000,
]  # fmt: skip


@pytest.mark.parametrize("text", JSON)
def test_text_that_is_no_json_is_a_value_error(text: Callable[[], str]) -> None:
    with pytest.raises(ValueError):
        from_json(text())


@pytest.mark.parametrize("text", YAML, ids=lambda text: text[:15])
def test_yaml_is_read_in_bounded_time_and_depth(text: str) -> None:
    start = time.process_time()
    with pytest.raises(ValueError):
        from_yaml(text)
    assert time.process_time() - start < SECONDS


def test_yaml_with_references_is_read() -> None:
    assert from_yaml("a: &x [1, 2]\nb: *x\nc: {<<: {d: 3}}") == {"a": [1, 2], "b": [1, 2], "c": {"d": 3}}


def test_errors_fit_on_a_screen() -> None:
    with pytest.raises(ConfigError, match="characters left out") as caught:
        LoraConfig(target_modules=["first"], bias="x" * 10_000_000)
    assert len(str(caught.value)) < 1000
    assert len(str(LoraError("x" * 10**6))) < TEXT + 50
