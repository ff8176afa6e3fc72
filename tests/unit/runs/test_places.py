"""Settings that name something here are recorded as absolute paths; everything else as it was given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorafa.conf.compose import compose
from lorafa.runs.experiment import begun
from lorafa.runs.places import with_whole_paths
from lorafa.runs.record import RunDirectory
from lorafa.settings.typed import plain


def test_what_is_there_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("model", "owner/name", "smollm2-135m", "gsm8k", "q_proj"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("a.jsonl", "b.jsonl", "t.jinja"):
        (tmp_path / file).touch()
    words = ["model=model", "data=[a.jsonl,b.jsonl]", "data.template=t.jinja", "run_dir=r", "model.cache_dir=c"]
    values = with_whole_paths(plain(compose([*words, "peft.target_modules=[q_proj]"])))
    here = str(tmp_path)
    assert values["model"]["name"] == f"{here}/model"
    assert values["data"]["name"] == [f"{here}/a.jsonl", f"{here}/b.jsonl"]
    assert values["data"]["template"] == f"{here}/t.jinja"
    assert (values["run_dir"], values["model"]["cache_dir"]) == (f"{here}/r", f"{here}/c")
    assert values["peft"]["target_modules"] == ["q_proj"]
    assert with_whole_paths(plain(compose(["model=owner/name"])))["model"]["name"] == f"{here}/owner/name"
    for words in (["model=smollm2-135m"], ["data=gsm8k"], ["model=not/there"], []):
        assert with_whole_paths(plain(compose(words))) == plain(compose(words))


def test_a_run_is_the_same_from_another_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "elsewhere").mkdir()
    typed = compose(["model=model", "data=a.jsonl", "run_dir=r", "if_exists=resume"])
    RunDirectory.create(Path("r"), typed)
    assert begun(typed) is not None
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert RunDirectory.open("../r").config().model.name == str(tmp_path / "model")
    assert begun(compose(["model=../model", "data=../a.jsonl", "run_dir=../r", "if_exists=resume"])) is not None


def test_numbers_of_a_record_are_those_of_json(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", compose())
    run.update_result(after={"loss": float("nan"), "shares": [1.0, float("inf"), {"x": -float("inf")}]}, steps=3)
    run.add_metrics({"step": 1, "loss": float("nan"), "seconds": 0.5})
    run.add_metrics({"step": 2, "loss": 1.0, "norms": [float("nan")]})

    def refuse(name: str) -> None:
        raise AssertionError(name)

    found = json.loads((run.path / "result.json").read_text(), parse_constant=refuse)
    assert found == {"after": {"loss": None, "shares": [1.0, None, {"x": None}]}, "steps": 3}
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse) for line in lines] == [
        {"step": 1, "seconds": 0.5}, {"step": 2, "loss": 1.0},
    ]  # fmt: skip
    run.drop_metrics_after(1)
    assert run.metrics() == [{"step": 1, "seconds": 0.5}]


def test_leavings_of_killed_processes_go_when_the_run_goes_on(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", compose())
    for name in ("config.yaml", "metrics.jsonl", "report.html"):
        (run.path / f".{name}.{'0' * 32}.tmp").write_text("half")
    with run.held():
        assert sorted(path.name for path in run.path.iterdir()) == [".lock", "config.yaml"]
