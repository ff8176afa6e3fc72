"""`eval_gsm8k.py`: the run is found by its name and asked as it was trained, alone or by two processes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lorafa.cli.main import main as lorafa
from lorafa.runs.record import RunDirectory
from lorafa.scripts.eval_gsm8k import main, named, problems
from toys.processes import free_ports, launched, run_group
from toys.workplace import make_workplace, read

LEARNT, NEW = 4, 3


def rows() -> list[dict[str, str]]:
    return [
        {"question": f"Ann has {a} and gets {b}?", "answer": f"{a} + {b}\n#### {a + b}.50"}
        for a, b in ((2, 1), (3, 4), (5, 2), (4, 4), (6, 1), (2, 6), (1, 1))
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that was trained until it knows the first problems, and a test file with others too."""
    folder = make_workplace(tmp_path_factory.mktemp("place"))
    pairs = [{"prompt": f"Q: {row['question']}\nA: ", "completion": row["answer"]} for row in rows()[:LEARNT]]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows())))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ["model=./model", "data=train.jsonl", "data.eval_size=0", "data.template=spaced", "run_dir=runs/one"]
        words += ["peft.r=16", "peft.modules_to_save=[embed_tokens,lm_head]", "optim.lr=1e-2", "train.steps=150"]
        words += ["peft.lora_dropout=0", "train.batch_size=4", "train.checkpoint_every=0"]
        assert lorafa(["train", *words]) == 0
    return folder


@pytest.fixture
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    status = main(["--test_file=test.jsonl", "--max_new_tokens=20", "--batch_size=2", *words])
    said = capsys.readouterr()
    return status, " ".join((said.out + said.err).split())


def test_a_run_is_found_by_its_name_and_measured(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = asked(capsys, "--wandb_name=one")
    assert status == 0
    found = read(inside / "runs/one/gsm8k.json")
    known = found["answers"][:LEARNT]
    assert [one["output"].strip() for one in known] == [row["answer"] for row in rows()[:LEARNT]]
    assert all(one["correct"] for one in known)
    assert [one["gold"] for one in known] == ["3.50", "7.50", "7.50", "8.50"]
    correct = sum(one["correct"] for one in found["answers"])
    assert (found["correct"], found["total"]) == (correct, LEARNT + NEW)
    assert f"Accuracy: {correct / 7:.2%} ({correct} of 7 right;" in said
    # the published rule reads 7 for 7.50, in answers and gold answers alike
    assert found["published_accuracy"] >= LEARNT / 7
    assert f"By the rule of the published script: {found['published_accuracy']:.2%}" in said


def in_two(rank: int, port: int, folder: str) -> None:
    os.chdir(folder)
    launched(rank, port)
    status = main(["--wandb_name", "runs/one", "--test_file", "test.jsonl", "--max_new_tokens", "20", "--batch_size=2"])
    os._exit(status)


def test_two_processes_find_what_one_finds(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert asked(capsys, "--wandb_name=one")[0] == 0
    one = read(inside / "runs/one/gsm8k.json")
    (inside / "runs/one/gsm8k.json").unlink()
    run_group(in_two, free_ports(1)[0], str(inside))
    assert read(inside / "runs/one/gsm8k.json") == one


def test_drawn_answers_are_those_of_the_seed(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for seed in (0, 0, 1):
        assert asked(capsys, "--wandb_name=one", "--temperature=3", "--top_p=0.99", f"--seed={seed}")[0] == 0
        found.append([one["output"] for one in read(inside / "runs/one/gsm8k.json")["answers"]])
    assert found[0] == found[1] != found[2]


def test_another_model_is_asked_and_nothing_is_written(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (inside / "runs/one/gsm8k.json").unlink(missing_ok=True)
    status, said = asked(capsys, "--wandb_name=one", "--model_name=./model", "--limit=3")
    assert status == 0
    assert "of 3 right" in said
    assert "3 answers have no number after '####' (answers end after 20 tokens)." in said
    assert not (inside / "runs/one/gsm8k.json").exists()


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["--wandb_name="], 2, "--wandb_name= is followed by nothing. Was a variable of the shell not set?"),
        (["--wandb_name=on"], 2, "There is no run 'on' in {place}/runs. Did you mean 'one'? Give the wandb.name"),
        ([], 2, "Nothing says what is to be measured. Give --wandb_name=<run>, or --model_name=<model>."),
        (["--wandb_name=one", "--temperature=1", f"--seed={2**63}"], 2, "seed must be below 2**63, found 922"),
        (["--wandb_name=" + "a" * 300], 2, "There is no run 'aaa"),
        (["--wandb_name=one", "--temperature=0"], 2, "temperature must be a number > 0, found 0.0"),
        (["--wandb_name=one", "--top_p=2"], 2, "top_p must be a number in (0, 1], found 2.0"),
        (["--wandb_name=one", "--limit=0"], 2, "--limit must be an integer >= 1, found 0"),
        (["--wandb_name=one", "--test_file=none.jsonl"], 1, "No file 'none.jsonl'"),
        (["--wandb_name=one", "--test_file=train.jsonl"], 1, "has no column 'question'"),
        (["--wandb_name=one", "--max_new_tokens=999"], 1, "exceeds the model's context of 256"),
    ],
)
def test_what_cannot_be_measured_says_why(
    inside: Path, capsys: pytest.CaptureFixture[str], words: list[str], status: int, text: str
) -> None:
    found, said = asked(capsys, *words)
    assert text.format(place=inside) in said
    assert found == status


def test_a_run_without_an_adapter_yet(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunDirectory.create(inside / "runs/two", RunDirectory.open("runs/one").config())
    status, said = asked(capsys, "--wandb_name=two")
    assert status == 2
    assert "The run 'runs/two' has no adapter yet (status: not begun). Let it finish first." in said


def test_of_runs_that_are_called_the_same_the_last_one_is_measured(place: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(place)
    (place / "runs").mkdir(exist_ok=True)
    for directory, name in (("three", "three"), ("three-2", "three"), ("three-3", "three-3")):
        made = RunDirectory.create(place / "runs" / directory, RunDirectory.open("runs/one").config())
        made.write_environment({"command": ["run_exp.py", f"++wandb.name={name}"]})
    assert named("three").path == Path("runs/three-2")
    assert named("three-3").path == Path("runs/three-3")
    assert named("runs/three").path == Path("runs/three")


def test_the_test_problems_come_from_the_hub_where_no_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    seen = []

    def load_dataset(*args: Any, **settings: Any) -> list[dict[str, str]]:
        seen.append((args, settings))
        return rows()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert problems(None)[0].messages[0].content == "Q: Ann has 2 and gets 1?\nA: "
    assert seen == [(("openai/gsm8k", "main"), {"split": "test", "revision": None})]

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(Exception, match=r"openai/gsm8k, from the Hub: no route\. .* --test_file=test\.jsonl"):
        problems(None)
