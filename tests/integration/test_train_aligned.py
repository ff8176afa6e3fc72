"""A teacher from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorafa.cli.main import main
from toys.workplace import make_workplace, read, settings

CYCLE = [
    *("align=snapshot", "align.schedule=cyclic", "align.task_steps=2", "align.teacher_steps=1", "align.gate=false"),
    *("align.rewarm_steps=1", "align.probe_rows=3"),
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"))


def command(workplace: Path, run: Path, *more: str) -> list[str]:
    given = {text.partition("=")[0] for text in more} | {"train.steps", "train.checkpoint_every"}
    if "peft=full_ft" in more:
        given |= {text.partition("=")[0] for text in settings(workplace, run) if text.startswith("peft.")}
    own = [text for text in settings(workplace, run) if text.partition("=")[0] not in given]
    return ["train", *own, "train.steps=4", "train.checkpoint_every=1", "optim.schedule=constant", *more]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    out = capsys.readouterr()
    return " ".join((out.out + out.err).split())


@pytest.mark.parametrize("teacher", ["base", "snapshot", "ema", "anchor"])
def test_the_divergence_of_every_step_stands_in_the_metrics(workplace: Path, tmp_path: Path, teacher: str) -> None:
    run = tmp_path / "run"
    assert main(command(workplace, run, f"align={teacher}", "align.divergence=fkl", "align.temperature=2.0")) == 0
    rows = [row for row in rows_of(run / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 4
    assert all(row["divergence"] >= 0 for row in rows)
    assert teacher == "ema" or rows[-1]["divergence"] > 0


def test_weight_zero_is_a_plain_run(workplace: Path, tmp_path: Path) -> None:
    plain, aligned = tmp_path / "plain", tmp_path / "aligned"
    assert main(command(workplace, plain)) == 0
    assert main(command(workplace, aligned, "align=base", "align.weight=0")) == 0
    assert read(plain / "result.json")["after"] == read(aligned / "result.json")["after"]


def test_a_cyclic_run_goes_on_in_the_middle_of_a_phase(workplace: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert main(command(workplace, whole, *CYCLE, "train.steps=8")) == 0
    assert main(command(workplace, run, *CYCLE, "train.steps=8", "train.seed=0")) == 0
    for newer in (run / "checkpoints").glob("checkpoint-*"):
        assert (newer / "alignment.pt").is_file()
    result = read(whole / "result.json")
    assert [row["kind"] for row in result["decisions"] if row["kind"] != "reweighted"][:2] == ["switch", "switch"]
    assert {"step", "phase", "why", "task", "divergence"} <= result["decisions"][0].keys()
    assert read(run / "result.json")["after"] == result["after"]


def test_another_model_teaches(workplace: Path, tmp_path: Path) -> None:
    model = next(text for text in settings(workplace, tmp_path / "x") if text.startswith("model=")).partition("=")[2]
    run = tmp_path / "run"
    assert main(command(workplace, run, "align=external", f"align.teacher={model}", "align.map=procrustes")) == 0
    assert all(row["divergence"] >= 0 for row in rows_of(run / "metrics.jsonl") if "loss" in row)


def first_divergence(workplace: Path, run: Path, *more: str) -> float:
    """That of the student, as it starts, from its own base as a model of its own."""
    model = next(text for text in settings(workplace, run) if text.startswith("model=")).partition("=")[2]
    given = ("align=external", f"align.teacher={model}", "align.divergence=logit_mse", "train.steps=1", *more)
    assert main(command(workplace, run, *given)) == 0
    return float(next(row["divergence"] for row in rows_of(run / "metrics.jsonl") if "divergence" in row))


def test_another_model_is_loaded_in_its_own_format_another_one_or_quantized(workplace: Path, tmp_path: Path) -> None:
    found = {
        name: first_divergence(workplace, tmp_path / name, *more)
        for name, more in {
            "own": [], "float16": ["align.dtype=float16"], "int8": ["align.quantize=int8"],
            "nf4": ["align.quantize=nf4"],
        }.items()
    }  # fmt: skip
    assert found["own"] == 0
    assert 0 < found["float16"] < found["int8"] < found["nf4"]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["align=bse"], "align has no option 'bse'. Did you mean 'base'"),
        (["align.weight=2"], "align.weight=2.0 would change nothing: there is no teacher"),
        (["align=external"], "align=external needs align.teacher=<model>"),
        (["align=base", "align.teacher=x"], "which no other teacher reads"),
        (["align=base", "align.quantize=nf4"], "align.quantize=nf4 would change nothing here"),
        (["align=snapshot", "align.dtype=float32"], "align.dtype=float32 would change nothing here"),
        (["align=external", "align.teacher=x", "align.quantize=nf5"], "align.quantize has no value 'nf5'"),
        (["align=base", "align.task_steps=3"], "align.task_steps=3 would change nothing here"),
        (["align=base", "align.divergence=none"], "compares inner states alone, and align.map is null"),
        (["align=base", "align.temperature=2"], "There is no setting 'align.temperature'"),
        (["align=base", "train.chunked_loss=false"], "align=base needs train.chunked_loss=true"),
        (["align=base", "peft=full_ft"], "is a state of the student's adapters"),
        (["align=base", "align.divergence=fkl", "align.temperature=0"], "temperature must be a number above 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], text: str
) -> None:
    assert main(command(workplace, tmp_path / "run", *more)) == 2
    assert text in said(capsys)
    assert not (tmp_path / "run").exists()
