"""The examples of README, CONTRIBUTING and docs: code runs, commands run or have settings that the command takes.

A block that is not to be run has a line ``<!-- not run: reason -->`` before it. What a page's code takes for granted,
a model or a file, stands in one table each below.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

import lorafa
from lorafa.chat.loading import ask_for
from lorafa.cli import chat, generate
from lorafa.cli.eval import settings_of
from lorafa.cli.main import main, parse
from lorafa.cli.train import longer_of
from lorafa.conf.compose import compose, options
from lorafa.data.nbest import read_nbest
from lorafa.data.unanswered import prompts_of
from lorafa.inspection.updates import updates_of
from lorafa.io.adapter_files import read_adapter
from lorafa.models.load import resolve_model
from lorafa.runs.adapters import adapter_in
from lorafa.runs.record import RunDirectory
from lorafa.runs.subjects import find
from lorafa.runs.sweep import points_of, split
from lorafa.scripts import published
from lorafa.scripts.eval_gsm8k import parse as parse_evaluation
from lorafa.scripts.run_exp import compose_published
from lorafa.scripts.run_exp import parse as parse_script
from lorafa.train.adapter_config import lora_config
from toys.examples import tiny
from toys.kinds import make_t5
from toys.language_models import SMALL, llama
from toys.layouts import write
from toys.places import ROOT
from toys.recipes import plan_of, recipe
from toys.records import write_rows
from toys.runs import make_run
from toys.workplace import make_workplace

PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
RUN = ("python", "sh")
DATA = ("", "text", "yaml", "json")
"""Languages of blocks that show what is printed or written."""
NOT_RUN = 1
"""How many blocks are marked as not to be run."""


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str
    excuse: str | None
    """Why it is not to be run; None where it is."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    fenced = re.compile(r"^(?:<!-- not run: (.+?) -->\n+)?```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
    return [
        Block(page, text[: match.start(3)].count("\n") + 1, match[2], match[3], match[1])
        for match in fenced.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUNNING = [block for block in BLOCKS if block.excuse is None]
COMMANDS = list(
    dict.fromkeys(
        tuple(words)
        for block in RUNNING
        if block.language == "sh"
        for line in block.text.replace("\\\n", " ").splitlines()
        if (words := shlex.split(line, comments=True))
    )
)
"""The words of every command in a block."""
INLINE = [
    tuple(shlex.split(text))
    for page in PAGES
    if page != "docs/LOG.md"  # what was run then
    for text in re.findall(r"`((?:lorafa|python) [^`\n]*=[^`\n]*|python [^`\n]*)`", (ROOT / page).read_text())
    if tuple(shlex.split(text)) not in COMMANDS
]
"""Those in the text that no block has, where they have a setting or run a file."""


# ---- what examples take for granted


def _base() -> Any:
    return llama(hidden_size=32, intermediate_size=48)


def _teacher() -> Any:
    model = _base()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    return model


def _adapted() -> Any:
    return lorafa.get_peft_model(_base(), lorafa.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))


def _rows() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(SMALL["vocab_size"], (16, 8), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def _batches() -> list[dict[str, Any]]:
    return [{name: torch.tensor([values]) for name, values in row.items()} for row in _rows()[:4]]


NAMES: dict[str, dict[str, Callable[[], Any]]] = {
    "docs/alignment.md": {"model": _adapted, "batches": _batches, "rows": _rows},
    "docs/combining.md": {"base": _base},
    "docs/inspecting.md": {"model": _adapted},
    "docs/loading.md": {"base": _base},
    "docs/merging.md": {"model": _adapted},
    "docs/optimizers.md": {"model": _adapted, "rows": _rows},
    "docs/peft.md": {
        "model": _adapted,
        "batches": _batches,
        "optimizer": lambda: _Later(lambda names: torch.optim.AdamW(names["model"].parameters())),
    },
    "docs/reliability.md": {"base": _base},
    "docs/starts.md": {"base": _base, "batches": _batches, "teacher": _teacher},
}
"""Page -> the names its code begins with: a base model, a model with an adapter, rows, batches and an optimizer, small
enough for a test. A page that shows how they are made is not in the table."""
FILES = {
    "path/to/model": "a model folder: the reader's own",
    "path/to/t5": "another one: an encoder with a decoder",
    "mine.jsonl": "records of the reader's own",
    "mine.txt": "a text of the reader's own",
    "reviews.jsonl": "texts, each with its class",
    "lists.jsonl": "n-best lists",
    "heldout.jsonl": "others of them",
    "more.csv": "more of them",
    "pairs.jsonl": "prompts with a better and a worse answer",
    "judged.jsonl": "prompts with an answer that is judged",
    "short.jsonl": "the short problems of GSM8K, which come from the Hub (recipes/short_problems.py)",
    "sql": "an adapter of the reader's own",
    "poems": "another one, of the same base",
    "recipes": "the folder of the repository",
    "runs/20260101-120000-lora-r16": "a run of the reader's own, of which the adapter is there",
    "adapters": "an adapter as mlx_lm.lora writes it",
    "runs/first": "a finished run, with all that a report reads",
    "runs/second": "another one",
}
"""What lies in the folder where the examples run, and what it stands for."""
PLANNED = [("lorafa", "plan", "model=path/to/model"), ("lorafa", "plan", "model=opt-125m")]
"""The beginnings of plans that run: they need no weights of a model that is fetched."""
SCRIPT, EVALUATION = "run_exp.py", "eval_gsm8k.py"
VARIABLE, VARIABLES = re.compile(r"\$(\w+)"), {"runname": "one", "iters": "8"}
"""The published scripts, and variables of the shell in its commands."""
MODULES = {"trl": "not installed for the tests; its SFTTrainer is a transformers.Trainer, as the one here"}
"""Modules that examples import and the tests stand in for."""


@dataclass(frozen=True)
class _Later:
    """A name that is made of the others."""

    make: Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all of ``FILES``; the model is wide enough for the ranks of the examples."""
    made = make_workplace(
        tmp_path_factory.mktemp("examples"), hidden_size=64, intermediate_size=96, num_key_value_heads=4
    )
    (made / "path" / "to").mkdir(parents=True)
    (made / "model").rename(made / "path" / "to" / "model")
    make_t5(made)
    (made / "model").rename(made / "path" / "to" / "t5")
    (made / "rows.jsonl").unlink()
    rows = [
        {"question": f"Ann has {a} apples and gets {b} more. How many?", "answer": f"{a} + {b}\n#### {a + b}"}
        for a in range(2, 12)
        for b in range(1, 11)
    ]
    for name in ("mine.jsonl", "short.jsonl"):
        (made / name).write_text("\n".join(map(json.dumps, rows)))
    write_rows(made / "more.csv", rows)
    (made / "mine.txt").write_text("Ann has 3 apples.")
    reviews = [{"prompt": f"film {at} is {word}", "completion": word} for at in range(10) for word in ("good", "bad")]
    (made / "reviews.jsonl").write_text("\n".join(map(json.dumps, reviews)))
    listed = {"hypotheses": [{"text": text, "score": 1.0} for text in ("a cat", "a hat")], "reference": "a cat"}
    for name in ("lists.jsonl", "heldout.jsonl"):
        write_rows(made / name, [listed])
    preferred = [{"prompt": row["question"], "chosen": row["answer"], "rejected": "No."} for row in rows]
    write_rows(made / "pairs.jsonl", preferred)
    judged = [{"prompt": row["question"], "completion": row["answer"], "label": row["answer"] < "5"} for row in rows]
    write_rows(made / "judged.jsonl", judged)
    (made / "recipes").symlink_to(ROOT / "recipes")
    model = transformers.AutoModelForCausalLM.from_pretrained(made / "path" / "to" / "model")
    lorafa.get_peft_model(model, lorafa.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")).save_pretrained(
        made / "runs" / "20260101-120000-lora-r16" / "adapter"
    )
    for name in ("sql", "poems"):
        shutil.copytree(made / "runs" / "20260101-120000-lora-r16" / "adapter", made / name)
    RunDirectory.create(made / "runs" / "20260101-120000-lora-r16", compose(["model=path/to/model"]))
    for number, name in enumerate(("first", "second")):
        make_run(made / "runs" / name, loss=1.0 + number, rank=8 + number)
    layers = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    factors = {f"{layer}.lora_a": torch.ones(32, 4) for layer in layers}
    factors |= {f"{layer}.lora_b": torch.ones(4, 32) for layer in layers}
    numbers = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0}}
    write(made / "adapters", factors, numbers, "adapters.safetensors")
    assert {path.name for path in made.iterdir()} == {name.partition("/")[0] for name in FILES}
    return made


@pytest.fixture
def there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


# ---- blocks


def test_blocks_are_in_languages_that_are_run_or_show_data() -> None:
    assert {block.language for block in BLOCKS} <= {*RUN, *DATA}


def test_what_is_not_run_is_counted() -> None:
    assert len([block for block in BLOCKS if block.excuse is not None]) == NOT_RUN


@pytest.mark.parametrize("page", sorted({block.page for block in RUNNING if block.language == "python"}))
def test_the_code_of_a_page_runs_in_order(page: str, there: None, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = ModuleType("trl")
    stand_in.SFTTrainer = transformers.Trainer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trl", stand_in)
    names = {name: make() for name, make in NAMES.get(page, {}).items()}
    names |= {name: value.make(names) for name, value in names.items() if isinstance(value, _Later)}
    for block in RUNNING:
        if block.page == page and block.language == "python":
            lines = "\n" * (block.line - 1)  # an error names the line of the page
            exec(compile(lines + block.text, str(ROOT / page), "exec"), names)


def test_what_examples_take_for_granted_is_what_they_use() -> None:
    for page, names in NAMES.items():
        text = "\n".join(block.text for block in RUNNING if block.page == page and block.language == "python")
        assert [name for name in names if not re.search(rf"\b{name}\b", text)] == []
    everything = "\n".join(block.text for block in RUNNING)
    assert [name for name in [*FILES, *MODULES] if name not in everything] == []


# ---- commands


def composed(words: tuple[str, ...]) -> None:
    """The settings of a command by the way the command itself takes them."""
    if SCRIPT in words:
        said = [VARIABLE.sub(lambda name: VARIABLES[name[1]], word) for word in words[words.index(SCRIPT) + 1 :]]
        args = parse_script(said)
        for point in points_of(args.overrides, published.options):
            lora_config(compose_published(point.words)[1])
        return
    if words[0] == EVALUATION:
        parse_evaluation([VARIABLE.sub(lambda name: VARIABLES[name[1]], word) for word in words[1:]])
        return
    args = parse(words[1:])
    if words[1] == "train" and args.multirun:
        for point in points_of(split(args.overrides)[0], options):
            lora_config(compose(point.words))
        return
    if words[1] == "compare":
        plan_of(args.plan)
        compose(args.overrides)
        return
    config = compose(args.overrides)
    lora_config(config)
    if config.train.resume:
        longer_of(args.overrides, config)


LAUNCHERS: dict[str, Callable[[], Any]] = {"torchrun": get_args_parser, "accelerate": launch_command_parser}
"""What reads the words of a command that starts several processes."""


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_runs_or_its_settings_are_those_of_the_command(
    words: tuple[str, ...], there: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if words[0] == "make":
        for target in words[1:]:
            subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)
    elif "--help" in words:
        with pytest.raises(SystemExit) as stopped:
            main(list(words[1:]))
        assert stopped.value.code == 0
    elif words[:2] == ("lorafa", "run") or "lorafa.compat" in words:
        assert "train.py" in words  # the reader's own; tests/unit/compat runs scripts
    elif words[0] in LAUNCHERS:
        launched = LAUNCHERS[words[0]]().parse_args(list(words[1 + (words[0] == "accelerate") :]))
        started, rest = launched.training_script, launched.training_script_args
        assert (launched.module, started) in ((True, "lorafa.cli.main"), (False, EVALUATION))
        composed((EVALUATION if started == EVALUATION else "lorafa", *rest))
    elif words[:2] in {("lorafa", name) for name in ("params", "report", "combine", "doctor")} or words[:3] in PLANNED:
        assert main([*words[1:], *(["--quick"] if words[1] == "doctor" else [])]) == 0
    elif words[:2] in {("lorafa", "export"), ("lorafa", "merge")}:
        at = words.index("--out") + 1
        assert main([*words[1:at], str(tmp_path / words[at]), *words[at + 1 :]]) == 0
    elif words[:2] == ("python", "recipes/rescoring.py"):
        read = recipe("rescoring").parse(words[2:])
        assert read_nbest(read.train)
        assert read_nbest(read.heldout)
    elif words[:2] == ("lorafa", "eval"):
        args = parse(words[1:])
        settings_of([find(word) for word in args.overrides if "=" not in word], [w for w in args.overrides if "=" in w])
    elif words[:2] == ("lorafa", "inspect"):
        args = parse(words[1:])
        for name in (args.adapter, args.other):
            assert name is None or updates_of(read_adapter(adapter_in(name)))
        assert args.base is None or resolve_model(args.base)
        assert args.text is None or Path(args.text).is_file()
    elif words[:2] == ("lorafa", "generate"):
        generate.settings_of((args := parse(words[1:])).overrides)
        generate.answering(args)
        find(args.subject, args.base)
        assert prompts_of(args.file)
    elif words[:2] == ("lorafa", "chat"):
        chat.options_of(args := parse(words[1:]))
        assert ask_for(args.adapters, args.base, args.dtype, args.template).names
    else:
        known = words[:2] in {("lorafa", "train"), ("lorafa", "compare"), ("lorafa", "plan")} or SCRIPT in words
        assert known, "no way to check this command: add one"
        composed(words)


@pytest.mark.parametrize("words", INLINE, ids=" ".join)
def test_a_command_in_the_text_names_files_and_settings_that_are_there(words: tuple[str, ...], there: None) -> None:
    if words[0] == "lorafa":
        composed(words)
        return
    script = ROOT / words[1]
    known = script.read_text() + (script.parent / "harness.py").read_text()
    assert [word for word in words if word.startswith("--") and f'"{word}"' not in known] == []


TRAINED = [
    words for words in COMMANDS if words[:2] == ("lorafa", "train") and not {"--help", "--dry-run"} & {*words}
    and not any(word.startswith("train.resume=") for word in words) and "-m" not in words  # a run each, elsewhere
]  # fmt: skip


def test_the_command_for_one_s_own_model_and_records_trains(there: None, tmp_path: Path) -> None:
    own = next(words for words in TRAINED if "model=path/to/model" in words and "data=mine.jsonl" in words)
    assert main(tiny(own, tmp_path / "run")) == 0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("words", TRAINED, ids=" ".join)
def test_every_command_that_trains_trains(words: tuple[str, ...], there: None, tmp_path: Path) -> None:
    if any(word.startswith("objective=") for word in words):
        pytest.importorskip("trl")
    assert main(tiny(words, tmp_path / "run")) == 0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
