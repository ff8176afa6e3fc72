"""What is written down holds no passwords and tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorafa.conf.compose import compose
from lorafa.errors import ConfigError
from lorafa.runs.experiment import start_run
from lorafa.runs.record import RunDirectory
from lorafa.runs.secrets import masked, refuse_secrets

TOKEN = "hf_" + "aB3" * 11
KEY = "0123456789abcdef0123"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"could not read with {TOKEN}.", "could not read with ***."),
        ("https://ann:pass-word@host/x", "https://***@host/x"),
        ("ghp_" + "x" * 36, "***"),
        ("a hf_model name, sk-learn, x@y.z, http://host:80/a", None),
    ],
)
def test_what_has_the_shape_of_a_secret_is_masked(text: str, shown: str | None) -> None:
    assert masked(text) == (text if shown is None else shown)


def test_values_of_secret_variables_are_masked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", KEY + "more")
    monkeypatch.setenv("USE_TOKEN", "true")
    monkeypatch.setenv("SSH_KEY_FILE", str(tmp_path))
    monkeypatch.setenv("ID_TOKEN", KEY * 50)  # longer than a name of a file may be
    monkeypatch.setenv("TOKENIZER_NAME", "smollm2-135m")
    assert masked([KEY * 50, "smollm2-135m"]) == ["***", "smollm2-135m"]
    value: dict[str, Any] = {"a": [f"x{KEY}y", 3, None], "b": {"c": KEY + "more"}, "d": "true", "e": str(tmp_path)}
    assert masked(value) == {"a": ["x***y", 3, None], "b": {"c": "***"}, "d": "true", "e": str(tmp_path)}


def test_a_run_directory_holds_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MY_SECRET", KEY)
    run = RunDirectory.create(tmp_path / "run", compose())
    run.write_environment({"command": ["lorafa", "train", f"x={KEY}"]})
    run.update_result(error=f"no access with {TOKEN} or {KEY}")
    written = "".join(path.read_text() for path in run.path.iterdir())
    assert KEY not in written
    assert TOKEN not in written
    assert run.result()["error"] == "no access with *** or ***"


def test_a_setting_that_holds_one_is_refused_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    config = compose([f"data=https://ann:{KEY}@host/rows.jsonl"])
    with pytest.raises(ConfigError, match=r"data\.name holds a secret, and settings are recorded\. Give it by an"):
        start_run(config, None, [])  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    refuse_secrets({"a": {"b": [1, "x"]}, "c": ("y",)})
