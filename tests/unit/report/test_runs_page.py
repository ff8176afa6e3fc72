"""`lorafa report` of several runs: one page that needs no other file, a table on the terminal, errors that say why."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorafa.cli.main import main
from lorafa.errors import ConfigError
from lorafa.report.runs import Report
from toys.runs import make_run

COVERED = [
    {"name": "q_proj", "kind": "Linear", "modules": 12, "matched": 12, "base": 1000, "trainable": 10},
    {"name": "lm_head", "kind": "Linear", "modules": 1, "matched": 0, "base": 5000, "trainable": 0},
]
START = {
    "rows": 8, "bytes": 1, "seconds": 1.0, "ranks": {"layers.0.q_proj": 2, "layers.1.q_proj": 4},
    "spectra": {"layers.0.q_proj": [4.0, 2.0], "layers.1.q_proj": [3.0, 1.0]},
}  # fmt: skip


def sample(output: str) -> list[dict[str, object]]:
    before, after = {"output": "five", "correct": False}, {"output": output, "correct": True}
    return [{"question": "What is <b>2 + 2</b>?", "gold": "4", "before": before, "after": after}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    runs = tmp_path / "runs"
    for seed in range(2):
        more = {"coverage": COVERED, "samples": sample("#### 4")}
        make_run(runs / f"plain-seed-{seed}", loss=1.0 + 0.1 * seed, seed=seed, **more)
        more |= {"samples": sample("4, I think"), "start": START, "kept_step": 20, "kept_by_rows": 4}
        make_run(runs / f"[odd] & large-seed-{seed}", loss=0.9, seed=seed, rank=16, **more)
    make_run(runs / "gone-seed-0", loss=1.0, status="failed", error="OSError: [disk] full")
    return runs


def page_of(folder: Path, *more: str) -> str:
    assert main(["report", str(folder), *more]) == 0
    return (folder / "runs.html").read_text(encoding="utf-8")


def test_a_folder_of_runs_has_one_page_with_all_that_is_known(folder: Path) -> None:
    page = page_of(folder)
    texts = (
        *("5 runs in runs: 4 finished, 1 failed.", "rows.jsonl: 20 rows trained on, 4 held out", "1.0500 ± 0.6353"),
        *("[odd] &amp; large", "Held-out loss against trained parameters", "What is adapted", "1,000 (16.7%)"),
        *("Ranks of the starts", "2 to 4, median 3", "4, I think", "What is &lt;b&gt;2 + 2&lt;/b&gt;?"),
        *("Settings that differ between the methods", "peft.r", "data.name=rows.jsonl", "OSError: [disk] full"),
        *("<code>lorafa train &#39;data=my rows.jsonl&#39; optim.lr=0.001 train.seed=1</code>", "step kept"),
        *("1 min 15 s", "46 / 1", "chosen on rows that are reported"),
    )
    assert [text for text in texts if text not in page] == []
    assert "+-" not in page
    assert page.count("<figure") == 9
    assert not list(folder.glob("*/report.html"))


def test_the_page_needs_no_other_file_and_runs_nothing(folder: Path) -> None:
    page = page_of(folder)
    assert page.startswith("<!doctype html>")
    assert re.findall(r'(?:src|href)="(?!#)', page) == []
    assert "<script" not in page
    assert "@import" not in page


def test_writing_it_again_gives_the_same_page(folder: Path) -> None:
    assert page_of(folder) == page_of(folder)


def test_the_terminal_has_the_table_and_what_is_missing_from_it(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    page_of(folder, "--baseline", "plain")
    out = capsys.readouterr().out
    assert re.search(r"plain \(baseline\) +│ 2 +│ 1\.0500 ± 0\.6353", out)
    assert re.search(r"\[odd\] & large +│ 2 +│ 0\.9000 ± 0\.0000 +│ -0\.1500 ± 0\.6353", out)
    assert "gone-seed-0: failed (OSError: [disk] full)" in out
    assert f"Report: {folder / 'runs.html'}" in out


def test_several_runs_have_their_page_in_the_folder_that_holds_them_all(folder: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "elsewhere" / "run", loss=1.0)
    assert main(["report", str(folder / "plain-seed-0"), str(other)]) == 0
    assert "elsewhere/run" in (tmp_path / "runs.html").read_text()
    assert main(["report", *map(str, sorted(folder.iterdir())), "--page", str(tmp_path / "all.html")]) == 0
    files_too = sorted(map(str, tmp_path.iterdir()))
    assert str(tmp_path / "all.html") in files_too
    assert main(["report", *files_too]) == 2


def test_its_own_page_among_the_paths_is_passed_over(folder: Path) -> None:
    page_of(folder)
    assert main(["report", *map(str, sorted(folder.iterdir()))]) == 0


def test_a_single_run_has_its_own_page(folder: Path) -> None:
    assert main(["report", str(folder / "plain-seed-0")]) == 0
    assert (folder / "plain-seed-0" / "report.html").is_file()
    assert not (folder / "runs.html").exists()
    assert main(["report", str(folder / "plain-seed-0"), "--page", str(folder / "one.html")]) == 0
    assert "1 run in runs: 1 finished." in (folder / "one.html").read_text()


def test_a_damaged_run_is_listed_and_the_status_says_so(folder: Path) -> None:
    (folder / "plain-seed-0" / "metrics.jsonl").write_text("no json\n{}\n")
    assert main(["report", str(folder)]) == 1
    page = (folder / "runs.html").read_text()
    assert "3 finished, 1 failed, 1 damaged" in page
    assert "Line 1 of" in page


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["{}/none"], "is not a run directory: it does not exist"),
        (["{}", "{}/empty"], "is not a run directory: it holds no config.yaml"),
        (["{}", "--page", "{}/empty"], "cannot be written: it is a folder. Name a file."),
        (["{}", "--page", "{}/no/such.html"], "cannot be written: it lies in no folder that is there. Name a file."),
        (["{}", "--baseline", "dora"], "No method is called 'dora'; there are"),
        (["{}/plain-seed-0", "--baseline", "dora"], "A single run is measured against nothing, found --baseline."),
    ],
)
def test_what_cannot_be_reported_says_why_and_writes_nothing(
    folder: Path, words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty").mkdir()
    assert main(["report", *(word.format(folder) for word in words)]) == 2
    assert text in " ".join(capsys.readouterr().err.split())
    assert not (folder / "runs.html").exists()


def test_runs_of_which_none_has_finished_have_a_page_without_a_table(tmp_path: Path) -> None:
    for n in range(2):
        make_run(tmp_path / f"r{n}", loss=1.0, seed=n, status="running", after=None)
    assert main(["report", str(tmp_path)]) == 0
    assert "2 running" in (tmp_path / "runs.html").read_text()


def test_it_is_written_without_torch(folder: Path) -> None:
    code = (
        "import sys; from lorafa.cli.main import main; "
        "code = main(['report', sys.argv[1]]); print(code, *{'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert done.stdout.splitlines()[-1] == "0"


@pytest.mark.slow
def test_a_hundred_runs_take_less_than_ten_seconds(tmp_path: Path) -> None:
    for number in range(100):
        method, seed = divmod(number, 4)
        make_run(tmp_path / f"m{method}-seed-{seed}", loss=1 + method / 30, rank=4 + method, seed=seed, steps=200)
    began = time.process_time()
    report = Report.of([tmp_path])
    report.write()
    assert time.process_time() - began < 10  # takes three
    assert len(report.sections[0].methods) == 25


def test_a_file_that_is_no_page_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"rows\.jsonl' is there already and is no page"):
        Report.of([folder]).write(tmp_path / "rows.jsonl")
    assert (tmp_path / "rows.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize("content", ["[]", '{"status": "finished", "after": {"loss": "abc"}}'])
def test_a_result_of_another_form_is_damaged_and_stops_no_other(tmp_path: Path, content: str) -> None:
    make_run(tmp_path / "a", loss=1.0)
    make_run(tmp_path / "b", loss=1.0)
    (tmp_path / "b" / "result.json").write_text(content)
    report = Report.of([tmp_path])
    assert [entry.name for entry in report.damaged] == ["b"]
    report.write()


def cells_of(page: str, first: str) -> list[str]:
    """The cells of the row of a table that begins with this text."""
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.S) for row in re.findall(r"<tr>(.*?)</tr>", page, re.S)]
    texts = [[re.sub(r"<[^>]+>|\s+", " ", cell).strip() for cell in row] for row in rows]
    return next(row for row in texts if row and row[0].startswith(first))


def test_forgetting_stands_in_the_table_beside_the_score_of_the_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    for n in range(2):
        forgotten = {"kl": 0.01234 * (n + 1), "tokens": 640, "texts": 8, "interval": [0.01, 0.02]}
        after = {"loss": 1.0, "accuracy": 0.25, "correct": 1, "total": 4, "forgetting": forgotten}
        make_run(tmp_path / "runs" / f"m{n}", loss=1.0, rank=8 + n, after=after)
    page = page_of(tmp_path / "runs")
    headings, row = cells_of(page, "method"), cells_of(page, "m1")
    found = dict(zip(headings, row, strict=True))
    assert "forgetting.tokens" not in found  # how much was measured is no score
    assert (found["accuracy"], found["forgetting.kl"]) == ("25.0%", "0.02468")
    text = capsys.readouterr().out
    assert "forgetting.kl" in text
    assert "0.02468" in text
    assert main(["report", str(tmp_path / "runs" / "m0")]) == 0
    assert "forgetting.kl" in capsys.readouterr().out
    one = (tmp_path / "runs" / "m0" / "report.html").read_text(encoding="utf-8")
    assert cells_of(one, "held-out accuracy")[-1] == "25.0% (1/4)"
    assert cells_of(one, "forgetting.kl")[-1] == "0.01234"


def test_a_last_line_that_is_not_whole_is_said_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "plain-seed-0" / "metrics.jsonl"
    count = len(file.read_text().splitlines())
    with file.open("a") as metrics:
        metrics.write("xx garbage")
    for words in ([str(folder)], [str(folder / "plain-seed-0")]):
        capsys.readouterr()
        assert main(["report", *words]) == 0
        errors = capsys.readouterr().err
        said = f"Line {count + 1} of {file}, the last one, is not whole and is left out: 'xx garbage'"
        assert errors.count(said) == 1
