"""Rows of preferences: what is read of a file, what is refused with the row, and what is counted."""

from __future__ import annotations

import gzip
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from lorafa.data.preferences import JUDGED, PAIRS, PROMPTS
from lorafa.data.records import Record
from lorafa.data.rows import Reading
from lorafa.data.selection import Division
from lorafa.data.sources import Choice, open_data
from lorafa.errors import DataError
from lorafa.train.objectives.rows import judged, pairs, prompts
from toys.language_models import byte_tokenizer
from toys.objectives import config_of

PAIR = {"prompt": "1+1?", "chosen": "2", "rejected": "3"}
TALK = [{"role": "user", "content": "1+1?"}]


def said(text: str) -> list[dict[str, str]]:
    return [*TALK, {"role": "assistant", "content": text}]


def selection(folder: Path, rows: list[dict[str, Any]], reading: Reading = PAIRS, heldout: int = 0) -> Any:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return open_data(Choice(names=(str(path),), division=Division(None, heldout, 0), reading=reading)).selection


def records(folder: Path, rows: list[dict[str, Any]], reading: Reading = PAIRS) -> list[Record]:
    return [record for _, record in selection(folder, rows, reading).training()]


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"prompt": TALK, "chosen": [said("2")[1]], "rejected": [said("3")[1]]},
        {"chosen": said("2"), "rejected": said("3")},
        {"prompt": "1+1?", "chosen": said("2"), "rejected": said("3")},
        {"prompt": "1+1?", "chosen": json.dumps(said("2")), "rejected": json.dumps(said("3"))},
    ],
    ids=["texts", "lists beside a list", "conversations", "conversations beside a prompt", "as cells of a csv file"],
)
def test_a_pair_is_the_same_record_however_it_is_written(row: dict[str, Any], tmp_path: Path) -> None:
    (record,) = records(tmp_path, [row])
    assert [(turn.role, turn.content) for turn in record.messages] == [("user", "1+1?"), ("assistant", "2")]
    assert [(turn.role, turn.content) for turn in record.rejected] == [("assistant", "3")]


def test_turns_that_both_conversations_begin_with_are_the_prompt(tmp_path: Path) -> None:
    before = [*said("No."), {"role": "user", "content": "Again."}]
    row = {"chosen": [*before, said("2")[1]], "rejected": [*before, said("3")[1]]}
    (record,) = records(tmp_path, [row])
    assert [turn.content for turn in record.question] == ["1+1?", "No.", "Again."]
    assert [turn.trained for turn in record.messages] == [False, False, False, True]


def test_a_pair_becomes_ids_of_which_the_prompt_is_shared(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    (row,) = pairs(selection(tmp_path, [PAIR]), tokenizer, config_of("dpo")).train
    assert tokenizer.decode(row["prompt_ids"]).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(row["chosen_ids"]) == "2<|im_end|>"
    assert tokenizer.decode(row["rejected_ids"]) == "3<|im_end|>"


def test_a_packed_file_and_heldout_rows_are_read_as_any(tmp_path: Path) -> None:
    rows = [{**PAIR, "prompt": f"{n}+1?"} for n in range(6)]
    with gzip.open(tmp_path / "pairs.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, rows)))
    choice = Choice(names=(str(tmp_path / "pairs.jsonl.gz"),), division=Division(None, 2, 0), reading=PAIRS)
    found = pairs(open_data(choice).selection, byte_tokenizer(), config_of("dpo"))
    assert (len(found.train), len(found.heldout)) == (4, 2)


@pytest.mark.parametrize(("label", "good"), [(True, True), (0, False), ("False", False), ("1", True)])
def test_a_verdict_may_be_written_in_several_ways(label: Any, good: bool, tmp_path: Path) -> None:
    (record,) = records(tmp_path, [{"prompt": "1+1?", "completion": "2", "label": label}], JUDGED)
    assert record.desirable is good


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"prompt": "1+1?"}, None),
        ({"prompt": "1+1?", "answer": 2}, "2"),
        ({"question": "1+1?", "answer": "#### 2"}, "2"),
    ],
    ids=["alone", "with an answer", "a worked answer"],
)
def test_a_prompt_may_have_an_answer(row: dict[str, Any], answer: str | None, tmp_path: Path) -> None:
    config = config_of("grpo", {"reward": "toys.objectives:pairs" if answer is None else "gsm8k", "num_generations": 2})
    (found,) = prompts(selection(tmp_path, [row], PROMPTS), byte_tokenizer(), config).train
    assert found["answer"] == answer
    assert found["prompt"] == TALK
    assert byte_tokenizer().decode(found["prompt_ids"]).endswith("<|im_start|>assistant\n")


MISSING = "line 2: no 'rejected' answer, and a pair has two to compare. Delete the row, or give it one."
BAD: dict[str, tuple[Reading, list[dict[str, Any]], str]] = {
    "no answer": (PAIRS, [PAIR, {"prompt": "x", "chosen": "2"}], MISSING),
    "null": (PAIRS, [PAIR, {**PAIR, "rejected": None}], MISSING),
    "empty": (PAIRS, [PAIR, {**PAIR, "rejected": ""}], MISSING),
    "blank": (PAIRS, [{**PAIR, "chosen": "  "}], "line 1: column 'chosen' holds '  ', expected text."),
    "other columns": (PAIRS, [{"question": "1", "answer": "2"}], "accepted are: prompt + chosen + rejected; chosen +"),
    "no prompt": (
        PAIRS,
        [{"chosen": [said("2")[1]], "rejected": [said("3")[1]]}],
        "line 1: 'chosen' and 'rejected' begin with no common turn of a user, so they answer no one question.",
    ),
    "another prompt": (
        PAIRS,
        [{"prompt": "2+2?", "chosen": said("2"), "rejected": said("3")}],
        "line 1: the column 'prompt' ('2+2?') is no turn that 'chosen' and 'rejected' begin with.",
    ),
    "several turns": (
        PAIRS,
        [{"chosen": [*said("2"), *said("4")], "rejected": said("3")}],
        "line 1: where the two answers part, 'chosen' goes on with the roles assistant, user, assistant, and one turn",
    ),
    "one ends before": (PAIRS, [{"chosen": said("2"), "rejected": TALK}], "no assistant turn with text in it"),
    "a label": (
        JUDGED,
        [{"prompt": "1", "completion": "2", "label": "maybe"}],
        "line 1: column 'label' holds 'maybe', expected true (a good answer) or false (a bad one).",
    ),
    "no label": (JUDGED, [{"prompt": "1", "completion": "2"}], "accepted are: prompt + completion + label."),
    "an empty prompt": (PROMPTS, [{"prompt": " "}], "line 1: column 'prompt' holds ' ', expected text."),
}


@pytest.mark.parametrize("case", BAD)
def test_a_row_that_cannot_be_read_is_refused_by_its_place(case: str, tmp_path: Path) -> None:
    reading, rows, text = BAD[case]
    with pytest.raises(DataError, match=re.escape(text)):
        records(tmp_path, rows, reading)


def test_columns_that_are_named_are_refused_where_there_are_two_answers(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"q": "1", "a": "2"}))
    own = {"prompt_column": "q", "completion_column": "a"}
    choice = Choice(
        names=(str(tmp_path / "rows.jsonl"),), division=Division(None, 0, 0), settings=own, reading=PAIRS
    )
    with pytest.raises(DataError, match="name a prompt and its one answer, and here the rows are read"):
        _ = open_data(choice).selection


def test_the_same_answer_twice_in_every_row_is_refused(tmp_path: Path) -> None:
    rows = [{**PAIR, "prompt": f"{n}?", "rejected": "2"} for n in range(3)]
    with pytest.raises(DataError, match=r"In every one of the 3 rows of .* are the same answer"):
        pairs(selection(tmp_path, rows), byte_tokenizer(), config_of("dpo"))


def test_what_is_left_out_and_what_is_cut_is_counted(tmp_path: Path) -> None:
    rows = [
        PAIR,
        {**PAIR, "prompt": "2?", "rejected": "2"},
        {**PAIR, "prompt": "3?", "chosen": "2" * 200},
        {**PAIR, "prompt": "4" * 200},
        {**PAIR, "prompt": "5?", "chosen": "x" * 200 + "y", "rejected": "x" * 200 + "z"},
    ]
    config = config_of("dpo")
    object.__setattr__(config.data, "max_length", 100)
    found = pairs(selection(tmp_path, rows), byte_tokenizer(), config)
    assert len(found.train) == 2
    assert found.said == [
        "2 pairs are the same answer twice, or within data.max_length, and were left out.",
        "1 pairs have an answer that was cut at data.max_length.",
        "1 pairs have no answer within data.max_length and were left out.",
    ]
    assert max(len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in found.train) == 100


def test_rows_of_one_answer_are_no_pairs(tmp_path: Path) -> None:
    for make, text in ((pairs, "has one answer, and objective=dpo compares two"), (judged, "does not say whether its")):
        with pytest.raises(DataError, match=text):
            make(selection(tmp_path, [{"prompt": "1", "completion": "2"}], PROMPTS), byte_tokenizer(), config_of("dpo"))


def test_verdicts_that_outweigh_the_others_are_warned_of(tmp_path: Path) -> None:
    def rows(good: int, bad: int) -> list[dict[str, Any]]:
        return [{"prompt": f"{n}?", "completion": "2", "label": n < good} for n in range(good + bad)]

    text = "4 good and 2 bad answers weigh 2 to 1 with their weights, where the paper advises 1 to 4/3: object"
    with pytest.warns(UserWarning, match=re.escape(text)):
        judged(selection(tmp_path, rows(4, 2), JUDGED), byte_tokenizer(), config_of("kto"))
    with pytest.warns(UserWarning, match="All answers to train on are judged good"):
        judged(selection(tmp_path, rows(3, 0), JUDGED), byte_tokenizer(), config_of("kto"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judged(selection(tmp_path, rows(4, 2), JUDGED), byte_tokenizer(), config_of("kto", {"desirable_weight": 0.5}))


def test_a_prompt_without_the_answer_that_a_reward_needs_is_refused(tmp_path: Path) -> None:
    config = config_of("grpo", {"num_generations": 2})
    for row in ({"prompt": "1+1?"}, {"prompt": "1+1?", "answer": "two or three"}):
        with pytest.raises(DataError, match=r"line 1 has no final number .* objective.reward=gsm8k compares with one"):
            prompts(selection(tmp_path, [row], PROMPTS), byte_tokenizer(), config)


def test_long_prompts_are_left_out_and_counted(tmp_path: Path) -> None:
    config = config_of("grpo", {"num_generations": 2, "max_completion_length": 24})
    object.__setattr__(config.data, "max_length", 100)
    rows = [{"prompt": "1+1?", "answer": "2"}, {"prompt": "1" * 60, "answer": "2"}]
    found = prompts(selection(tmp_path, rows, PROMPTS), byte_tokenizer(), config)
    assert len(found.train) == 1
    assert found.said == [
        "1 prompts are longer than 76 tokens (data.max_length less objective.max_completion_length) and were left out."
    ]


def test_a_template_without_a_generation_prompt_is_cut_where_the_answer_begins(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}")
    (row,) = pairs(selection(tmp_path, [PAIR]), tokenizer, config_of("dpo")).train
    assert tokenizer.decode(row["prompt_ids"]) == "[user]1+1?<|im_end|>[assistant]"
    assert tokenizer.decode(row["chosen_ids"]) == "2<|im_end|>"
