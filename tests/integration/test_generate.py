"""`lorafa generate`: a file of prompts answered in its order, continued where it stopped, by one process or two."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorafa.cli.main import main
from lorafa.cli.pipes import OUTPUT_CLOSED
from lorafa.runs import answers as files
from toys.processes import free_ports, launched, run_group
from toys.workplace import interrupt, make_workplace, settings

SHORT = ["--max-new-tokens", "6", "--batch-size", "2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace with a finished run, and prompts of several lengths: more than two windows of them."""
    folder = make_workplace(tmp_path_factory.mktemp("place"))
    assert main(["train", *settings(folder, folder / "run"), "train.checkpoint_every=0", "eval.size=0"]) == 0
    lines = [f"Ann has {n} apples{' and more' * (n % 3)}. How many?" for n in range(19)]
    (folder / "prompts.txt").write_text("\n".join(lines) + "\n")
    return folder


def generate(place: Path, *words: Any, file: str = "prompts.txt") -> int:
    return main(["generate", str(place / "run"), str(place / file), *SHORT, *map(str, words)])


def said(capsys: pytest.CaptureFixture[str], place: Path, *words: Any, file: str = "prompts.txt") -> tuple[int, str]:
    capsys.readouterr()
    status = generate(place, *words, file=file)
    return status, " ".join(capsys.readouterr().err.split())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_prompt_is_answered_in_the_order_of_the_file(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(place, "--out", tmp_path / "a.jsonl") == 0
    found = lines(tmp_path / "a.jsonl")
    assert [one["prompt"] for one in found] == (place / "prompts.txt").read_text().splitlines()
    assert {*found[0]} == {"prompt", "output", "cut"}
    capsys.readouterr()
    assert generate(place) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == found


def test_an_adapter_answers_as_its_run_and_alone_as_together(place: Path, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Ann has 3 apples."}]}))
    for name, subject in (("a", place / "run"), ("b", place / "run" / "adapter")):
        words = ["generate", str(subject), str(tmp_path / "one.jsonl"), *SHORT, "--out", str(tmp_path / name)]
        assert main(words) == 0
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert lines(tmp_path / "a")[0]["prompt"] == "Ann has 3 apples."


def test_what_was_stopped_is_continued_as_if_it_had_not_been(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts, drawn = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl", ["--temperature", "1", "--seed", "3"]
    assert generate(place, *drawn, "--out", whole) == 0
    original, windows = files.AnswerFile.add, []

    def add(self: Any, answers: Any) -> None:
        original(self, answers)
        windows.append(len(answers))
        if len(windows) == 2:
            interrupt()

    with monkeypatch.context() as patch:
        patch.setattr(files.AnswerFile, "add", add)
        assert generate(place, *drawn, "--out", parts) == 130
    assert len(lines(parts)) == 16
    status, text = said(capsys, place, *drawn, "--out", parts)
    assert (status, "is there already. Give --resume to continue it" in text) == (2, True)
    content = parts.read_text().splitlines(keepends=True)
    parts.write_text("".join(content[:11]) + content[11][:20])  # killed in the middle of a line
    assert generate(place, *drawn, "--out", parts, "--resume") == 0
    assert parts.read_text() == whole.read_text()
    status, text = said(capsys, place, *drawn, "--out", parts, "--resume")
    assert (status, "All 19 prompts are answered already" in text) == (0, True)


def test_drawn_answers_differ_by_their_seed_and_place(place: Path, tmp_path: Path) -> None:
    (tmp_path / "same.txt").write_text("Ann has 3 apples.\n" * 10)
    outputs = []
    for seed in (1, 2):
        words = [*SHORT, "--temperature", "1", "--seed", str(seed), "--out", str(tmp_path / str(seed))]
        assert main(["generate", str(place / "run"), str(tmp_path / "same.txt"), *words]) == 0
        outputs.append([one["output"] for one in lines(tmp_path / str(seed))])
    assert outputs[0] != outputs[1]
    assert len(set(outputs[0])) > 5


def _one_of_two(rank: int, port: int, words: list[str]) -> None:
    launched(rank, port)
    assert main(words) == 0


def test_two_processes_answer_as_one(place: Path, tmp_path: Path) -> None:
    assert generate(place, "--out", tmp_path / "one.jsonl") == 0
    words = ["generate", str(place / "run"), str(place / "prompts.txt"), *SHORT, "--out", str(tmp_path / "two.jsonl")]
    run_group(_one_of_two, free_ports(1)[0], words)
    assert lines(tmp_path / "two.jsonl") == lines(tmp_path / "one.jsonl")


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["--max-new-tokens", "0"], 2, "--max-new-tokens must be an integer >= 1"),
        (["--top-p", "0.5"], 2, "--top-p 0.5 says how tokens are drawn, and with --temperature 0 none are"),
        (["--seed", "1"], 2, "--seed 1 says how tokens are drawn, and with --temperature 0 none are"),
        (["--seed", "0"], 2, "--seed 0 says how tokens are drawn"),
        (["--temperature", "-1"], 2, "--temperature must be a number >= 0"),
        (["--resume"], 2, "--resume continues a file, and none is named"),
        (["optim.lr=1"], 2, "changes no answer"),
        (["data.seed=1"], 2, "reads data.template of the group data"),
        (["model=other"], 2, "SUBJECT says which model answers"),
        (["--max-new-tokens", "256"], 1, "prompts.txt, line 1: the prompt has"),
        (["data.template=nothing"], 2, "neither a template's name nor a file"),
    ],
)
def test_what_cannot_be_done_is_an_error(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], status: int, text: str
) -> None:
    out = [] if "--resume" in words else ["--out", tmp_path / "a.jsonl"]
    found = said(capsys, place, *words, *out)
    assert found[0] == status
    assert text in found[1]
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.slow
def test_answers_that_nobody_reads_end_quietly(place: Path) -> None:
    command = [sys.executable, "-m", "lorafa.cli.main", "generate", str(place / "run"), str(place / "prompts.txt")]
    process = subprocess.Popen(
        [*command, *SHORT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait() == OUTPUT_CLOSED
    assert "error: " not in errors
    process.stderr.close()


def test_a_run_is_loaded_as_it_was_trained(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = said(capsys, place, "model.dtype=bfloat16")
    assert status == 2
    assert "A run is loaded as it was trained, so 'model.dtype=bfloat16' would change nothing for " in text


def test_a_file_of_other_prompts_is_not_continued(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.jsonl"
    for content in ('{"prompt": "Who?", "output": "", "cut": false}\n', "no json\n", '{"prompt": "Ann"}\n'):
        out.write_text(content)
        status, text = said(capsys, place, "--out", out, "--resume")
        assert (status, "line 1 is no answer to the prompt of that number" in text) == (1, True)
        assert out.read_text() == content


def _begun(place: Path, out: Path, *words: str) -> list[str]:
    """A file of answers with its first window, and the prompts for the rest."""
    assert generate(place, "--out", out, *words) == 0
    kept = out.read_text().splitlines(keepends=True)[:8]
    out.write_text("".join(kept))
    return kept


@pytest.mark.matrix(4, each_word=False)
@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--temperature", "1", "--seed", "4"], "--seed was 3 and is 4"),
        (["--temperature", "0.5", "--seed", "3"], "--temperature was 1.0 and is 0.5"),
        (["--temperature", "1", "--seed", "3", "--top-p", "0.9"], "--top-p was 1.0 and is 0.9"),
        (["--temperature", "1", "--seed", "3", "--max-new-tokens", "7"], "--max-new-tokens was 6 and is 7"),
        (["--temperature", "1", "--seed", "3", "--batch-size", "4"], "--batch-size was 2 and is 4"),
        (["--temperature", "1", "--seed", "3", "data.template=plain"], "data.template was None and is 'a text of "),
        ([], "--temperature was 1.0 and is 0.0; --seed was 3 and is None"),
    ],
)
def test_answers_made_otherwise_are_not_continued(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], text: str
) -> None:
    out = tmp_path / "a.jsonl"
    kept = _begun(place, out, "--temperature", "1", "--seed", "3")
    status, found = said(capsys, place, *words, "--out", out, "--resume")
    assert status == 2
    assert f"was begun with {place / 'run'}, and cannot be continued with other answers: {text}" in found
    assert out.read_text() == "".join(kept)


def test_answers_of_another_model_are_not_continued(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, copy = tmp_path / "a.jsonl", tmp_path / "adapter"
    shutil.copytree(place / "run" / "adapter", copy)
    _begun(place, out)

    def resumed(subject: Path) -> tuple[int, str]:
        capsys.readouterr()
        status = main(["generate", str(subject), str(place / "prompts.txt"), *SHORT, "--out", str(out), "--resume"])
        return status, " ".join(capsys.readouterr().err.split())

    status, text = resumed(place / "model")
    assert (status, "the adapter was 'files " in text, "and is None" in text) == (2, True, True)
    weights = copy / "adapter_model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    moved = tmp_path / "moved"
    shutil.copytree(place / "run", moved)
    assert resumed(moved)[0] == 0  # the same files in another place
    shutil.rmtree(moved / "adapter")
    shutil.copytree(copy, moved / "adapter")
    status, text = resumed(moved)
    assert (status, "the adapter was 'files " in text, "the model" in text) == (2, True, False)


def test_answers_of_which_nothing_says_how_they_were_made_are_not_continued(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.jsonl"
    _begun(place, out)
    beside = tmp_path / "a.jsonl.made.json"
    beside.write_text("{}")
    status, text = said(capsys, place, "--out", out, "--resume")
    assert (status, "nothing says with which model and options the answers in" in text) == (1, True)
    out.unlink()
    beside.write_text('{"mine": 1}')
    status, text = said(capsys, place, "--out", out)
    assert (status, "a.jsonl.made.json is there already, and was not written here" in text) == (2, True)
    assert beside.read_text() == '{"mine": 1}'


def test_a_folder_that_is_not_there_is_an_error_before_the_model_is_loaded(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text = said(capsys, place, file="none.txt")
    assert (status, "none.txt cannot be read" in text) == (1, True)
