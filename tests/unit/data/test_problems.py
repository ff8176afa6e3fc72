"""Word problems from templates: what is kept, what is not repeated, and that nothing is installed or imported."""

from __future__ import annotations

import sys
import zipfile
from collections import Counter
from decimal import Decimal

import pytest

from lorafa.data import problems
from lorafa.data.problems import INSTRUCTION, is_sound, load_templates, load_word_problems, make_record
from lorafa.data.sources import load_records
from lorafa.data.wheels import Wheel
from lorafa.errors import DataError, SourceError

UTILS = "def format_number(n):\n    return str(n)\n"
LISTING = "raise ImportError('this module is read, never run')\ntasks_ok = [0, 50]\n"
TEMPLATE = """
from random import Random
from reasoning_gym.utils import format_number
def generate_{n}(rng, difficulty=1.0):
    a = rng.randint(1, {variety})
    return {{"question": f"kind {n}: {{a}} + 1?", "answer": format_number(a + 1),
            "metadata": {{"answer_cot": f"{{a}}.0 + 1 = {{a + 1}}\\n#### {{a + 1}}.0"}}}}
"""


@pytest.fixture
def cache(tmp_path):
    """A cache that holds a wheel of two small templates, so that nothing is downloaded."""
    return make_wheel(tmp_path, variety=1000)


def make_wheel(folder, variety):
    with zipfile.ZipFile(folder / "reasoning-gym-0.1.25.whl", "w") as wheel:
        wheel.writestr("reasoning_gym/__init__.py", "raise ImportError('the package is never imported')")
        wheel.writestr("reasoning_gym/utils.py", UTILS)
        wheel.writestr("reasoning_gym/arithmetic/gsm_symbolic/gsm_symbolic.py", LISTING)
        for part, n in (("00_49", 0), ("50_99", 50)):
            source = TEMPLATE.format(n=n, variety=variety) + f"def generate_{n + 1}(rng): raise AssertionError\n"
            wheel.writestr(f"reasoning_gym/arithmetic/gsm_symbolic/generators_{part}.py", source)
    return folder


def test_problems_are_conversations_that_end_in_the_gold_answer(cache):
    records = load_word_problems(train_size=6, eval_size=2, seed=0, cache_dir=cache)
    for record in records.train + records.heldout:
        question, worked = record.messages
        assert (question.role, worked.role) == ("user", "assistant")
        number = int(question.content.split(": ")[1].split(" +")[0])
        assert question.content.endswith(f" + 1?\n{INSTRUCTION}")
        assert worked.content == f"{number} + 1 = {number + 1}\n#### {number + 1}"
        assert record.answer == str(number + 1)


def test_no_question_occurs_twice_and_every_template_has_its_share(cache):
    records = load_word_problems(train_size=150, eval_size=50, seed=0, cache_dir=cache)
    questions = [record.question[0].content for record in records.train + records.heldout]
    assert len(set(questions)) == 200
    share = Counter(question.split(":")[0] for question in questions)
    assert set(share) == {"kind 0", "kind 50"}
    assert abs(share["kind 0"] - 100) <= 15


def test_the_same_seed_gives_the_same_problems_and_the_held_out_ones_do_not_depend_on_the_train_size(cache):
    first = load_records("word_problems", train_size=20, eval_size=5, seed=3, cache_dir=cache)
    assert first == load_records("word_problems", train_size=20, eval_size=5, seed=3, cache_dir=cache)
    shorter = load_records("word_problems", train_size=10, eval_size=5, seed=3, cache_dir=cache)
    assert (shorter.heldout, shorter.train) == (first.heldout, first.train[:10])
    assert first.heldout != load_records("word_problems", train_size=20, eval_size=5, seed=4, cache_dir=cache).heldout


def test_the_templates_run_without_a_trace_in_the_module_table(cache):
    before = dict(sys.modules)
    load_word_problems(train_size=2, eval_size=0, seed=0, cache_dir=cache)
    assert {name: sys.modules.get(name) for name in before} == before
    new = {name.partition(".")[0] for name in sys.modules.keys() - before.keys()}
    assert new <= sys.stdlib_module_names


@pytest.mark.parametrize(
    ("worked", "gold"),
    [
        ("3 + 4 = 7\n#### 7", 7),
        ("$1,200 x 5/100 = $60 of fees\n#### 60", 60),
        ("2 + 3 * 4 = 14, 14 - 1 = 13\n#### 13", 13),
        ("9 \N{DIVISION SIGN} 3 = 3 and 3 \N{MULTIPLICATION SIGN} 2 = 6\n#### 6", 6),
        ("10 / 3 = 3.33\n#### 3.33", "3.33"),
        ("4 boys * 3 + 1 = 13\n#### 13", 13),
    ],
)
def test_true_worked_answers_are_sound(worked, gold):
    assert is_sound(worked, Decimal(gold))


@pytest.mark.parametrize(
    ("worked", "gold"),
    [
        ("3 + 4 = 7", 7),  # no final line
        ("#### 7\nso it is 7", 7),  # the mark is not on the last line
        ("3 + 4 = 7\n#### 7", 8),  # another gold number
        ("3 + 5 = 7\n#### 7", 7),  # a false equation
        ("0.34*61 = 20 students\n#### 20", 20),  # truncated
        ("7 / 0 = 7\n#### 7", 7),
        ("0.1 + 0.2 = 0.30000000000000004\n#### 0.3", "0.3"),  # rounding residue
        ("3 - 4 = -1\n#### -1", -1),  # an age below zero
    ],
)
def test_false_or_garbled_worked_answers_are_not(worked, gold):
    assert not is_sound(worked, Decimal(gold))


def test_an_unsound_problem_makes_no_record():
    example = {"question": "q", "answer": "8", "metadata": {"answer_cot": "3 + 4 = 7\n#### 7"}}
    assert make_record(example) is None
    record = make_record({**example, "answer": "7"})
    assert record is not None
    assert record.answer == "7"
    assert record.messages[0].content == "q\nEnd with '#### ' and the answer as a number."


def test_asking_for_more_problems_than_there_are_is_an_error(tmp_path):
    cache = make_wheel(tmp_path, variety=3)
    assert len(load_word_problems(train_size=4, eval_size=2, seed=0, cache_dir=cache).train) == 4
    with pytest.raises(DataError, match=r"gave only 6 different problems, asked for 7\. Lower data\.train_size"):
        load_word_problems(train_size=5, eval_size=2, seed=0, cache_dir=cache)


def test_generated_problems_need_a_size(cache):
    with pytest.raises(DataError, match=r"word_problems are generated.*give data\.train_size a number"):
        load_records("word_problems", train_size=None, eval_size=2, seed=0, cache_dir=cache)


def test_a_damaged_cached_wheel_is_an_error(tmp_path):
    (tmp_path / "reasoning-gym-0.1.25.whl").write_bytes(b"PK not a zip")
    with pytest.raises(SourceError, match=r"The cached .* cannot be read: .* Delete it and run again"):
        load_word_problems(train_size=1, eval_size=0, seed=0, cache_dir=tmp_path)
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as wheel:
        wheel.writestr("README", "nothing here")
    with pytest.raises(SourceError, match=r"cannot be read: .*gsm_symbolic\.py"):
        load_templates(tmp_path / "other.whl")


def test_a_wheel_of_another_version_is_an_error(cache, monkeypatch):
    monkeypatch.setattr(f"{__name__}.LISTING", "tasks_fine = [0]\n")
    with pytest.raises(SourceError, match=r"reasoning-gym==0\.1\.25 does not list tasks_ok"):
        load_templates(make_wheel(cache, variety=3) / "reasoning-gym-0.1.25.whl")


def test_what_is_fetched_is_kept_and_used_again(tmp_path, monkeypatch):
    fetched = []

    def fake(wheel: Wheel, folder, *, instead):
        fetched.append(wheel.requirement)
        return make_wheel(folder, variety=1000) / "reasoning-gym-0.1.25.whl"

    monkeypatch.setattr(problems, "download_wheel", fake)
    for _ in range(2):
        load_word_problems(train_size=1, eval_size=0, seed=0, cache_dir=tmp_path / "new")
    assert fetched == ["reasoning-gym==0.1.25"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["reasoning-gym-0.1.25.whl"]


def test_few_templates_are_those_with_the_shortest_text_in_their_order():
    def kind(words):
        def template(rng, difficulty=1.0):
            worked = "so " * words + "it is 3.\n#### 3"
            return {"question": "How many?", "answer": "3", "metadata": {"answer_cot": worked}}

        return template

    long, short, middle = kind(50), kind(1), kind(9)
    assert problems.shortest([long, middle, short], 2) == [middle, short]


def test_more_templates_than_there_are_is_an_error(cache):
    with pytest.raises(DataError, match=r"data\.templates: there are \d+ kinds of problem, found 1000\. Ask for fewer"):
        load_word_problems(train_size=4, eval_size=1, seed=0, templates=1000, cache_dir=cache)


def test_templates_of_other_data_are_an_error(tmp_path):
    with pytest.raises(DataError, match=r"data\.templates=3 counts kinds of generated problems"):
        load_records(str(tmp_path / "rows.jsonl"), train_size=1, eval_size=1, seed=0, templates=3)
