"""Files are written whole or not at all, and a damaged one is refused with the reason."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

import lorafa.storage.tensors as files
from lorafa.errors import CheckpointError
from lorafa.storage.tensors import read_tensors, write_tensors
from lorafa.storage.whole import make_folder, read_json, write_json
from toys.compare import assert_same_tensors
from toys.data import some_tensors


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_what_is_read_is_what_was_written_bit_for_bit(tmp_path):
    write_tensors(tmp_path / "w.safetensors", some_tensors(), {"lorafa": "{}"})
    tensors, metadata = read_tensors(tmp_path / "w.safetensors")
    assert_same_tensors(tensors, some_tensors())
    assert metadata == {"format": "pt", "lorafa": "{}"}
    assert leftovers(tmp_path) == []


def test_the_file_is_readable_by_safetensors_itself(tmp_path):
    from safetensors.torch import load_file

    write_tensors(tmp_path / "w.safetensors", some_tensors())
    assert_same_tensors(load_file(tmp_path / "w.safetensors"), some_tensors())


def test_tensors_that_share_memory_or_have_strides_are_written_in_full(tmp_path):
    weight = torch.arange(12.0).reshape(3, 4)
    shared = {
        "one": weight,
        "tied": weight,
        "turned": weight.T,
        "part": weight[1:],
        "parameter": torch.nn.Parameter(weight),
    }
    write_tensors(tmp_path / "w.safetensors", shared)
    assert_same_tensors(read_tensors(tmp_path / "w.safetensors")[0], {name: t.detach() for name, t in shared.items()})


def test_an_empty_adapter_is_a_valid_file(tmp_path):
    write_tensors(tmp_path / "w.safetensors", {})
    assert read_tensors(tmp_path / "w.safetensors") == ({}, {"format": "pt"})


def test_a_tensor_without_values_is_refused(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"was not written: b has no values \(device 'meta'\)\. Load the weights first\."
    ):
        write_tensors(tmp_path / "w.safetensors", {"a": torch.ones(1), "b": torch.ones(1, device="meta")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("old_file", [True, False])
def test_a_full_disk_leaves_the_old_file_and_no_trace(tmp_path, monkeypatch, old_file):
    path = tmp_path / "w.safetensors"
    if old_file:
        write_tensors(path, some_tensors())
    before = sorted(p.name for p in tmp_path.iterdir())

    def half_written(target: Path, tensors: object, metadata: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "put_tensors", half_written)
    text = (
        r"w\.safetensors could not be written: No space left on device\. \d+ MiB are free there\. Nothing was changed\."
    )
    with pytest.raises(CheckpointError, match=text + " Make room or save to another folder"):
        write_tensors(path, {"other": torch.ones(3)})
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    if old_file:
        assert_same_tensors(read_tensors(path)[0], some_tensors())


def test_any_other_failure_while_writing_leaves_the_old_file_and_no_trace(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    write_tensors(path, some_tensors())

    def interrupted(target: Path, tensors: object, metadata: object) -> None:
        Path(target).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "put_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_tensors(path, {"other": torch.ones(3)})
    assert os.listdir(tmp_path) == ["w.safetensors"]
    assert_same_tensors(read_tensors(path)[0], some_tensors())


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone/w\.safetensors could not be written: .*Nothing was changed"):
        write_tensors(tmp_path / "gone" / "w.safetensors", some_tensors())


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file is a file, not a folder\. Choose a folder to save to\."):
        make_folder(tmp_path / "file")
    with pytest.raises(
        CheckpointError, match=r"The folder .*below could not be made: Not a directory\. Choose another"
    ):
        make_folder(tmp_path / "file" / "below")


def test_json_is_written_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "c.json", {"b": 1, "a": [2]})
    assert (tmp_path / "c.json").read_text() == json.dumps({"a": [2], "b": 1}, indent=2)
    with pytest.raises(TypeError):
        write_json(tmp_path / "c.json", {"b": object()})
    assert read_json(tmp_path / "c.json") == {"b": 1, "a": [2]}
    assert os.listdir(tmp_path) == ["c.json"]


def test_a_file_that_was_cut_off_says_how_many_bytes_are_missing(tmp_path):
    path = tmp_path / "w.safetensors"
    write_tensors(path, some_tensors())
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(
        CheckpointError, match=rf"w\.safetensors was cut off: 10 of {size} bytes are missing\. Fetch or"
    ):
        read_tensors(path)


DAMAGED = [
    (b"", r"is no safetensors file, or was cut off in its header \(0 bytes long\)\. Fetch or save it again"),
    (b"\x40\x00\x00\x00\x00\x00\x00\x00{", r"is no safetensors file, or was cut off in its header \(9 bytes long\)"),
    (b"<!doctype html><html>not found</html>", r"is no safetensors file, or was cut off in its header"),
    (b"\x04\x00\x00\x00\x00\x00\x00\x00junk" + b"0" * 9, r"is no safetensors file: its header is not readable\. Fetch"),
    (b"version https://git-lfs.github.com/spec/v1\noid", r"is a Git LFS pointer, not the weights\. Run 'git lfs pull'"),
]


@pytest.mark.parametrize(("content", "text"), DAMAGED)
def test_what_is_no_safetensors_file_is_refused(content, text, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=text):
        read_tensors(tmp_path / "w.safetensors")


def test_a_header_that_contradicts_itself_is_refused(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match=r"w\.safetensors is damaged: .*\. Fetch or save it again"):
        read_tensors(tmp_path / "w.safetensors")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"w\.safetensors could not be read: No such file or directory\. Check"):
        read_tensors(tmp_path / "w.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(bad, dtype, tmp_path):
    path = tmp_path / "w.safetensors"
    fine = some_tensors() | {"empty": torch.empty(0, dtype=dtype), "b.lora_A.weight": torch.ones(2, dtype=dtype)}
    write_tensors(path, fine)
    assert read_tensors(path)[0].keys() == fine.keys()
    write_tensors(path, fine | {"b.lora_A.weight": torch.tensor([1.0, bad]).to(dtype)})
    text = r"not finite \(NaN or infinity\) in 1 of 5 tensors: b\.lora_A\.weight\. The training it comes from diverged"
    with pytest.raises(CheckpointError, match=text):
        read_tensors(path)


def test_a_pickle_is_refused_with_the_reason_and_read_as_tensors_only_when_asked_for(tmp_path):
    path = tmp_path / "adapter_model.bin"
    torch.save(some_tensors(), path)
    with pytest.raises(
        CheckpointError, match=r"is a pickle, and opening a pickle can run any code .* allow_pickle=True"
    ):
        read_tensors(path)
    tensors, metadata = read_tensors(path, allow_pickle=True)
    assert_same_tensors(tensors, some_tensors())
    assert metadata == {}


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, ("harm-was-done",))


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_a_safetensors_file_is_read_whatever_it_is_called(tmp_path, suffix):
    path = tmp_path / f"w{suffix}"
    write_tensors(path, some_tensors())
    assert_same_tensors(read_tensors(path)[0], some_tensors())
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"was cut off: 10 of \d+ bytes are missing"):
        read_tensors(path)


def test_a_pickle_with_code_in_it_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Harmful()}, "w.bin")
    with pytest.raises(
        CheckpointError, match=r"w\.bin could not be read: .* It is damaged, or holds more than tensors"
    ):
        read_tensors("w.bin", allow_pickle=True)
    assert os.listdir(tmp_path) == ["w.bin"]


@pytest.mark.parametrize("content", [[torch.ones(1)], {"a": 1}])
def test_a_pickle_of_something_else_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "w.bin")
    with pytest.raises(CheckpointError, match=r"w\.bin does not hold a dict of tensors\. Is it the right file\?"):
        read_tensors(tmp_path / "w.bin", allow_pickle=True)


def test_a_damaged_pickle_is_refused(tmp_path):
    (tmp_path / "w.bin").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"w\.bin could not be read: .* fetch it again"):
        read_tensors(tmp_path / "w.bin", allow_pickle=True)
