"""What headers say of the weights of a model is what its files hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorafa.errors import CheckpointError, SourceError
from lorafa.storage.headers import stored_weights


def test_bytes_and_numbers_are_those_of_the_tensors(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3, 4), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.ones(2, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = stored_weights(tmp_path)
    assert found is not None
    assert (found.bytes, found.numbers, found.files, found.main_dtype) == (48 + 10 + 2, 19, 1, "F32")
    assert found.by_dtype == {"F32": 48, "BF16": 10, "U8": 2}


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    for name in "ab":
        save_file({name: torch.ones(6)}, tmp_path / f"{name}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}})
    )
    found = stored_weights(tmp_path)
    assert found is not None
    assert (found.bytes, found.files) == (48, 2)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(SourceError, match=r"names 'b\.safetensors', which is not in its folder"):
        stored_weights(tmp_path)


def test_pickles_say_nothing_and_a_model_of_the_hub_that_is_not_here_neither(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert stored_weights(tmp_path) is None
    assert stored_weights("nobody/never-fetched") is None


def test_a_damaged_header_is_an_error(tmp_path: Path) -> None:
    save_file({"a": torch.ones(60)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match=r"was cut off: 8 of \d+ bytes are missing. Fetch or save it again"):
        stored_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole[:8] + b"x" * (len(whole) - 8))
    with pytest.raises(CheckpointError, match="its header is not readable"):
        stored_weights(tmp_path)
