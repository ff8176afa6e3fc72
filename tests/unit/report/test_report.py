"""The report: what a run recorded, in one file that needs no other."""

from __future__ import annotations

import html
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from lorafa.cli.main import main
from lorafa.conf.compose import compose
from lorafa.report.page import write_report
from lorafa.report.plots import loss_curve, running_mean
from lorafa.report.starts import rank_rows, spectra_and_ranks
from lorafa.report.tables import duration, fact_rows, result_tables, score_rows
from lorafa.report.teacher import decision_rows, divergence_curve
from lorafa.runs.record import RunDirectory
from toys.pages import axes_of, curves, heights, legend

BEFORE = {"loss": 2.0, "accuracy": 0.1, "correct": 1, "total": 10, "interval": [0.01, 0.4], "unparsed": 7}
AFTER = {"loss": 0.5, "accuracy": 0.6, "correct": 6, "total": 10, "interval": [0.3, 0.8], "unparsed": 0}
SAMPLE = {
    "question": "What is <b>2 + 2</b>?",
    "gold": "4",
    "before": {"output": "five", "correct": False},
    "after": {"output": "#### 4", "correct": True},
}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "a-run", compose())


@pytest.fixture
def finished(run: RunDirectory) -> RunDirectory:
    for step in range(1, 21):
        run.add_metrics({"step": step, "loss": 2 / step, "lr": 1e-3})
    run.add_metrics({"step": 20, "eval_loss": 0.4})
    run.write_environment({"command": ["lorafa", "train"], "threads": 2})
    run.update_result(
        status="finished", before=BEFORE, after=AFTER, samples=[SAMPLE], steps=20, seconds={"train": 75.2},
        parameters={"trainable": 5, "all": 1000}, peak_rss_bytes=3 * 2**29, peak_rss_of="run",
        peak_device_bytes=2**30, rows={"train": 1600, "heldout": 100, "repeated": 1, "dropped": 46, "truncated": 3},
    )  # fmt: skip
    return run


def test_the_page_shows_scores_curve_answers_and_settings(finished: RunDirectory) -> None:
    page = write_report(finished.path).read_text(encoding="utf-8")
    texts = ("10.0% (1/10)", "1.0% to 40.0%", "60.0% (6/10)", "2.0000", "0.5000", "<svg", "#### 4", "lorafa train")
    assert [text for text in texts if text not in page] == []
    assert "1.50 GiB" in page
    assert "1 min 15 s" in page
    assert "lora_alpha:" in page


DECISIONS = [
    {"step": 20, "kind": "switch", "phase": "teacher", "why": "20 steps are done", "task": 0.5, "divergence": 0.125},
    {"step": 25, "kind": "refused", "phase": "teacher", "why": "worse", "task": 0.75, "divergence": 0.1},
    {"step": 30, "kind": "switch", "phase": "task", "why": "5 steps are done", "discarded": 0.25},
]


def test_the_page_shows_what_a_teacher_did(finished: RunDirectory) -> None:
    assert "The teacher" not in write_report(finished.path).read_text(encoding="utf-8")
    for step in range(21, 26):
        finished.add_metrics({"step": step, "loss": 0.1, "lr": 1e-3, "divergence": step / 100})
    finished.update_result(decisions=DECISIONS)
    page = write_report(finished.path).read_text(encoding="utf-8")
    assert "The teacher" in page
    assert "<td>refused</td><td>teacher</td><td>0.75</td><td>0.1</td><td>worse</td>" in page
    (axes,) = axes_of(page, 1)
    names = ["divergence", "a phase of the teacher begins", "a phase of the task begins"]
    assert list(legend(axes)) == names
    assert heights(axes)[legend(axes)["divergence"]] == pytest.approx([0.21, 0.22, 0.23, 0.24, 0.25], abs=1e-3)


def test_decisions_say_what_a_refreshed_teacher_could_not_hold() -> None:
    rows = decision_rows({"decisions": DECISIONS})
    assert rows[0] == ("20", "switch", "teacher", "0.5", "0.125", "20 steps are done")
    assert rows[2][3:] == ("-", "-", "5 steps are done; the teacher could not hold 25.00% of the update")
    assert decision_rows({}) == []
    assert divergence_curve([{"step": 1, "loss": 2.0}]) is None


START = {
    "rows": 8, "bytes": 3 * 2**20, "seconds": 4.2, "stable_gamma": 512.0, "fallbacks": {"layers.1.q_proj": "zero"},
    "ranks": {"layers.0.q_proj": 2, "layers.1.q_proj": 4, "layers.0.up_proj": 3, "layers.1.up_proj": 3},
    "spectra": {"layers.0.q_proj": [8.0, 2.0, 1.0], "layers.1.q_proj": [4.0, 2.0, 1.0, 1.0], "layers.0.up_proj": [0.0]},
}  # fmt: skip


def test_a_start_from_data_is_shown_with_its_ranks_and_spectra(finished: RunDirectory) -> None:
    finished.update_result(start=START)
    page = write_report(finished.path).read_text(encoding="utf-8")
    texts = ("The start", "3.0 MiB, 4.2 s", "512", "layers that started as by default", "2 to 4, median 3")
    assert [text for text in texts if text not in page] == []
    assert rank_rows(START) == [("q_proj", "2", "2 to 4, median 3", "25.0%"), ("up_proj", "2", "3", "-")]
    assert rank_rows({}) == []
    assert spectra_and_ranks({}) is None


DRAWN = START | {"spectra": START["spectra"] | {"layers.1.up_proj": [2.0, 1.0]}}
UNDRAWN = DRAWN | {"spectra": DRAWN["spectra"] | {"layers.0.q_proj": [0.0, 0.0], "layers.1.q_proj": []}}


def test_kinds_of_layer_are_named_and_every_chosen_rank_is_drawn(finished: RunDirectory) -> None:
    finished.update_result(start=DRAWN)
    page = write_report(finished.path).read_text(encoding="utf-8")
    assert page.count("<svg") == 2  # the loss, and the start
    left, right = axes_of(page, drawing=1)
    colours = legend(left)
    assert list(colours) == ["q_proj", "up_proj"]
    assert curves(left) == list(colours.values())
    assert heights(right) == {colours["q_proj"]: pytest.approx([2, 4]), colours["up_proj"]: pytest.approx([3, 3])}


def test_a_kind_without_a_spectrum_does_not_change_the_colours_of_the_others() -> None:
    """Its ranks are drawn, and those of a kind are in the colour that the legend of the spectra gives it."""
    left, right = axes_of(str(spectra_and_ranks(UNDRAWN)), drawing=0)
    assert list(legend(left)) == ["up_proj"]
    assert list(heights(right).values()) == [pytest.approx([2, 4]), pytest.approx([3, 3])]
    assert list(heights(right))[1] == legend(left)["up_proj"]


def test_the_page_needs_no_other_file(finished: RunDirectory) -> None:
    page = write_report(finished.path).read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="(?!#)', page) == []
    assert "<script" not in page
    assert "@import" not in page


def test_what_a_model_wrote_cannot_become_markup(finished: RunDirectory) -> None:
    page = write_report(finished.path).read_text(encoding="utf-8")
    assert "What is &lt;b&gt;2 + 2&lt;/b&gt;?" in page


def test_a_run_without_any_result_has_a_page_too(run: RunDirectory) -> None:
    page = write_report(run.path).read_text(encoding="utf-8")
    assert "Nothing was measured." in page
    assert "No step was logged yet." in page
    assert "not started" in page


def test_a_failed_run_says_why(run: RunDirectory) -> None:
    run.update_result(status="failed", error="TrainingError: the loss is nan", before={"loss": 2.0})
    page = write_report(run.path).read_text(encoding="utf-8")
    assert "TrainingError: the loss is nan" in page
    assert score_rows(run.result()) == [("answer loss", "2.0000", "-")]


def test_writing_the_page_again_gives_the_same_page(finished: RunDirectory) -> None:
    first = write_report(finished.path).read_bytes()
    assert write_report(finished.path).read_bytes() == first


def rows_of_the_page(page: str) -> list[list[str]]:
    """The cells of every row of its tables, without the heads of columns."""
    rows = re.findall(r"<tr>(.*?)</tr>", page.partition("<h2>Settings")[0], flags=re.DOTALL)
    cells = [[html.unescape(cell).strip() for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in rows]
    return [row for row in cells if row != ["", "before", "after"]]


def test_the_table_on_the_terminal_has_the_rows_of_the_page(finished: RunDirectory) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(result_tables(finished))
    lines = [re.split(r"\s{2,}|│", line) for line in console.export_text().splitlines()]
    shown = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    rows = rows_of_the_page(write_report(finished.path).read_text(encoding="utf-8"))
    assert [row for row in rows if row not in shown] == []
    assert rows == [
        ["held-out accuracy", "10.0% (1/10)", "60.0% (6/10)"],
        ["95 % interval", "1.0% to 40.0%", "30.0% to 80.0%"],
        ["without an answer", "7", "0"],
        ["answer loss", "2.0000", "0.5000"],
        ["status", "finished"],
        ["trained parameters", "5 of 1,000 (0.50%)"],
        ["rows", "1,600 trained on, 100 held out"],
        ["rows left out", "46 for their length, 1 repeat a held-out one"],
        ["rows cut", "3"],
        ["steps", "20"],
        ["time: train", "1 min 15 s"],
        ["peak memory", "1.50 GiB"],
        ["peak memory, accelerator", "1.00 GiB"],
    ]


def test_what_a_step_took_stands_with_its_spread_and_the_peak_of_an_earlier_version_as_what_it_is() -> None:
    metrics = [{"step": step, "loss": 1.0, "seconds": 2.0 * step + (step == 7)} for step in range(1, 12)]
    facts = dict(fact_rows({"peak_rss_bytes": 2**30}, metrics))
    assert facts["time of a step"] == "2 (1 to 3) s, median (a tenth of the steps is below, one above)"
    assert facts["peak memory of its process"] == "1.00 GiB"
    assert "peak memory" not in facts


def test_scores_of_any_evaluation_are_shown_nested_ones_by_their_dotted_names() -> None:
    after = {"accuracy": 0.25, "forgetting": {"kl": 0.5, "on": "text"}}
    assert score_rows({"after": after}) == [("held-out accuracy", "-", "25.0%"), ("forgetting.kl", "-", "0.5")]


def test_the_step_that_was_kept_is_named_with_the_rows_that_chose_it() -> None:
    facts = dict(fact_rows({"kept_step": 40, "kept_by_rows": 48}))
    assert facts["weights kept"] == (
        "those of step 40, chosen on 48 of the held-out rows that are reported, which flatters the loss after training"
    )


def test_the_running_mean_of_a_constant_is_the_constant() -> None:
    assert running_mean([3.0] * 5) == pytest.approx([3.0] * 5)


def test_the_running_mean_weighs_the_past_by_its_age() -> None:
    assert running_mean([1.0, 0.0], weight=0.5) == pytest.approx([1.0, (0.5 * 0.5 * 1.0) / (1 - 0.25)])


def test_there_is_no_curve_without_a_step() -> None:
    assert loss_curve([{"step": 1, "eval_loss": 1.0}]) is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (75.2, "1 min 15 s"), (119.7, "2 min 0 s")]
)
def test_durations_are_written_in_the_unit_one_thinks_in(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_brackets_in_an_error_are_no_markup(run: RunDirectory) -> None:
    run.update_result(status="failed", error="KeyError: '[/x]'")
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(result_tables(run))
    assert "KeyError: '[/x]'" in console.export_text()


def test_of_several_runs_one_that_is_none_stops_all(finished: RunDirectory, tmp_path: Path) -> None:
    assert main(["report", str(finished.path), str(tmp_path / "none")]) == 2
    assert not (finished.path / "report.html").exists()
    assert not (tmp_path / "runs.html").exists()
