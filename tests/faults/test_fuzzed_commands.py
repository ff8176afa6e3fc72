"""Command lines that were put together at random: each ends with 0, 1 or 2, and says what is wrong with it, in time.

Each begins as one that works, on a tiny model, a run and an adapter. Then words are put in, taken out, written twice or
differently: settings with odd values, options, wrong paths, names in all scripts, words without end. How many examples
the long test makes, :mod:`toys.fuzzing` says.
"""

from __future__ import annotations

import os
import shutil
import socket
from argparse import Action
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafa.cli.main import COMMANDS, Parser, main
from lorafa.conf.compose import KEYS, OPEN_GROUPS, groups
from toys.fuzzing import BUDGET, EXPRESSIONS, SECONDS, command, files_of, many, stay_at_home
from toys.workplace import make_workplace
from toys.workplace import settings as settings_in

QUICK = 12
SHORT = ["eval.size=0", "eval.before=false", "train.steps=1", "train.checkpoint_every=1", "optim.schedule=constant"]
WORK = 2.5
"""CPU seconds of a training of one step on the tiny model, or of measuring it and its adapters, at most."""

LINES = {
    "train": ["model=model", "data=rows.jsonl", "data.eval_size=4", "peft.r=2", *SHORT],
    "eval": ["run", "adapter", "task=perplexity", "data=rows.jsonl", "eval.size=2"],
    "generate": ["run", "prompts.txt", "--max-new-tokens", "2", "--out", "out"],
    "chat": ["run", "a=adapter", "--max-new-tokens", "2"],
    "report": ["run", "all", "--page", "out.html"],
    "compare": ["plan.yaml", "all"],
    "combine": ["run", "adapter", "--weights", "1", "0.5", "--out", "out"],
    "merge": ["run", "--base", "model", "--out", "out"],
    "export": ["adapter", "--for", "peft", "--out", "out"],
    "inspect": ["run", "--other", "adapter", "--base", "model"],
    "params": ["model=model", "peft.r=4"],
    "plan": ["model=model", "data=rows.jsonl", "peft.r=4"],
    "doctor": ["--json"],
}


ANOTHER_PROCESS = {"run"}
"""Commands that become another program, with errors of its own."""


def test_each_command_has_a_line() -> None:
    assert {module.__name__.rpartition(".")[2] for module in COMMANDS} == set(LINES) | ANOTHER_PROCESS


@pytest.fixture(scope="module", autouse=True)
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder: ``model/``, ``run/``, ``adapter/``, ``all/`` (a comparison), rows and prompts."""
    folder = tmp_path_factory.mktemp("deep") / "in" / "it"
    folder.mkdir(parents=True)
    make_workplace(folder)
    with pytest.MonkeyPatch.context() as patch:
        stay_at_home(patch, folder)
        patch.setattr(socket.socket, "connect", _no_network)
        patch.setattr("socketserver.BaseServer.serve_forever", lambda *_, **__: None)
        patch.setattr(os, "fsync", lambda _: None)
        patch.chdir(folder)
        words = [word for word in settings_in(folder, Path("run")) if not word.startswith(("run_dir=", "optim.lr="))]
        plan = {"methods": {"lora": {"settings": [], "rates": [0.01]}}, "baseline": "lora", "seeds": [1]}
        Path("plan.yaml").write_text(yaml.safe_dump({**plan, "settings": [*words, *SHORT]}))
        assert main(["compare", "plan.yaml", "all"]) == 0
        shutil.copytree("all/lora/lr-0.01-seed-1", "run")
        shutil.copytree("run/adapter", "adapter")
        Path("prompts.txt").write_text("How many?\nWhy?\n")
        for name, line in LINES.items():
            assert command([name, *line, *_safe(name, line)], "Hello?\n").status == 0, name
            _clear()
        yield folder


def _clear() -> None:
    for made in ("out", "runs"):
        if Path(made).is_dir():
            shutil.rmtree(made)
        Path(made).unlink(missing_ok=True)


def _no_network(*_: Any) -> None:
    raise OSError("there is no network")


# ---- the words -------------------------------------------------------------------------------------------------------

TEXTS = st.text(max_size=6).filter(lambda text: not text.startswith(("/", "~")))
PLACES = st.sampled_from([
    "run", "all", "adapter", "model", "rows.jsonl", "prompts.txt", "plan.yaml", "run/config.yaml", "run/result.json",
    "nowhere", "no/where", "out", "out/x", "rows.jsonl/x", ".", "", "run/adapter", "run/checkpoints/checkpoint-1",
    "x" * 300, "x/" * 3000, "\udcff", "ü", "日本", "a\0b", "a b", "a,b", "[x]", "{a:1}", "${x}", "-", "gsm8k",
    "word_problems", "smollm2-135m", "llama-3-8b", "owner/name", "owner/name/x",
])  # fmt: skip
NUMBERS = st.sampled_from([
    "0", "1", "2", "-1", "0.5", "1e3", "1e400", "-0.0", "nan", "inf", "1" * 400, "0x10", "1_0", "1,2", "٣", "9" * 5000,
    "true", "false", "null", "None", "auto", "[]", "[1,2]", "{}", "{a:1}", "''", '"x"', "range(3)", "choice(1,2)",
])  # fmt: skip
LARGE = st.sampled_from([str(10**9), str(2**63), str(10**30)])
LENGTHS = ("iters", "steps", "epochs", "passes", "tokens", "size", "threads", "length")
"""What a setting or an option is called that says how long the work is: it may be as long as it says."""
WORDS = st.sampled_from([
    "", "-", "--", "=", "a=b=c", "~x", "+x=1", "++peft.r=1", "x", "-x", "--x", "--help", "-h", "@x", "peft", "peft.r",
    "=1", "peft.=1", ".r=1", "peft.r=", "-m", "--dry-run", "--version",
])  # fmt: skip


@cache
def names() -> list[str]:
    """All settings, those of single entries included, and all groups."""
    own = {
        f"{name}.{key.name}"
        for name, group in OPEN_GROUPS.items()
        for field in group.opens
        for keys in group.own_keys(field).values()
        for key in keys
    }
    return sorted({*KEYS, *groups(), *own})


@cache
def options(name: str) -> list[Action]:
    """What a command takes beside its settings."""
    parsers = Parser().add_subparsers()
    module = next(each for each in COMMANDS if each.__name__.endswith(f".{name}"))
    return [action for action in module.add_parser(parsers)._actions if action.option_strings]


@st.composite
def values(draw: st.DrawFn, name: str) -> str:
    kinds = [NUMBERS, PLACES, TEXTS, st.sampled_from(EXPRESSIONS)]
    if not any(name.endswith(length) for length in LENGTHS):
        kinds.append(LARGE)
    if name in groups():
        kinds += [st.sampled_from(groups()[name])] * 4
    return draw(st.one_of(*kinds))


@st.composite
def more(draw: st.DrawFn, name: str) -> list[str]:
    """A word or two for a command."""
    kind = draw(st.sampled_from(["setting", "setting", "setting", "option", "option", "place", "word", "text"]))
    if kind == "setting":
        key = draw(st.sampled_from(names()))
        return [f"{key}={draw(values(key))}"]
    if kind == "option":
        action = draw(st.sampled_from(options(name)))
        option = draw(st.sampled_from(action.option_strings))
        given = [] if action.nargs == 0 and draw(st.integers(0, 9)) else [draw(values(option))]
        return [option, *given] if draw(st.booleans()) else ["=".join([option, *given])]
    return [draw({"place": PLACES, "word": WORDS, "text": TEXTS}[kind])]


@st.composite
def lines(draw: st.DrawFn) -> list[str]:
    name = draw(st.sampled_from(sorted(LINES)))
    line = list(LINES[name])
    for _ in range(draw(st.integers(1, 4))):
        at, way = draw(st.integers(0, len(line))), draw(st.sampled_from(["in", "in", "in", "over", "out", "twice"]))
        if way == "in":
            line[at:at] = draw(more(name))
        elif way == "over":
            line[at : at + 1] = draw(more(name))
        elif way == "out":
            del line[at : at + 1]
        else:
            line[at:at] = line[at : at + 1]
    return [name, *line, *_safe(name, line)]


def _safe(name: str, line: list[str]) -> list[str]:
    """What keeps a line from long work, from places beside the working folder and from ports of others."""
    if name == "train":
        swept = {"-m", "--multirun"} & set(line)
        return ["--dry-run"] if swept or len(repr(line)) % 8 else ["train.steps=1", "run_dir=out"]
    if name == "doctor":
        return ["--quick"]
    return ["--port", "0"] if "--serve" in line else []


# ---- what becomes of them --------------------------------------------------------------------------------------------

MADE = ("out", "cache", ".cache", "runs", "all/comparison", "all/.locks", "run/report.html")
"""How the names of files begin that commands write, and readers of runs write anew."""


def held(line: list[str]) -> None:
    before = kept()
    ended = command(line, "Hello?\n")
    works = line[0] in ("train", "compare", "plan", "eval")
    assert ended.seconds < SECONDS + (WORK if works else 0), (line, ended.seconds)
    after = kept()
    assert [name for name in before if before[name] != after.get(name)] == [], line
    _clear()


def kept() -> dict[str, bytes]:
    return {name: held for name, held in files_of(Path.cwd()).items() if not name.startswith(MADE)}


@settings(BUDGET, max_examples=QUICK)
@given(lines())
def test_odd_command_lines_are_carried_out_or_refused(line: list[str]) -> None:
    held(line)


@pytest.mark.slow
def test_many_odd_command_lines_are_carried_out_or_refused() -> None:
    many(lines(), held, 1_000)
