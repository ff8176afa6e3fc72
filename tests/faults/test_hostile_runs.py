"""Run directories, comparisons and chat templates of others: each is drawn, or refused with an error of lorafa's."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lorafa.cli.main import main
from lorafa.data.rendering import render
from lorafa.errors import ConfigError, DataError, LoraError
from lorafa.report.page import write_report
from lorafa.report.runs import Report
from lorafa.runs.measures import final_loss
from lorafa.runs.plan import Plan
from lorafa.runs.record import RunDirectory
from toys.language_models import byte_tokenizer, conversation
from toys.runs import make_run

ODD: list[dict[str, Any]] = [
    {"steps": "x"}, {"samples": ["x"]}, {"samples": [{"prompt": 3}]}, {"parameters": {}}, {"parameters": {"all": "x"}},
    {"seconds": {"total": float("nan")}}, {"seconds": {"total": "x"}}, {"seconds": {"train": 1e999}}, {"status": [1]},
    {"rows": {"train": {}}}, {"rows": 3}, {"after": {"accuracy": "x"}}, {"after": {"loss": 1.0, "total": []}},
    {"peak_rss_bytes": "x"}, {"peak_device_bytes": -1}, {"start": {"ranks": 3}}, {"start": []}, {"decisions": [3]},
    {"source": 5}, {"error": {"a": 1}}, {"samples_sha256": 7}, {"coverage": {"a": 1}}, {"parameters": {"trainable": 1}},
]  # fmt: skip


def odd_run(path: Path, entries: dict[str, Any]) -> Path:
    """A run with few steps whose result was edited."""
    result = make_run(path, loss=1.0, steps=3) / "result.json"
    result.write_text(json.dumps(json.loads(result.read_text()) | entries))
    return path


@pytest.mark.matrix(4, each_word=False)
@pytest.mark.parametrize("entries", ODD, ids=str)
def test_odd_results_are_drawn_or_refused(entries: dict[str, Any], tmp_path: Path) -> None:
    run = odd_run(tmp_path / "run", entries)
    with suppress(LoraError):
        write_report(run)
    make_run(tmp_path / "sound", loss=1.0, steps=3)
    report = Report.of([tmp_path]).sound()
    assert [entry.name for entry in report.entries if entry.counts][-1:] == ["sound"]
    assert all("run" in str(entry.error) for entry in report.damaged)


def test_the_refusal_names_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = odd_run(tmp_path / "run", {"seconds": {"total": "x"}})
    assert main(["report", str(run)]) == 1
    said = capsys.readouterr().err
    assert "not foreseen" not in said
    assert str(run) in said


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("result.json", {"rows": {"train": {}}}, "holds what no run writes, and cannot be drawn: "),
        ("result.json", {"seconds": {"total": "x"}}, "holds what no run writes, and cannot be drawn: "),
        ("result.json", {"after": {"loss": "x"}}, "the loss after is 'x', no number. Restore it"),
        ("result.json", "{", "is not a json file"),
        ("metrics.jsonl", '{"step": [1]}\n', "is not of a training"),
        ("config.yaml", "- 1", "holds no settings. Restore it"),
        ("config.yaml", "train: {seed: [1]}", "holds what no run writes, and cannot be drawn: "),
        ("environment.json", '{"command": [3]}', "holds what no run writes, and cannot be drawn: "),
    ],
    ids=str,
)
def test_a_page_shows_the_other_runs_and_says_what_is_wrong_with_an_odd_one(
    name: str, text: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        make_run(tmp_path / f"sound-{number}", loss=1.0, steps=3, seed=number)
    odd = odd_run(tmp_path / "odd", text if isinstance(text, dict) else {})
    if not isinstance(text, dict):
        (odd / name).write_text(text)
    assert main(["report", str(tmp_path)]) == 1  # as for every damaged one
    out = " ".join(capsys.readouterr().out.split())
    assert "3 runs in" in out
    assert "2 finished" in out
    assert "1 damaged" in out
    assert "odd: damaged (" in out
    assert str(odd) in out
    assert said in out
    page = (tmp_path / "runs.html").read_text()
    assert said.partition("'")[0] in page
    assert "sound-0" in page


def test_an_odd_table_of_a_comparison_names_no_baseline(tmp_path: Path) -> None:
    make_run(tmp_path / "compared" / "lora" / "run", loss=1.0, steps=3)
    (tmp_path / "compared" / "comparison.json").write_text('{"baseline": "lora", "methods": [3], "choose": [[]]}')
    report = Report.of([tmp_path]).sound()
    assert not report.damaged
    assert len(report.sections) == 1


@pytest.mark.parametrize("after", [None, {}, {"loss": None}])
def test_a_finished_run_without_a_loss_is_compared_as_one_or_refused(after: Any, tmp_path: Path) -> None:
    run = RunDirectory(odd_run(tmp_path / "run", {"after": after}))
    if after == {"loss": None}:  # what is recorded of a loss that is not finite
        assert final_loss(run) == math.inf
    else:
        with pytest.raises(ConfigError, match="no loss to be compared by"):
            final_loss(run)


DEEP = "[" * 100_000


@pytest.mark.parametrize("name", ["metrics.jsonl", "result.json", "environment.json", "config.yaml"])
def test_records_that_nest_without_end_are_refused(name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", loss=1.0)
    (run / name).write_text(DEEP + "}")
    with pytest.raises(LoraError, match=name.replace(".", r"\.")):
        write_report(run)
    record = RunDirectory.open(run)
    for read in (record.metrics, record.result, record.environment, record.settings):
        with suppress(LoraError):
            read()


@pytest.mark.parametrize("text", [DEEP, "a: &a [*a]", "methods: {null: 1}", "a: 2020-99-99", "[]", "methods: 3"])
def test_plans_that_are_none_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(LoraError, match=r"plan\.yaml"):
        Plan.read(tmp_path / "plan.yaml")


def test_a_plan_with_a_method_without_a_name_is_refused(tmp_path: Path) -> None:
    method = {"settings": [], "rates": [1e-3]}
    plan = {"methods": {None: method, "lora": method}, "baseline": "x", "seeds": [0], "settings": []}
    (tmp_path / "plan.yaml").write_text(json.dumps(plan).replace('"null"', "null"))
    with pytest.raises(LoraError, match="the baseline 'x' is none of"):
        Plan.read(tmp_path / "plan.yaml")


TEMPLATES = [
    "{{ 1/0 }}", "{% for i in range(10**9) %}x{% endfor %}", "{{ messages + 1 }}", "{{ x.y.z }}", "{% if %}",
    "{{ raise_exception('no') }}", "{{ messages[9].content }}", "{{ messages[0].__class__.__mro__ }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
]  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates_that_fail_are_refused(template: str) -> None:
    tokenizer = byte_tokenizer(template)
    with pytest.raises(DataError, match="chat template refuses a conversation"):
        render(conversation("hello").messages, tokenizer, add_generation_prompt=True)


WORDS = [
    ["report", "x" * 5000], ["report", "a\0b"], ["inspect", "x" * 5000], ["compare", "x" * 5000, "y"],
    ["merge", "x" * 5000, "-o", "y"], ["params", "model=" + "x" * 5000], ["plan", "data=" + "x" * 5000],
    ["train", "run_dir=x/" + "y" * 5000, "--dry-run"], ["train", "optim.lr=" + "1" * 400],
    ["train", "peft.lora_alpha=" + "1" * 5000], ["train", "train.epochs=" + "9" * 400], ["train", "peft.r=" + "1" * 30],
    ["train", "run_dir=" + "y" * 300, "--dry-run"], ["train", "run_dir=" + "y/" * 2500, "--dry-run"],
    ["train", "run_dir=\udcff"], ["report", "\udcff"], ["merge", "a", "--out", "\udcff"],
    ["export", "x" * 5000, "gguf"], ["params", "peft.target_modules=(", "model=smollm2-135m"],
]  # fmt: skip


@pytest.mark.matrix(4, each_word=False)
@pytest.mark.parametrize("words", WORDS, ids=lambda words: " ".join(words)[:30])
def test_commands_with_odd_words_say_what_is_wrong(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with suppress(SystemExit):
        assert main(words) in (1, 2)
    said = capsys.readouterr().err
    assert "not foreseen" not in said
    assert len(said) < 6000
