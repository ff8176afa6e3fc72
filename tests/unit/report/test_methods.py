"""Runs put together: one section for each set of samples, one method for each set of settings, differences in pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafa import LoraConfig, get_peft_model
from lorafa.data.records import Message, Record
from lorafa.errors import ConfigError
from lorafa.evals.entry import Subject
from lorafa.evals.forgetting import FORGETTING, ForgettingSettings
from lorafa.report.drawings import drawings, loss
from lorafa.report.runs import Report, notes_of, table_of
from lorafa.report.tables import score_rows
from lorafa.runs.student import interval
from toys.language_models import byte_tokenizer, tiny_llama
from toys.runs import make_run


def two_methods(folder: Path) -> None:
    for seed in range(3):
        make_run(folder / f"plain-seed-{seed}", loss=1.0 + 0.1 * seed, seed=seed)
        make_run(folder / f"large-seed-{seed}", loss=0.9 + 0.1 * seed + 0.01 * seed, seed=seed, rank=16)


def test_runs_that_differ_in_the_seed_alone_are_one_method(tmp_path: Path) -> None:
    two_methods(tmp_path)
    (section,) = Report.of([tmp_path]).sections
    assert [(method.name, len(method.runs)) for method in section.methods] == [("large", 3), ("plain", 3)]
    assert section.varying() == ["peft.r"]


def test_means_have_intervals_and_differences_are_taken_seed_by_seed(tmp_path: Path) -> None:
    two_methods(tmp_path)
    (section,) = Report.of([tmp_path], "plain").sections
    headings, rows = table_of(section)
    by_name = {row[0]: dict(zip(headings, row, strict=True)) for row in rows}
    mean = interval([1.0, 1.1, 1.2])
    assert by_name["plain (baseline)"]["held-out loss"] == f"{mean['mean']:.4f} ± {mean['half_width']:.4f}"
    pairs = interval([-0.1, -0.09, -0.08])
    assert by_name["large"]["held-out loss, difference"] == f"{pairs['mean']:+.4f} ± {pairs['half_width']:.4f}"
    assert by_name["large"]["rows dropped / cut"] == "46 / 1"
    assert by_name["large"]["peak memory"] == "0.50 GiB"
    assert by_name["large"]["s / step"] == "0.5"


def test_the_accuracy_of_a_single_run_has_the_interval_over_its_questions(tmp_path: Path) -> None:
    after = {"loss": 1.0, "accuracy": 0.6, "correct": 6, "total": 10, "interval": [0.3, 0.8]}
    for n in range(2):
        make_run(tmp_path / f"m{n}", loss=1.0, rank=8 + n, after=after)
    headings, rows = table_of(Report.of([tmp_path]).sections[0])
    assert rows[0][headings.index("accuracy")] == "60.0% (30.0% to 80.0%)"


def test_differences_are_corrected_for_their_number_and_it_is_said(tmp_path: Path) -> None:
    two_methods(tmp_path)
    for seed in range(3):
        make_run(tmp_path / f"huge-seed-{seed}", loss=2.0, seed=seed, rank=64)
    (section,) = Report.of([tmp_path], "plain").sections
    assert section.differences(loss)["large"] == interval([-0.1, -0.09, -0.08], 2) | {
        "values": pytest.approx([-0.1, -0.09, -0.08]), "mean": pytest.approx(-0.09),
        "half_width": pytest.approx(interval([-0.1, -0.09, -0.08], 2)["half_width"]),
    }  # fmt: skip
    assert any("corrected for 2 comparisons (Bonferroni)" in note for note in notes_of(section))


def test_methods_without_a_seed_in_common_have_no_difference(tmp_path: Path) -> None:
    make_run(tmp_path / "a", loss=1.0, seed=0)
    make_run(tmp_path / "b", loss=2.0, seed=1, rank=16)
    (section,) = Report.of([tmp_path]).sections
    assert section.differences(loss) == {}
    assert "held-out loss, difference" not in table_of(section)[0]


def test_runs_of_other_samples_are_kept_apart_and_it_is_said(tmp_path: Path) -> None:
    two_methods(tmp_path)
    make_run(tmp_path / "other-seed-0", loss=0.1, samples_sha256="7" * 64)
    make_run(tmp_path / "older-seed-0", loss=0.2, samples_sha256=None)
    report = Report.of([tmp_path])
    assert [section.samples for section in report.sections] == ["5" * 64, None, "7" * 64]
    assert [len(section.runs) for section in report.sections] == [6, 1, 1]
    assert any("The runs saw 3 different sets of samples" in text for text in report.summary())
    assert any("recorded no digest of their samples" in note for note in notes_of(report.sections[1]))


def test_runs_that_did_not_finish_are_listed_and_part_of_no_mean(tmp_path: Path) -> None:
    two_methods(tmp_path)
    make_run(tmp_path / "plain-seed-7", loss=99.0, seed=7, status="failed", error="OSError: disk full")
    make_run(tmp_path / "plain-seed-8", loss=99.0, seed=8, status="failed", error="interrupted")
    make_run(tmp_path / "plain-seed-9", loss=99.0, seed=9, diverged=True, status="failed", error="DivergedError: nan")
    make_run(tmp_path / "plain-seed-10", loss=float("nan"), seed=10)
    (make_run(tmp_path / "plain-seed-11", loss=1.0, seed=11) / "result.json").write_text("{broken")
    report = Report.of([tmp_path])
    assert [(entry.name, entry.status) for entry in report.left_out] == [
        ("plain-seed-7", "failed"), ("plain-seed-8", "unfinished"), ("plain-seed-9", "diverged"),
        ("plain-seed-10", "diverged"), ("plain-seed-11", "damaged"),
    ]  # fmt: skip
    (section,) = report.sections
    assert [len(method.runs) for method in section.methods] == [3, 3]
    assert report.summary()[0] == (
        f"11 runs in {tmp_path.name}: 6 finished, 1 failed, 1 unfinished, 2 diverged, 1 damaged."
    )


def test_runs_that_chose_the_rate_of_a_comparison_are_part_of_no_mean(tmp_path: Path) -> None:
    for seed in range(3):
        make_run(tmp_path / "lora" / f"lr-0.001-seed-{seed}", loss=1.0 + seed, seed=seed)
        make_run(tmp_path / "dora" / f"lr-0.001-seed-{seed}", loss=2.0 + seed, seed=seed, rank=16)
    rows = [{"method": "lora", "lr": 1e-3}, {"method": "dora", "lr": 1e-3}]
    summary = {"methods": rows, "choose": [0], "seeds": [1, 2], "baseline": "lora"}
    (tmp_path / "comparison.json").write_text(json.dumps(summary))
    report = Report.of([tmp_path])
    (section,) = report.sections
    assert section.baseline.name == "lora/lr-0.001"
    assert [[run.seed for run in method.runs] for method in section.methods] == [[1, 2], [1, 2]]
    assert report.summary() == [
        f"6 runs in {tmp_path.name}: 6 finished.",
        "Runs of seeds that chose a learning rate are part of no mean: they would flatter their method.",
    ]


def test_a_setting_that_an_earlier_version_did_not_have_makes_no_other_method(tmp_path: Path) -> None:
    two_methods(tmp_path)
    config = tmp_path / "plain-seed-1" / "config.yaml"
    lines = [line for line in config.read_text().splitlines() if "save_merged" not in line]
    assert len(lines) == len(config.read_text().splitlines()) - 1
    config.write_text("\n".join(lines))
    (section,) = Report.of([tmp_path]).sections
    assert [len(method.runs) for method in section.methods] == [3, 3]


def test_runs_with_names_of_no_meaning_are_called_by_what_differs(tmp_path: Path) -> None:
    for number, (seed, rank) in enumerate(((0, 8), (1, 8), (0, 16), (1, 16))):
        make_run(tmp_path / f"20260101-12000{number}-lora", loss=1.0, seed=seed, rank=rank)
    (section,) = Report.of([tmp_path]).sections
    assert [method.name for method in section.methods] == ["peft.r=8", "peft.r=16"]


def test_a_baseline_that_is_none_is_answered_with_those_there_are(tmp_path: Path) -> None:
    two_methods(tmp_path)
    with pytest.raises(ConfigError, match=r"No method is called 'dora'; there are large, plain\. Give one"):
        Report.of([tmp_path], "dora")


def test_drawings_are_of_what_the_runs_have_and_no_other(tmp_path: Path) -> None:
    two_methods(tmp_path)
    titles = [each.title for each in drawings(Report.of([tmp_path]).sections[0])]
    assert titles == [
        "Held-out loss", "Training loss, running mean", "Learning rate", "Gradient norm, running mean",
        "Held-out loss against trained parameters", "Held-out loss against peak memory, MiB",
        "Accuracy against trained parameters", "Accuracy against peak memory, MiB",
    ]  # fmt: skip


def test_peaks_of_a_process_with_several_runs_are_drawn_and_shown_nowhere(tmp_path: Path) -> None:
    for n in range(2):
        make_run(tmp_path / f"m{n}", loss=1.0 + n, rank=8 + n, peak_rss_of="process")
    (section,) = Report.of([tmp_path]).sections
    assert not any("memory" in each.title for each in drawings(section))
    assert "peak memory" not in table_of(section)[0]
    assert any("process with more than one run" in note for note in notes_of(section))


def test_forgetting_stands_beside_the_task_s_score(tmp_path: Path) -> None:
    for n in range(2):
        after = {"loss": 1.0, "accuracy": 0.5 + n / 10, "forgetting": {"kl": 0.01 * n, "text": "x"}}
        make_run(tmp_path / f"m{n}", loss=1.0, rank=8 + n, after=after)
    (section,) = Report.of([tmp_path]).sections
    assert "Accuracy against forgetting.kl" in [each.title for each in drawings(section)]
    assert "forgetting.kl" in table_of(section)[0]


def measured_forgetting(scale: float) -> dict[str, Any]:
    """What an evaluation finds of a model that has moved, with all its keys."""
    model = get_peft_model(tiny_llama().double(), LoraConfig(r=4, target_modules=["q_proj"])).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.add_(scale)
    text = Record((Message("assistant", "the cat sat on the mat"),), plain=True)
    subject, own = Subject(model, byte_tokenizer()), ForgettingSettings()
    return dict(FORGETTING.measure(subject, [text, text], own, 2, lambda *_: None).numbers)


def test_counts_are_no_axis_and_no_column(tmp_path: Path) -> None:
    for n in range(2):
        forgotten = measured_forgetting(0.01 * (n + 1))
        assert forgotten.keys() == {"kl", "tokens", "texts", "interval"}
        after: dict[str, Any] = {"loss": 1.0, "accuracy": 0.5 + n / 10, "correct": 5 + n, "total": 10}
        after |= {"unparsed": 1, "cut": n, "max_new_tokens": 9, "forgetting": forgotten}
        make_run(tmp_path / f"m{n}", loss=1.0, rank=8 + n, after=after)
    (section,) = Report.of([tmp_path]).sections
    titles = [each.title for each in drawings(section) if "forgetting" in each.title]
    assert titles == ["Accuracy against forgetting.kl"]
    headings, rows = table_of(section)
    measures = ["held-out loss", "accuracy", "forgetting.kl"]
    differences = [f"{name}, difference" for name in measures]
    assert {*measures, *differences, "answers cut"} <= {*headings}
    assert not any(word in " ".join(headings) for word in ("tokens", "texts", "correct", "total", "unparsed"))
    assert [row[headings.index("answers cut")] for row in rows] == ["-", "1 of 10"]
    shown = [row[0].strip() for row in score_rows(section.runs[1].result)]
    own = ["forgetting.kl", "forgetting.texts", "forgetting.tokens"]  # of one run how much was measured is said, too
    assert shown[-5:] == ["cut at their longest", "answer loss", *own]
