"""A model's files read from headers alone, and written tensor by tensor."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorafa.errors import CheckpointError, SourceError
from lorafa.storage import model_writer
from lorafa.storage.model_files import model_files, tensors_in
from lorafa.storage.model_writer import ModelWriter, Planned, arranged, in_shards
from lorafa.storage.octets import DTYPES
from lorafa.storage.tensors import entries_of

MIXED = {
    "b.weight": torch.arange(12.0).view(3, 4).to(torch.bfloat16),
    "a": torch.tensor(2.5, dtype=torch.float64),
    "c": torch.tensor([True, False, True]),
    "d": torch.arange(5),
    "empty": torch.empty(0, 7, dtype=torch.float16),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(MIXED, tmp_path / "model.safetensors", metadata={"format": "pt", "made_by": "me"})
    return tmp_path


def test_every_tensor_is_read_as_safetensors_reads_it(folder: Path) -> None:
    found = model_files(folder)
    assert found.tensors.keys() == MIXED.keys()
    assert found.metadata == {"model.safetensors": {"format": "pt", "made_by": "me"}}
    for name, stored in found.tensors.items():
        assert torch.equal(stored.read(), MIXED[name])
        assert stored.read().dtype == MIXED[name].dtype
    assert torch.equal(found.tensors["b.weight"].rows([0, 2]), MIXED["b.weight"][[0, 2]])


def test_a_written_file_is_one_that_safetensors_reads(folder: Path, tmp_path: Path) -> None:
    """In every format that torch has numbers of, copied or made, in an order of its own."""
    stored, out = model_files(folder).tensors, tmp_path / "out"
    out.mkdir()
    made = {f"of {dtype}": torch.zeros(3, 5).to(dtype) for dtype in DTYPES.values()}
    planned = [Planned(name, one.dtype, one.shape, one) for name, one in stored.items()]
    planned += [Planned(name, one.dtype, tuple(one.shape)) for name, one in made.items()]
    done: list[int] = []
    with ModelWriter(out, [arranged("model.safetensors", planned, {"made_by": "me"})], done.append) as writer:
        for name, one in reversed(made.items()):
            writer.put(name, one)
        for name in stored:
            writer.copy(name)
    assert sum(done) == sum(one.nbytes for one in planned)
    found = load_file(out / "model.safetensors")
    assert found.keys() == MIXED.keys() | made.keys()
    for name, one in (MIXED | made).items():
        assert found[name].dtype == one.dtype
        assert torch.equal(found[name].view(-1).view(torch.uint8), one.view(-1).view(torch.uint8)), name
    assert model_files(out).metadata["model.safetensors"] == {"format": "pt", "made_by": "me"}
    size = len(arranged("x", planned, {"made_by": "me"}).header)
    for name, entry in entries_of(out / "model.safetensors").items():  # readers map files, so numbers must be aligned
        assert (size + entry["data_offsets"][0]) % found[name].dtype.itemsize == 0


def test_shards_hold_no_more_than_they_may_and_have_an_index(tmp_path: Path) -> None:
    made = {f"{i}": torch.full((10,), float(i)) for i in range(5)} | {"large": torch.ones(100)}
    files = in_shards([Planned(name, one.dtype, tuple(one.shape)) for name, one in made.items()], 100, {})
    with ModelWriter(tmp_path, files) as writer:
        for name, one in made.items():
            writer.put(name, one)
    sizes = [sum(tensor.nbytes for tensor in file.tensors) for file in files]
    assert sizes == [80, 80, 40, 400]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 600, "total_parameters": 150}
    found = model_files(tmp_path).tensors
    assert {name: stored.file.name for name, stored in found.items()} == index["weight_map"]
    assert all(torch.equal(found[name].read(), one) for name, one in made.items())


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    with ModelWriter(tmp_path, in_shards([Planned("a", torch.float32, (2,))], 100, {})) as writer:
        writer.put("a", torch.ones(2))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_what_was_planned_and_not_written_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="1 planned tensors were not written"),
        ModelWriter(tmp_path, in_shards([Planned("a", torch.float32, (2,))], 100, {})),
    ):
        pass


def test_a_tensor_of_another_shape_than_planned_is_not_written(tmp_path: Path) -> None:
    files = in_shards([Planned("a", torch.float32, (2,))], 100, {})
    with pytest.raises(RuntimeError, match="was planned"), ModelWriter(tmp_path, files) as writer:
        writer.put("a", torch.ones(3))


@pytest.mark.parametrize("missing", ["copy_file_range", "posix_fallocate"])
def test_systems_without_a_call_write_the_same(
    missing: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, missing)
    monkeypatch.setattr(model_writer, "_CHUNK", 5)
    stored, out = model_files(folder).tensors, tmp_path / "out"
    out.mkdir()
    planned = [Planned(name, one.dtype, one.shape, one) for name, one in stored.items()]
    with ModelWriter(out, [arranged("model.safetensors", planned, {})]) as writer:
        for name in stored:
            writer.copy(name)
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(found[name], one) for name, one in MIXED.items())


# ---- damage


def rewritten(folder: Path, change: Any) -> Path:
    """The file with its header changed."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    return path


def set_entry(name: str, **values: Any) -> Any:
    return lambda header: header[name].update(values)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (set_entry("d", data_offsets=[None, None]), "its header is not readable"),
        (set_entry("d", data_offsets=["0", "4"]), "its header is not readable"),
        (lambda header: header.update(__metadata__={"format": 3}), "is damaged"),
        (set_entry("d", data_offsets=[8, 4]), "places 'd' at"),
        (set_entry("d", data_offsets=[0, 8.0]), "places 'd' at"),
        (set_entry("d", data_offsets=[0, 1]), "gives 'd' 1 bytes"),
        (set_entry("d", shape=[2.5]), "the shape"),
        (set_entry("d", shape="x"), "the shape"),
        (set_entry("d", shape=[4]), "ask for 32"),
        (set_entry("d", dtype="F4"), "stored as 'F4'"),
        (set_entry("d", dtype="I32"), "ask for 20"),
        (set_entry("a", data_offsets=[0, 10**9]), "was cut off"),
    ],
)
def test_a_damaged_header_is_refused(change: Any, text: str, folder: Path) -> None:
    rewritten(folder, change)
    with pytest.raises(CheckpointError, match=text):
        model_files(folder)


def test_tensors_that_overlap_are_refused(tmp_path: Path) -> None:
    """Two tensors in the same bytes would both be written, and a change of one lost in the other."""
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, tmp_path / "model.safetensors")
    path = rewritten(tmp_path, set_entry("b", data_offsets=[0, 16]))
    with pytest.raises(CheckpointError, match="is damaged"):
        tensors_in(path)


def test_a_file_that_was_cut_off_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"was cut off: 3 of \d+ bytes are missing"):
        model_files(folder)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(folder: Path) -> None:
    stored = model_files(folder).tensors["b.weight"]
    os.truncate(stored.file, stored.start + 3)
    with pytest.raises(CheckpointError, match="was cut off while it was read"):
        stored.read()


def sharded(folder: Path, tensors: dict[str, Tensor], listed: dict[str, Any]) -> Path:
    for name, tensor in tensors.items():
        save_file({name: tensor}, folder / f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    return folder


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("listed", "kind", "text"),
    [
        ({"a": "a.safetensors", "b": "gone.safetensors"}, SourceError, "which is not in its folder"),
        ({"a": "a.safetensors", "c": "b.safetensors"}, CheckpointError, "c is in files that do not hold it"),
        ({"a": "../a.safetensors"}, (SourceError, CheckpointError), "outside of its folder|not in its folder"),
        ([], CheckpointError, "weight_map"),
    ],
)
def test_an_index_that_does_not_agree_with_the_files_is_refused(
    listed: Any, kind: Any, text: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=text):
        model_files(sharded(tmp_path, {"a": ONE, "b": ONE}, listed))


def test_a_folder_with_pickles_says_how_to_get_rid_of_them(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(SourceError, match="which can run code when they are opened"):
        model_files(tmp_path)
