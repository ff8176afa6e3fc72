"""What bad files get: an error of the right kind that says what to do, and model and files as they were."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorafa
from lorafa import PeftModel
from lorafa.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    LoraError,
    NotAvailableError,
    SourceError,
    TargetError,
)
from toys.blocks import Model, refused, train_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train_model().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def of_another_program(folder: Path, **changes: object) -> None:
    """An edited config beside tensors whose header says nothing of it."""
    edit_config(folder, **changes)
    edit_tensors(folder, lambda tensors: None)


def cut(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-100])


def to_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


KEY = "base_model.model.layers.0.q_proj.lora_A.weight"
FILES: dict[str, tuple[Callable[[Path], Any], type[LoraError], str]] = {
    "cut off": (cut, CheckpointError, "was cut off: 100 of "),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), CheckpointError, "(0 bytes long). Fetch or save it again."),
    "no safetensors": (lambda f: (f / WEIGHTS).write_bytes(b"x" * 99), CheckpointError, "is no safetensors file"),
    "nan": (
        lambda f: edit_tensors(f, lambda t: t[KEY].fill_(float("nan"))),
        CheckpointError,
        f"holds values that are not finite (NaN or infinity) in 1 of 8 tensors: {KEY}.",
    ),
    "infinity": (lambda f: edit_tensors(f, lambda t: t[KEY].fill_(float("inf"))), CheckpointError, "not finite"),
    "missing key": (
        lambda f: edit_tensors(f, lambda t: t.pop(KEY)),
        CheckpointError,
        "does not fit adapter 'other'.\n  missing in the file (1):\n    layers.0.q_proj.lora_A.weight",
    ),
    "unexpected key": (
        lambda f: edit_tensors(f, lambda t: t.update({KEY.replace("q_proj", "k_proj"): torch.zeros(4, 8)})),
        CheckpointError,
        "not in the model (1):\n    layers.0.k_proj.lora_A.weight",
    ),
    "another rank": (
        lambda f: of_another_program(f, r=2),
        CheckpointError,
        "The file has rank 4, the adapter rank 2. Make the adapter with r=4.\nNothing was loaded.",
    ),
    "another formula": (
        lambda f: of_another_program(f, use_dora=True),
        CheckpointError,
        "Only the model uses use_dora, the file does not: the two configs differ.",
    ),
    "config of another save": (
        lambda f: edit_config(f, lora_alpha=64),
        CheckpointError,
        "adapter_config.json and adapter_model.safetensors are not of one save: lora_alpha is 64 and was 8 when the "
        "tensors were saved. Restore the file that is of another save. If the config was edited on purpose, load with "
        "ignore_config_mismatch=True and save the adapter. Nothing was loaded.",
    ),
    "unknown key in the config": (
        lambda f: edit_config(f, use_magic=True),
        ConfigError,
        "The config sets use_magic=True, which lorafa",
    ),
    "value that is not allowed": (
        lambda f: edit_config(f, r=0),
        ConfigError,
        "r must be an integer >= 1, found 0 (int)",
    ),
    "config of another method": (
        lambda f: edit_config(f, peft_type="IA3"),
        ConfigError,
        "peft_type has no value 'IA3'.",
    ),
    "later feature": (lambda f: edit_config(f, megatron_config={"a": 2}), NotAvailableError, "LoRA on Megatron's"),
    "config that is no json": (lambda f: (f / CONFIG).write_text("{"), CheckpointError, "is not a json file: "),
    "no config": (lambda f: (f / CONFIG).unlink(), SourceError, f"has no {CONFIG}; it holds: "),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), SourceError, f"has no {WEIGHTS} or adapter_model.bin; it holds: "),
    "no folder": (shutil.rmtree, SourceError, "There is no folder "),
    "pickle": (to_pickle, CheckpointError, "is a pickle, and opening a pickle can run any code its author put in."),
}


@pytest.mark.parametrize("damage", list(FILES))
@pytest.mark.filterwarnings("ignore")
def test_a_file_that_cannot_be_used_changes_neither_a_base_nor_an_adapted_model(folder: Path, damage: str) -> None:
    act, kind, text = FILES[damage]
    act(folder)
    files = contents(folder.parent)
    base = Model()
    with refused(base, kind, text.replace("'other'", "'default'")):
        PeftModel.from_pretrained(base, folder)
    model = train_model(target_modules=["q_proj", "head"])
    with refused(model, kind, text):
        model.load_adapter(folder, "other")
    assert list(model.peft_config) == model.active_adapters == ["default"]
    assert contents(folder.parent) == files


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("value", [None, False, "", {}, []])
def test_an_unknown_key_without_a_value_changes_nothing(folder: Path, value: object) -> None:
    expected = PeftModel.from_pretrained(Model(), folder)
    edit_config(folder, use_magic=value)
    loaded = PeftModel.from_pretrained(Model(), folder)
    assert loaded.peft_config == expected.peft_config
    x = torch.arange(10)
    assert torch.equal(loaded(x), expected(x))
    assert not torch.equal(loaded(x), Model()(x))


def test_a_pickle_is_read_when_it_is_asked_for(folder: Path) -> None:
    wanted = load_file(folder / WEIGHTS)
    to_pickle(folder)
    model = PeftModel.from_pretrained(Model(), folder, allow_pickle=True)
    state = lorafa.get_peft_model_state_dict(model)
    assert all(torch.equal(state[key], value) for key, value in wanted.items())


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (lambda: Model(depth=3), "The file has layers 0..1, the model 0..2: the depth or layers_to_transform differs."),
        (lambda: nn.Sequential(nn.Linear(8, 8)), "target_modules: 'q_proj', 'v_proj' match nothing in the model."),
        (lambda: nn.ModuleDict({"body": Model()}), "The file was made with another wrapping of the model"),
        (lambda: nn.ModuleDict({"q_proj": nn.Linear(4, 4), "v_proj": nn.Linear(4, 4)}), "No name is in both"),
    ],
    ids=["deeper", "without the layers", "wrapped", "another architecture"],
)
@pytest.mark.filterwarnings("ignore")
def test_a_file_for_another_architecture(folder: Path, other: Callable[[], nn.Module], text: str) -> None:
    model = other()
    with refused(model, TargetError if "match nothing" in text else CheckpointError, text):
        PeftModel.from_pretrained(model, folder)


def test_a_file_for_other_base_weights(folder: Path) -> None:
    model = Model(seed=1)
    text = (
        "was made for another base model: 4 of 4 adapted layers have other weights here: layers.0.q_proj, layers.0.v_p"
    )
    with refused(model, CheckpointError, text):
        PeftModel.from_pretrained(model, folder)
    PeftModel.from_pretrained(model, folder, ignore_base_mismatch=True)


def test_a_file_into_an_adapter_of_other_settings(folder: Path) -> None:
    model = train_model(r=2)
    with refused(model, CheckpointError, "The file has rank 4, the adapter rank 2. Make the adapter with r=4."):
        model.load_adapter(folder, "default")


def test_a_state_dict_that_does_not_fit() -> None:
    model = train_model()
    state = {key: value.clone() for key, value in lorafa.get_peft_model_state_dict(model).items()}
    state[KEY] = torch.zeros(3, 8)
    with refused(model, CheckpointError, "layers.0.q_proj.lora_A.weight: the file has 3x8, the model 4x8"):
        lorafa.set_peft_model_state_dict(model, state)
    assert not torch.equal(model.get_parameter(KEY.replace("lora_A", "lora_A.default")), torch.zeros(4, 8))


# ---- saving


@contextmanager
def disk_with_room_for(size: int) -> Iterator[None]:
    """No file can grow beyond ``size`` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 100, 1200])
def test_a_full_disk_leaves_the_saved_adapter_and_no_trace(folder: Path, room: int) -> None:
    """100 bytes stop the weights; where those fit, the config or the side entry is stopped."""
    before, model = contents(folder), train_model(r=1)
    with refused(model, CheckpointError, "could not be written: "), disk_with_room_for(room):
        model.save_pretrained(folder)
    assert contents(folder) == before
    assert sorted(path.name for path in folder.iterdir()) == sorted(before)
    PeftModel.from_pretrained(Model(), folder)


def test_a_disk_that_fills_up_after_the_weights_leaves_the_old_adapter_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_text

    def full(path: Path, *arguments: object, **named: object) -> None:
        write(path, "half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    before, model = contents(folder), train_model()
    monkeypatch.setattr(Path, "write_text", full)
    with refused(model, CheckpointError, f"{folder / CONFIG} could not be written: No space left"):
        model.save_pretrained(folder)
    assert contents(folder) == before


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    model = train_model()
    with refused(model, CheckpointError, "is a file, not a folder. Choose a folder to save to."):
        model.save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_saving_an_adapter_that_is_not_there_writes_nothing(tmp_path: Path) -> None:
    model = train_model()
    with refused(model, AdapterError, "The model has no adapter 'b'. It has: default."):
        model.save_pretrained(tmp_path, selected_adapters=["default", "b"])
    assert not list(tmp_path.iterdir())
