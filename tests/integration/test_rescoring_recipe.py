"""recipes/rescoring.py: a tiny encoder learns which words are wrong, twice the same; PEFT reads it; what is refused."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import lorafa
from lorafa.data.nbest import read_nbest, word_error_rate
from toys.kinds import FIRST, WORDS, make_bert
from toys.places import ROOT
from toys.recipes import recipe
from toys.records import write_rows
from toys.workplace import make_workplace

RECIPE = ROOT / "recipes" / "rescoring.py"
GOOD, BAD = WORDS[:4], WORDS[4:]


def lists(count: int, seed: int) -> list[dict[str, Any]]:
    """Films that were praised: hypotheses that say otherwise are wrong, and the first pass knows nothing of it."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        beginning = f"{draw.choice(FIRST)} film is"
        praised = f"{beginning} {draw.choice(GOOD)}"
        texts = [praised, *(f"{beginning} {draw.choice(BAD)}" for _ in range(draw.randint(1, 4)))]
        draw.shuffle(texts)
        rows.append({"hypotheses": [{"text": t, "score": draw.gauss(0, 0.5)} for t in texts], "reference": praised})
    return rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_bert(tmp_path_factory.mktemp("rescoring"))
    write_rows(made / "train.jsonl", lists(64, seed=1))
    write_rows(made / "heldout.jsonl", lists(48, seed=2))
    return made


def words(place: Path, out: Path, *more: str, **files: str) -> list[str]:
    named = {"train": "train.jsonl", "heldout": "heldout.jsonl", "model": "model"} | files
    read = [str(place / named["train"]), str(place / named["heldout"])]
    short = ["--epochs", "5", "--lr", "2e-2", "--log-every", "1", "--out", str(out)]
    return [*read, "--model", str(place / named["model"]), *short, *more]


def events(printed: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in printed.splitlines()]
    return [{name: value for name, value in event.items() if name != "adapter"} for event in found]


@pytest.fixture(scope="module")
def trained(place: Path) -> tuple[Path, list[dict[str, Any]]]:
    """A run as it is started from a shell: its folder, and what it printed."""
    done = subprocess.run(
        [sys.executable, str(RECIPE), *words(place, place / "out")], capture_output=True, text=True, check=True
    )
    return place / "out", events(done.stdout)


@pytest.mark.slow
def test_lists_that_are_held_out_have_fewer_word_errors_than_by_the_first_pass(trained: Any) -> None:
    rates = [event for event in trained[1] if event["event"] == "wer"]
    assert [rate["step"] for rate in rates] == [0, 40]
    before, after = rates
    assert before["first_pass"] == after["first_pass"] > 0.1
    assert after["rescored"] < 0.5 * before["first_pass"]
    assert before["oracle"] == after["oracle"] == 0
    losses = [event["loss"] for event in trained[1] if event["event"] == "step"]
    assert len(losses) == 40
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_a_run_of_the_same_seed_prints_the_same_numbers_and_another_seed_others(
    trained: Any, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = recipe("rescoring").main
    assert main(words(place, tmp_path / "again")) == 0
    assert events(capsys.readouterr().out) == trained[1]
    first, second = (load_file(path / "adapter_model.safetensors") for path in (trained[0], tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert main(words(place, tmp_path / "other", "--seed", "1")) == 0
    assert events(capsys.readouterr().out)[3] != trained[1][3]  # the first loss


@pytest.mark.slow
def test_scores_of_which_the_higher_is_better_train_the_same_model(
    trained: Any, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("train", 1), ("heldout", 2)):
        rows = lists(64 if name == "train" else 48, seed)
        for row in rows:
            row["hypotheses"] = [one | {"score": -one["score"]} for one in row["hypotheses"]]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    (tmp_path / "model").symlink_to(place / "model")
    assert recipe("rescoring").main(words(tmp_path, tmp_path / "out", "--higher-is-better")) == 0
    assert events(capsys.readouterr().out)[2:] == trained[1][2:]  # after what the files and the model are
    assert json.loads((tmp_path / "out" / "rescoring.json").read_text())["higher_is_better"] is True


@pytest.mark.parametrize("reads", [peft.PeftModel, lorafa.PeftModel], ids=["peft", "lorafa"])
def test_the_adapter_is_read_with_its_head_and_chooses_as_it_was_measured(
    trained: Any, place: Path, reads: Any
) -> None:
    torch.manual_seed(5)  # of the head and the pooler that the file replaces
    base = transformers.AutoModelForSequenceClassification.from_pretrained(place / "model", num_labels=1)
    model = reads.from_pretrained(base, trained[0]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained[0])
    said = json.loads((trained[0] / "rescoring.json").read_text())
    held, chosen = read_nbest(place / "heldout.jsonl"), []
    for one in held:
        tokens = tokenizer([each.text for each in one.hypotheses], padding=True, return_tensors="pt")
        with torch.no_grad():
            costs = model(**tokens).logits[:, 0].tolist()
        totals = [each.score + said["beta"] * cost for each, cost in zip(one.hypotheses, costs, strict=True)]
        chosen.append(totals.index(min(totals)))
    measured = [event["rescored"] for event in trained[1] if event["event"] == "wer"]
    assert word_error_rate(held, chosen) == measured[-1]
    config = json.loads((trained[0] / "adapter_config.json").read_text())
    assert (config["task_type"], config["r"], sorted(config["target_modules"])) == ("SEQ_CLS", 8, ["query", "value"])


def test_what_is_cut_is_counted(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe("rescoring").main(words(place, tmp_path / "out", "--max-length", "4", "--epochs", "1")) == 0
    data = events(capsys.readouterr().out)[0]
    told = sum(len(row["hypotheses"]) for row in lists(64, 1) + lists(48, 2))
    assert (data["max_length"], data["cut"]) == (4, told)


def test_empty_hypotheses_and_lists_of_one_are_read_beside_others(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = [{"hypotheses": [{"text": "", "score": 3}], "reference": "the film"}]
    given = write_rows(tmp_path / "other.jsonl", [*short, *lists(3, seed=5)])
    once = ["--epochs", "1", "--batch-size", "1"]
    assert recipe("rescoring").main(words(place, tmp_path / "out", *once, train=str(given))) == 0
    steps = [event for event in events(capsys.readouterr().out) if event["event"] == "step"]
    assert [event["expected"] for event in steps].count(0.0) == 1
    assert [event["correlation"] for event in steps].count(0.0) == 1


def test_help_is_printed_without_torch() -> None:
    code = (
        f"import runpy, sys; sys.argv = ['rescoring.py', '--help']\n"
        f"try: runpy.run_path({str(RECIPE)!r}, run_name='__main__')\n"
        "except SystemExit as stopped: assert stopped.code == 0 and not {'torch', 'transformers'} & {*sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--higher-is-better" in done.stdout


# ---- what is refused


PLAIN = lists(4, seed=3)
ALIKE = [{"hypotheses": [{"text": t, "score": 1, "errors": 2} for t in "ab"], "words": 3}]
WORDLESS = [{"hypotheses": [{"text": "a", "score": 1, "errors": 2}]}]


@pytest.mark.parametrize(
    ("train", "more", "told"),
    [
        ([{"prompt": "a", "completion": "b"}], [], r"other\.jsonl, line 1: no column 'hypotheses'"),
        (ALIKE, [], r"other\.jsonl: in each of its 1 lists all hypotheses have equally many errors"),
        (PLAIN, ["--lr", "nan"], r"--lr is a number above 0, found nan"),
        (PLAIN, ["--beta", "0"], r"beta is a number above 0, found 0\.0"),
        (PLAIN, ["--correlation", "-1"], r"correlation penalty is a number from 0 on, found -1\.0"),
        (PLAIN, ["--rank", "0"], r"r .*0"),
        (PLAIN, ["--targets", "q_proj"], r"q_proj"),
        (PLAIN, ["--lr", "1e30"], r"Lower --lr; nothing was written"),
    ],
)
def test_an_error_is_one_line_and_writes_nothing(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], train: Any, more: list[str], told: str
) -> None:
    given = write_rows(tmp_path / "other.jsonl", train)
    assert recipe("rescoring").main(words(place, tmp_path / "out", *more, train=str(given))) == 1
    printed = capfd.readouterr().err
    assert re.search(rf"^error: .*{told}", printed, flags=re.MULTILINE), printed
    assert "Traceback" not in printed
    assert not (tmp_path / "out").exists()


def test_held_out_lists_that_cannot_measure_are_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = recipe("rescoring").main
    given = write_rows(tmp_path / "other.jsonl", WORDLESS)
    assert main(words(place, tmp_path / "out", heldout=str(given))) == 1
    assert "other.jsonl, line 1: no word error rate without the number of words" in capsys.readouterr().err
    assert main(words(place, tmp_path / "out", heldout="train.jsonl")) == 1
    assert "train.jsonl is what is trained on, too" in capsys.readouterr().err
    assert main(words(place, tmp_path / "out", heldout="there_is_none.jsonl")) == 1
    assert "No file" in capsys.readouterr().err


def test_a_folder_that_holds_something_and_a_model_that_is_no_encoder_are_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = recipe("rescoring").main
    assert main(words(place, place / "model")) == 1
    assert "model is there already. Give --out a folder that is not" in capsys.readouterr().err
    assert main(words(place, place / "train.jsonl" / "out")) == 1
    assert re.search(r"out cannot be made: .*train\.jsonl is no folder that can be written to", capsys.readouterr().err)
    decoder = make_workplace(tmp_path)
    assert main(words(place, tmp_path / "out", model=str(decoder / "model"))) == 1
    assert "is of the type 'llama' and no encoder" in capsys.readouterr().err
    assert main(words(place, tmp_path / "out", model=str(tmp_path / "none"))) == 1
    assert "No model" in capsys.readouterr().err


def test_scores_that_seem_to_be_of_the_other_sign_are_said(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = lists(8, seed=4)
    for row in rows:
        row["hypotheses"] = [one | {"score": float(one["text"] == row["reference"])} for one in row["hypotheses"]]
    given = write_rows(tmp_path / "other.jsonl", rows)
    assert recipe("rescoring").main(words(place, tmp_path / "out", "--epochs", "1", train=str(given))) == 0
    assert "Are the scores of the other sign? Then run with --higher-is-better." in capsys.readouterr().err
