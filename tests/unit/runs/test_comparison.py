"""Comparisons: which runs are made, how rates are chosen, and what the table says."""

from __future__ import annotations

import io
import json
import math
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from filelock import FileLock
from rich.console import Console

from lorafa.cli.main import main
from lorafa.conf.compose import compose
from lorafa.errors import ConfigError, DivergedError, TrainingError
from lorafa.report.comparison import HEADINGS, cells, notes, read_result, write_comparison
from lorafa.runs.comparison import LOCKS, _check_same, compare
from lorafa.runs.plan import Plan
from lorafa.runs.student import interval
from lorafa.train.settings.run import RunConfig
from toys.comparisons import BEST, PLAN, Fake, compose_once, plan_file, run
from toys.places import ROOT


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    compose_once(monkeypatch)


def test_the_first_seed_chooses_the_rate_and_the_others_run_at_it_and_are_reported(tmp_path: Path) -> None:
    fake = Fake(BEST)
    rows = run(tmp_path, fake)
    assert rows["lora"]["lr"] == 2e-3
    assert rows["lora"]["loss"]["values"] == pytest.approx([0.1, 0.2])
    assert sum("seed-1" in name for name in fake.started) == 2
    assert (rows["lora"]["swept_with"], rows["lora"]["seeds"]) == ([0], 2)
    text = "The learning rates were chosen with seed 0, which the table leaves out."
    assert text in notes(read_result(tmp_path))
    assert text in write_comparison(tmp_path).read_text()
    assert rows["lora"]["difference"] is None
    assert rows["fa"]["difference"]["mean"] == pytest.approx(0.0)


def test_several_seeds_may_choose_by_their_mean(tmp_path: Path) -> None:
    """Seed 0 alone would choose 1e-3, where seed 5 diverges."""
    ends: dict[str, float | Exception] = {
        "lora/lr-0.001-seed-0": -1.0, "lora/lr-0.001-seed-5": math.nan, "lora/lr-0.0005-seed-0": 9.0,
    }  # fmt: skip
    fake = Fake(BEST, ends=ends)
    row = run(tmp_path, fake, choose=[0, 5], seeds=[1, 2])["lora"]
    assert (row["lr"], row["swept_with"]) == (2e-3, [0, 5])
    assert row["loss"]["values"] == pytest.approx([0.1, 0.2])
    assert "The learning rates were chosen with seeds 0, 5, which the table leaves out." in notes(read_result(tmp_path))


def test_with_one_seed_the_number_is_that_of_the_seed_that_chose_and_it_is_said(tmp_path: Path) -> None:
    row = run(tmp_path, Fake(BEST), seeds=[3])["lora"]
    assert row["loss"]["values"] == pytest.approx([0.3])
    said = " ".join(notes(read_result(tmp_path)))
    assert "chosen with seed 3, and the losses are those of the same seed" in said
    assert "Give the plan more seeds" in said


def test_without_rates_to_choose_from_every_seed_is_reported(tmp_path: Path) -> None:
    methods = {"lora": {"settings": ["optim=adamw"], "rates": [1e-3]}}
    fake, folder = Fake(BEST), tmp_path / "not" / "there"
    plan = Plan.read(plan_file(tmp_path, methods=methods))
    (row,) = compare(plan, folder, Console(quiet=True), start=fake)
    assert (row["seeds"], len(fake.started)) == (3, 3)
    assert "The learning rates were given, not chosen." in notes(read_result(folder))


def test_intervals_of_differences_are_corrected_for_the_number_of_methods_and_it_is_said(tmp_path: Path) -> None:
    methods = {f"m{n}": {"settings": ["optim=adamw"], "rates": [1e-3 * 2**n]} for n in range(4)}
    ends: dict[str, float | Exception] = {f"m1/lr-0.002-seed-{seed}": loss for seed, loss in enumerate((0.5, 0.8, 0.9))}
    rows = run(tmp_path, Fake(BEST, ends=ends), methods=methods, baseline="m0")
    against = rows["m1"]["difference"]
    expected = interval(against["values"], 3)
    assert against == expected
    assert against["half_width"] > 1.5 * interval(against["values"])["half_width"]
    page = write_comparison(tmp_path).read_text()
    assert "The intervals of the 3 differences are corrected for their number (Bonferroni)" in page


# ---- the same samples -----------------------------------------------------------------------------------------------


def test_a_run_is_started_for_the_samples_the_others_saw(tmp_path: Path) -> None:
    fake = Fake(BEST)
    run(tmp_path, fake)
    assert fake.expected[0] is None
    assert set(fake.expected[1:]) == {"a" * 64}
    later = Fake(BEST)
    more = {"new": {"settings": ["optim=adamw"], "rates": [1e-3]}, **PLAN["methods"]}
    run(tmp_path, later, methods=more)
    assert set(later.expected) == {"a" * 64}


def test_finished_runs_that_saw_other_samples_are_refused_with_what_differs(tmp_path: Path) -> None:
    run(tmp_path, Fake(BEST))
    odd = tmp_path / "fa" / "lr-0.001-seed-2" / "result.json"
    odd.write_text(odd.read_text().replace("a" * 64, "b" * 64))
    with pytest.raises(
        ConfigError,
        match=r"seed-2 saw other samples than .*lr-.* \(samples_sha256 b{12} and a{12}\): their settings of data are "
        r"the same, so the records or the tokenizer have changed in between\..* Give another folder, or restore",
    ):
        run(tmp_path, Fake(BEST))


def test_a_method_with_other_data_is_no_method_of_the_table(tmp_path: Path) -> None:
    methods = {
        "lora": {"settings": ["optim=adamw"], "rates": [1e-3]},
        "few": {"settings": ["optim=adamw", "data.train_size=9"], "rates": [1e-3]},
    }
    fake = Fake(BEST)

    def start(config: RunConfig, console: Console, command: Sequence[str], samples: str | None = None) -> Path:
        fake.samples = ("b" if config.data.train_size == 9 else "a") * 64
        return fake(config, console, command, samples)

    plan = Plan.read(plan_file(tmp_path, methods=methods))
    with pytest.raises(ConfigError, match=r"lora/.* saw other samples than .*few/.*: data\.train_size was 9 then"):
        compare(plan, tmp_path, Console(quiet=True), start=start)


def test_runs_without_a_digest_are_compared_and_it_is_said(tmp_path: Path) -> None:
    fake = Fake(BEST)
    fake.samples = None
    run(tmp_path, fake)
    assert read_result(tmp_path)["without_digest"] == 4
    assert any("without a digest of their samples" in note for note in notes(read_result(tmp_path)))


def test_the_page_says_which_step_was_kept_and_that_it_was_chosen_on_these_rows(tmp_path: Path) -> None:
    run(tmp_path, Fake(BEST))
    for path in tmp_path.glob("fa/*/result.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"kept_step": 10, "kept_by_rows": 5}))
    run(tmp_path, Fake(BEST))
    assert "(train.keep_best), chosen on rows that are reported, which flatters the loss. Steps kept: fa: 10, 10." in (
        " ".join(notes(read_result(tmp_path)))
    )


# ---- rates ----------------------------------------------------------------------------------------------------------


def test_the_grid_grows_where_the_best_rate_is_at_its_end(tmp_path: Path) -> None:
    rows = run(tmp_path, Fake({"adamw": 16e-3, "lora_fa": 0.5e-3}))
    assert rows["lora"]["lr"] == pytest.approx(16e-3)
    assert rows["fa"]["lr"] == pytest.approx(0.5e-3)


def test_several_processes_share_the_runs_of_one_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process is at two runs: all others are made meanwhile, and what it finishes is taken over."""
    monkeypatch.setattr("lorafa.runs.comparison.WAIT", 0.01)
    ours, theirs, done = Fake(BEST), Fake(BEST), threading.Event()
    console = Console(file=io.StringIO(), width=200)
    plan = Plan.read(plan_file(tmp_path))
    taken = [("lora", 1e-3, 0), ("fa", 1e-3, 1)]
    paths = [tmp_path / LOCKS / name / f"lr-{rate:.4g}-seed-{seed}.lock" for name, rate, seed in taken]
    locks, configs = [FileLock(path, thread_local=False) for path in paths], []
    for lock, (name, rate, seed) in zip(locks, taken, strict=True):
        Path(lock.lock_file).parent.mkdir(parents=True)
        lock.acquire()
        method = next(method for method in plan.methods if method.name == name)
        place = f"run_dir={tmp_path / name / f'lr-{rate:.4g}-seed-{seed}'}"
        configs.append(compose([*plan.overrides(method, rate, seed), place]))

    def other_process() -> None:
        assert done.wait(60)
        for lock, config in zip(locks, configs, strict=True):
            theirs(config, console, [])
            lock.release()

    def started(config: RunConfig, console: Console, command: Sequence[str], samples: str | None = None) -> Path:
        path = ours(config, console, command, samples)
        if len(ours.started) == 6:  # five rates, one of which the grid grew by, and another seed
            done.set()
        return path

    thread = threading.Thread(target=other_process)
    thread.start()
    rows = compare(plan, tmp_path, console, start=started)
    thread.join()
    assert not set(ours.started) & set(theirs.started)
    assert {row["method"]: row["seeds"] for row in rows} == {"lora": 2, "fa": 2}
    assert "Waiting for runs that other processes are at." in console.file.getvalue()  # type: ignore[attr-defined]


def test_what_is_finished_is_not_run_again_and_what_broke_off_is_kept_beside(tmp_path: Path) -> None:
    first = Fake(BEST, fail_after=3)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, first)
    second = Fake(BEST)
    run(tmp_path, second)
    assert not set(first.started) & set(second.started)
    assert len(list(tmp_path.glob("*/*.unfinished-1"))) == 1
    third = Fake(BEST)
    assert run(tmp_path, third)["lora"]["seeds"] == 2
    assert third.started == []


def test_a_rate_that_diverges_is_no_candidate_and_is_not_run_again(tmp_path: Path) -> None:
    best = {"adamw": 4e-3, "lora_fa": 1e-3}
    first = Fake(best, diverges_above=3e-3)
    assert run(tmp_path, first)["lora"]["lr"] == 2e-3
    second = Fake(best, diverges_above=3e-3)
    run(tmp_path, second)
    assert second.started == []


def test_a_mistake_in_the_wiring_is_no_result_of_a_rate(tmp_path: Path) -> None:
    wrong = Fake(BEST, ends={"lora/lr-0.001-seed-0": TrainingError("None of the 8 weights got a gradient.")})
    with pytest.raises(TrainingError, match=r"None of the 8 weights got a gradient"):
        run(tmp_path, wrong)
    again = Fake(BEST)
    run(tmp_path, again)
    assert "lora/lr-0.001-seed-0" in again.started


@pytest.mark.parametrize("end", [DivergedError("The loss is nan in step 3."), math.nan], ids=["stopped", "finished"])
def test_a_method_of_which_a_seed_diverged_has_no_mean(end: float | Exception, tmp_path: Path) -> None:
    row = run(tmp_path, Fake(BEST, ends={"fa/lr-0.001-seed-1": end}))["fa"]
    assert (row["seeds"], row["diverged"]) == (2, 1)
    assert row["loss"] is row["difference"] is row["steps_to_baseline"] is None
    assert cells(row)[2:6] == ("2, 1 diverged", "diverged", "diverged", "diverged")
    assert "2, 1 diverged" in write_comparison(tmp_path).read_text()


def test_nothing_is_measured_against_a_baseline_that_diverged(tmp_path: Path) -> None:
    row = run(tmp_path, Fake(BEST, ends={"lora/lr-0.002-seed-1": math.nan}))["fa"]
    assert row["diverged"] == 0
    assert row["loss"]["values"] == pytest.approx([0.1, 0.2])
    assert cells(row)[4:6] == ("-", "-")


def test_a_method_that_diverges_at_every_rate_keeps_its_row(tmp_path: Path) -> None:
    """The grid grows downwards twice, and no other seed runs at a rate that is known to diverge."""
    lower = {f"fa/lr-{rate}-seed-0": math.nan for rate in (0.00025, 0.0005, 0.001, 0.002)}
    fake = Fake(BEST, ends=lower)
    row = run(tmp_path, fake)["fa"]
    assert {name for name in fake.started if name.startswith("fa/")} == set(lower)
    assert (row["lr"], row["seeds"], row["diverged"]) == (2.5e-4, 1, 1)
    assert cells(row)[2:4] == ("1, 1 diverged", "diverged")


def test_the_command_fails_if_no_method_has_a_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # a narrow terminal folds words
    run(tmp_path, Fake(BEST, diverges_above=0.0))
    assert main(["compare", str(tmp_path / "plan.yaml"), str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert "diverged" in shown.out
    assert "No method has a result: each has a run that diverged. Give the plan lower learning rates." in shown.err
    assert (tmp_path / "comparison.html").is_file()


def test_a_rate_at_the_end_of_those_tried_is_marked(tmp_path: Path) -> None:
    rows = run(tmp_path, Fake({"adamw": 64e-3, "lora_fa": 1e-3}), seeds=[0])
    assert (rows["lora"]["lr"], rows["lora"]["at_end"]) == (16e-3, True)
    assert rows["fa"]["at_end"] is False
    marked = "0.016 (at the end of the rates tried)"
    assert cells(rows["lora"])[1] == marked
    assert marked in write_comparison(tmp_path).read_text()


def test_a_single_rate_is_given_and_not_at_an_end(tmp_path: Path) -> None:
    methods = {"lora": {"settings": ["optim=adamw"], "rates": [1e-3]}}
    assert run(tmp_path, Fake(BEST), methods=methods, seeds=[0])["lora"]["at_end"] is False


def test_the_result_of_an_earlier_version_is_shown(tmp_path: Path) -> None:
    earlier = ROOT / "docs" / "results" / "optimizers" / "comparison.json"
    (tmp_path / "comparison.json").write_text(earlier.read_text())
    lora = next(row for row in read_result(tmp_path)["methods"] if row["method"] == "lora")
    assert cells(lora)[1:4] == ("0.004", "3", "0.6914 ± 0.0031")
    assert "0.6914 ± 0.0031" in write_comparison(tmp_path).read_text()


def test_steps_to_the_baseline_are_counted_on_one_curve(tmp_path: Path) -> None:
    """The baseline reaches its own last loss at its last measurement."""
    rows = run(tmp_path, Fake(BEST), seeds=[0])
    assert rows["lora"]["steps_to_baseline"] == pytest.approx(20.0)
    assert rows["lora"]["seconds_a_step"] == {"median": 0.5, "low": 0.5, "high": 0.5}


def test_runs_with_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    run(tmp_path, Fake(BEST))
    with pytest.raises(ConfigError, match=r"finished, but with other settings \(peft\).*another folder"):
        run(tmp_path, Fake(BEST), settings=["train.steps=20", "peft.r=4"])
    with pytest.raises(ConfigError, match=r"other settings \(peft, train\).*: peft\.r was 16 then and is 4 now\."):
        run(tmp_path, Fake(BEST), settings=["train.steps=30", "peft.r=4"])


def test_the_page_names_every_method(tmp_path: Path) -> None:
    run(tmp_path, Fake(BEST))
    page = write_comparison(tmp_path).read_text()
    for name in ("lora", "fa", *HEADINGS):
        assert name in page
    assert page.count("<svg ") - page.count('class="swatch"') == 2


def test_the_command_says_what_is_wrong_and_leaves_with_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path / "none.yaml"), str(tmp_path / "runs")]) == 2
    assert "cannot be read as a comparison" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_setting_that_is_none_on_one_side_and_missing_on_the_other_differs() -> None:
    now, then = {"optim": {"own": {"x": None}}}, {"optim": {"own": {}}}
    with pytest.raises(ConfigError, match=r"optim\.own\.x was '\(not set\)' then and is None now"):
        _check_same(now, then, Path("run"))
