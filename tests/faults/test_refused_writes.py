"""A system that refuses a write is heard through every library: the error is ours, and names place and reason."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from lorafa.cli.main import main
from lorafa.conf.compose import compose
from lorafa.errors import CheckpointError, ConfigError
from lorafa.models.kinds.causal import CAUSAL
from lorafa.runs.record import RunDirectory
from lorafa.storage.refusals import as_os_error, refusal
from lorafa.storage.whole import make_folder, write_json
from lorafa.train.checkpoints import whole_or_none
from lorafa.train.keeping import TELLS, Trained, _put_tokenizer, save
from toys.faults import FEW, check_every_fault
from toys.language_models import byte_tokenizer, tiny_llama
from toys.runs import make_run

resource = pytest.importorskip("resource")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to make a file larger, as a full disk does, whoever writes it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("library", ["tokenizers", "safetensors", "torch", "python"])
def test_what_a_library_raises_is_the_error_of_the_system(library: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_llama(), byte_tokenizer()
    acts = {
        "tokenizers": lambda: tokenizer.save_pretrained(tmp_path / "a"),
        "safetensors": lambda: model.save_pretrained(tmp_path / "a"),
        "torch": lambda: torch.save({"a": torch.zeros(10_000)}, tmp_path / "a"),
        "python": lambda: (tmp_path / "a").write_bytes(bytes(10_000)),
    }
    with pytest.raises(OSError, match=r"File too large|inline_") as error, files_of_at_most(3000), as_os_error():
        acts[library]()
    assert error.value.errno == (errno.EIO if library == "torch" else errno.EFBIG)


def test_other_errors_stay_what_they_are() -> None:
    assert refusal(RuntimeError("CUDA error")) is None
    assert refusal(ValueError("os error 28")) is None
    with pytest.raises(KeyError), as_os_error():
        raise KeyError("x")


def test_a_whole_model_that_does_not_fit_leaves_the_old_one(tmp_path: Path) -> None:
    run, config = RunDirectory(tmp_path), compose(["peft=full_ft"])
    trained = Trained(tiny_llama(), byte_tokenizer(), CAUSAL)
    (run.model).mkdir()
    (run.model / "config.json").write_text("old")
    said = rf"{run.model} could not be written: File too large\..*Make room"
    with pytest.raises(CheckpointError, match=said), files_of_at_most(3000):
        save(trained, config, run)
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "config.json"]


@pytest.mark.parametrize(
    "error",
    [
        Exception("No space left on device (os error 28)"), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("[enforce fail at inline_container.cc:672] . No space left on device"),
    ],
    ids=["tokenizers", "python", "torch"],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_removed(error: Exception, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    said = rf"{checkpoint} could not be written: .*No space left on device.*Make room"
    with pytest.raises(CheckpointError, match=said), whole_or_none(checkpoint):
        raise error
    assert not checkpoint.exists()


def test_a_tokenizer_beside_an_adapter_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    old, new = byte_tokenizer(), byte_tokenizer()
    new.add_tokens(["<tool>"])
    new.model_max_length = 77
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "adapter_config.json").write_text("{}")
    _put_tokenizer(old, tmp_path / "old")
    _put_tokenizer(new, tmp_path / "new")

    def look(place: Path) -> None:
        if (place / TELLS).exists():
            found = AutoTokenizer.from_pretrained(place, trust_remote_code=False).get_vocab()
            assert found in (old.get_vocab(), new.get_vocab())
            text = (place / TELLS).read_text()
            (same,) = (one for one in ("old", "new") if (tmp_path / one / TELLS).read_text() == text)
            assert (place / "tokenizer.json").read_bytes() == (tmp_path / same / "tokenizer.json").read_bytes()
        assert (place / "adapter_config.json").read_text() == "{}"

    assert check_every_fault(tmp_path / "old", lambda place: _put_tokenizer(new, place), tmp_path, FEW, look) > 20


def test_a_tokenizer_that_does_not_fit_leaves_the_old_one(tmp_path: Path) -> None:
    _put_tokenizer(byte_tokenizer(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    new = byte_tokenizer()
    new.add_tokens(["<tool>"])
    said = rf"{tmp_path} could not be written: File too large\..*Nothing was changed"
    with pytest.raises(CheckpointError, match=said), files_of_at_most(3000):
        _put_tokenizer(new, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_tokenizer_with_several_templates_keeps_them(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": "{{ 1 }}", "tools": "{{ 2 }}"}
    _put_tokenizer(tokenizer, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False).chat_template == tokenizer.chat_template


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG])
def test_a_folder_that_cannot_be_made_is_named(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, *_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), str(path))

    folder, config = tmp_path / "place", compose([f"run_dir={tmp_path / 'place'}"])
    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(CheckpointError, match=rf"The folder {folder} could not be made: {os.strerror(code)}"):
        make_folder(folder)
    with pytest.raises(CheckpointError, match=rf"The folder {folder} could not be made: {os.strerror(code)}"):
        _put_tokenizer(byte_tokenizer(), folder)
    with (
        pytest.raises(ConfigError, match=rf"The run directory '{folder}' cannot be made: {os.strerror(code)}"),
        RunDirectory.claimed(config),
    ):
        pass


def test_a_command_says_what_was_refused_of_a_file_that_was_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = make_run(tmp_path / "run", loss=1.0, steps=3)
    monkeypatch.setattr("lorafa.report.page.write_report", refused)
    assert main(["report", str(run)]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert said == "error: No space left on device. The system refuses a file of this command: see to it, or make room."


def test_a_record_that_cannot_be_written_names_its_file(tmp_path: Path) -> None:
    said = rf"{tmp_path / 'a.json'} could not be written: File too large\."
    with pytest.raises(CheckpointError, match=said), files_of_at_most(100):
        write_json(tmp_path / "a.json", {"a": "x" * 10_000})
    assert list(tmp_path.iterdir()) == []
