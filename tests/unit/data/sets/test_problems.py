"""Word problems from templates: what is kept, what is not repeated, and that nothing is installed or imported."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import zipfile
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest

from lorafa.data.sets import problems
from lorafa.data.sets.problems import INSTRUCTION, is_sound, load_templates, load_word_problems, make_record
from lorafa.data.sources import load_records
from lorafa.errors import ConfigError, DataError, SourceError
from lorafa.storage.wheels import Wheel

FILE = "reasoning-gym-0.1.25.whl"
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
def cache(tmp_path, monkeypatch):
    """A cache that holds the published wheel, here one of two small templates, so that nothing is downloaded."""
    return published(tmp_path, monkeypatch, variety=1000)


def published(folder, monkeypatch, variety):
    """Put a wheel into a folder and let it be the one whose hash is known."""
    content = (make_wheel(folder, variety) / FILE).read_bytes()
    monkeypatch.setattr(problems, "WHEEL", Wheel("reasoning-gym==0.1.25", hashlib.sha256(content).hexdigest()))
    return folder


def make_wheel(folder, variety):
    with zipfile.ZipFile(folder / FILE, "w") as wheel:
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


def test_asking_for_more_problems_than_there_are_is_an_error(tmp_path, monkeypatch):
    cache = published(tmp_path, monkeypatch, variety=3)
    assert len(load_word_problems(train_size=4, eval_size=2, seed=0, cache_dir=cache).train) == 4
    with pytest.raises(DataError, match=r"gave only 6 different problems, asked for 7\. Lower data\.train_size"):
        load_word_problems(train_size=5, eval_size=2, seed=0, cache_dir=cache)


def test_generated_problems_need_a_size(cache):
    with pytest.raises(DataError, match=r"word_problems are generated without limit\. Set data\.train_size"):
        load_records("word_problems", train_size=None, eval_size=2, seed=0, cache_dir=cache)


REFUSED = (
    r"The cached .*{} is not the wheel that was published: its SHA-256 is [0-9a-f]{{64}}, expected [0-9a-f]{{64}}\. "
    r"Nothing of it was run\. Delete it and run again\."
)


@pytest.mark.parametrize("way", ["argument", "LORAFA_CACHE", "XDG_CACHE_HOME"])
def test_code_of_a_wheel_in_the_cache_runs_only_if_it_is_the_published_one(cache, tmp_path, monkeypatch, way):
    folder = tmp_path / "lorafa" if way == "XDG_CACHE_HOME" else tmp_path
    folder.mkdir(exist_ok=True)
    ran = tmp_path / "ran"
    monkeypatch.setattr(f"{__name__}.UTILS", f"open({str(ran)!r}, 'w')\n{UTILS}")
    make_wheel(folder, variety=1000)
    monkeypatch.delenv("LORAFA_CACHE", raising=False)
    if way != "argument":
        monkeypatch.setenv(way, str(tmp_path))
    with pytest.raises(SourceError, match=REFUSED.format(FILE)):
        load_word_problems(train_size=1, eval_size=0, seed=0, cache_dir=tmp_path if way == "argument" else None)
    assert not ran.exists()
    assert (folder / FILE).is_file()


def test_one_byte_more_makes_it_another_wheel(cache):
    with (cache / FILE).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(SourceError, match=REFUSED.format(FILE)):
        load_word_problems(train_size=1, eval_size=0, seed=0, cache_dir=cache)


def test_the_bytes_that_run_are_the_bytes_that_were_hashed(cache, tmp_path, monkeypatch):
    """The file is exchanged as soon as it was read: a second look at it would run the other one."""
    ran, read = tmp_path / "ran", Path.read_bytes
    (tmp_path / "other").mkdir()
    monkeypatch.setattr(f"{__name__}.UTILS", f"open({str(ran)!r}, 'w')\n{UTILS}")
    make_wheel(tmp_path / "other", variety=1000)

    def read_and_exchange(path):
        content = read(path)
        os.replace(tmp_path / "other" / FILE, path)
        return content

    monkeypatch.setattr(Path, "read_bytes", read_and_exchange)
    load_word_problems(train_size=1, eval_size=0, seed=0, cache_dir=cache)
    assert not ran.exists()
    assert not (tmp_path / "other" / FILE).exists()


def test_a_cached_wheel_that_cannot_be_read_is_an_error(cache):
    (cache / FILE).unlink()
    (cache / FILE).mkdir()
    with pytest.raises(SourceError, match=rf"The cached .*{FILE} cannot be read: .*\. Delete it and run again\."):
        load_templates(cache / FILE)


def test_a_wheel_of_another_layout_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.LISTING", "tasks_fine = [0]\n")
    with pytest.raises(SourceError, match=r"reasoning-gym==0\.1\.25 does not list tasks_ok"):
        load_templates(published(tmp_path, monkeypatch, variety=3) / FILE)


def test_what_is_fetched_is_kept_and_used_again(cache, tmp_path, monkeypatch):
    fetched = []

    def fake(wheel: Wheel, folder, *, instead):
        fetched.append(wheel.requirement)
        return Path(shutil.copy(cache / FILE, folder))

    monkeypatch.setattr(problems, "download_wheel", fake)
    for _ in range(2):
        load_word_problems(train_size=1, eval_size=0, seed=0, cache_dir=tmp_path / "new")
    assert fetched == ["reasoning-gym==0.1.25"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == [FILE]


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
    with pytest.raises(ConfigError, match=r"rows\.jsonl has no setting 'templates' \(found templates=3\)"):
        load_records(str(tmp_path / "rows.jsonl"), train_size=1, eval_size=1, seed=0, templates=3)
