"""Rows from files and the Hub: what is accepted, how it is split, and what bad input gets."""

from __future__ import annotations

import json

import pytest

from lorafa.data.records import Message
from lorafa.data.sources import load_records
from lorafa.errors import ConfigError, DataError, SourceError


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return str(path)


def pairs(n):
    return [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(n)]


def load(name, train_size=None, eval_size=0, seed=0, **rest):
    return load_records(str(name), train_size=train_size, eval_size=eval_size, seed=seed, **rest)


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"prompt": "p", "completion": "c"}, [("user", "p"), ("assistant", "c")]),
        ({"question": "q", "answer": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"instruction": "i", "output": "o"}, [("user", "i"), ("assistant", "o")]),
        ({"instruction": "i", "input": "", "output": "o"}, [("user", "i"), ("assistant", "o")]),
        ({"instruction": "i", "input": "x", "output": "o"}, [("user", "i\n\nx"), ("assistant", "o")]),
        (
            {"messages": [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "u"), ("assistant", "a"))]},
            [("system", "s"), ("user", "u"), ("assistant", "a")],
        ),
    ],
)
def test_each_accepted_set_of_columns_becomes_a_conversation(tmp_path, row, turns):
    record = load(write(tmp_path / "d.jsonl", [row])).train[0]
    assert record.messages == tuple(Message(*turn) for turn in turns)


def test_two_columns_can_be_named(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"query": "q", "response": "The answer is: 7", "prompt": 1, "completion": 2}])
    record = load(path, prompt_column="query", completion_column="response").train[0]
    assert [message.content for message in record.messages] == ["q", "The answer is: 7"]
    assert record.answer == "7"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 3+4 = 7\n#### 7", "7"),
        ("#### 1,234", "1,234"),
        ("#### -0.5", "-0.5"),
        ("it is 7", None),
        ("#### none", None),
    ],
)
def test_the_gold_answer_is_what_follows_the_mark(tmp_path, text, answer):
    assert load(write(tmp_path / "d.jsonl", [{"question": "q", "answer": text}])).train[0].answer == answer


def test_a_json_file_is_a_list_of_rows(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps(pairs(3)))
    assert len(load(tmp_path / "d.json").train) == 3


def test_a_line_may_hold_unicode_line_separators(tmp_path):
    row = {"prompt": "a\u2028b\u0085c", "completion": "d"}
    (tmp_path / "d.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert load(tmp_path / "d.jsonl").train[0].messages[0].content == row["prompt"]


def test_the_split_is_a_partition_that_depends_on_the_seed_only(tmp_path):
    path = write(tmp_path / "d.jsonl", pairs(50))
    whole, again, part, other = load(path, None, 10), load(path, None, 10), load(path, 5, 10), load(path, None, 10, 1)
    assert whole == again
    assert part.heldout == whole.heldout
    assert part.train == whole.train[:5]
    assert other.heldout != whole.heldout
    assert len(set(whole.train) | set(whole.heldout)) == 50


def test_rows_that_repeat_a_held_out_question_are_left_out_of_training_and_counted(tmp_path):
    rows = [{"prompt": "same", "completion": str(i)} for i in range(9)] + pairs(1)
    for seed in range(5):
        records = load(write(tmp_path / "d.jsonl", rows), eval_size=1, seed=seed)
        assert not {record.question for record in records.train} & {record.question for record in records.heldout}
        assert len(records.train) + records.repeated + 1 == 10


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt": "a", \n')
    with pytest.raises(DataError, match=r"d\.jsonl, line 3: not valid JSON: .*Mend or delete it; nothing was loaded"):
        load(tmp_path / "d.jsonl")


def test_a_file_that_is_not_utf8_is_an_error(tmp_path):
    (tmp_path / "d.jsonl").write_bytes('{"prompt": "Größe", "completion": "b"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"d\.jsonl is not UTF-8 text: invalid .* at byte 15\. Convert it"):
        load(tmp_path / "d.jsonl")


def test_a_row_that_is_no_object_is_named(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n["a", "b"]\n')
    with pytest.raises(DataError, match=r"line 2: found a list, expected an object"):
        load(tmp_path / "d.jsonl")
    (tmp_path / "d.json").write_text('{"data": []}')
    with pytest.raises(DataError, match=r"d\.json holds one dict, expected a list of objects"):
        load(tmp_path / "d.json")


def test_missing_columns_are_answered_with_those_found_and_those_accepted(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"query": "q", "reply": "r"}])
    with pytest.raises(
        DataError, match=r"has the columns query, reply; accepted are: messages; prompt \+ completion; "
    ):
        load(path)
    with pytest.raises(DataError, match=r"no column 'querry'\. Did you mean 'query'\? Its columns are: query, reply\."):
        load(path, prompt_column="querry", completion_column="reply")
    with pytest.raises(ConfigError, match=r"Give both data\.prompt_column and data\.completion_column, or neither"):
        load(path, prompt_column="query")


@pytest.mark.parametrize(("value", "found"), [(None, "nothing"), ("  ", "'  '"), (5, "5")])
def test_a_cell_without_text_is_named(tmp_path, value, found):
    path = write(tmp_path / "d.jsonl", [*pairs(1), {"prompt": "p", "completion": value}])
    with pytest.raises(DataError, match=rf"line 2: column 'completion' holds {found}, expected text"):
        load(path)


def test_a_conversation_without_an_assistant_turn_is_named(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"messages": [{"role": "user", "content": "u"}]}])
    with pytest.raises(DataError, match=r"line 1: no assistant turn with text.*Its roles are: user\."):
        load(path)


@pytest.mark.parametrize("turn", [{"role": "robot", "content": "x"}, {"role": "user"}, "hello"])
def test_a_message_without_role_or_content_is_named(tmp_path, turn):
    path = write(tmp_path / "d.jsonl", [{"messages": [{"role": "user", "content": "u"}, turn]}])
    with pytest.raises(DataError, match=r"line 1: message 2 needs a role \(system, user, .*\) and a content"):
        load(path)
    with pytest.raises(DataError, match=r"line 1: 'messages' must be a list of .* found 'hi'"):
        load(write(tmp_path / "d.jsonl", [{"messages": "hi"}]))


def test_an_empty_file_is_an_error(tmp_path):
    (tmp_path / "d.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"holds no rows\. Each row has one of these sets of columns"):
        load(tmp_path / "d.jsonl")


def test_a_missing_file_is_answered_with_its_neighbours(tmp_path):
    write(tmp_path / "train.jsonl", pairs(1))
    with pytest.raises(SourceError, match=r"No file '.*trian\.jsonl'\. Did you mean 'train\.jsonl'\? Check data="):
        load(tmp_path / "trian.jsonl")
    with pytest.raises(SourceError, match=r"No file '.*d\.jsonl'\. Check data="):
        load(tmp_path / "nowhere" / "d.jsonl")


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(SourceError, match=r"No dataset 'word_problem'\. Did you mean 'word_problems'\? Give alpaca, "):
        load("word_problem")


def test_fewer_rows_than_asked_for_is_an_error(tmp_path):
    path = write(tmp_path / "d.jsonl", pairs(10))
    with pytest.raises(
        DataError, match=r"holds 10 rows \(0 .*\), asked for 4 to evaluate and 7 to train on\. Lower data"
    ):
        load(path, 7, 4)
    with pytest.raises(DataError, match=r"asked for 11 to evaluate"):
        load(path, None, 11)
    with pytest.raises(DataError, match=r"data\.train_size counts rows, found -1"):
        load(path, -1, 0)


def test_a_hub_dataset_is_loaded_with_its_subset_and_split(monkeypatch):
    import datasets

    asked = []

    def fake(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"question": "q", "answer": "#### 3"}])

    monkeypatch.setattr(datasets, "load_dataset", fake)
    records = load("openai/gsm8k", subset="main", split="test", revision="abc")
    assert asked == [(("openai/gsm8k", "main"), {"split": "test", "revision": "abc"})]
    assert records.train[0].answer == "3"


def test_an_unreachable_hub_is_a_source_error_with_the_next_step(monkeypatch):
    import datasets

    def fail(*_args, **_kwargs):
        raise ConnectionError("Couldn't reach the Hub\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        SourceError, match=r"Could not load a/b .*: Couldn't reach the Hub\. Next step: .*l>, or data=word_problems\."
    ):
        load("a/b")
