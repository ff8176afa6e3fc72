"""docs/from-others.md: every setting of lorafa that stands beside one of another tool is composed."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from lorafa.cli.main import COMMANDS
from lorafa.conf.compose import compose
from lorafa.errors import LoraError
from lorafa.train.adapter_config import lora_config
from lorafa.train.settings.run import RunConfig
from toys.places import ROOT

PAGE = (ROOT / "docs" / "from-others.md").read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in PAGE.split("\n## ")[1:]}
ROWS = [
    (tool, *(cell.strip() for cell in line.split("|")[1:-1]))
    for tool, part in SECTIONS.items()
    for line in part.splitlines()
    if line.startswith("| ") and not line.startswith(f"| {tool} |")
]
OURS = list(dict.fromkeys(text for _, _, ours, _ in ROWS for text in re.findall(r"`([^`]+)`", ours)))


def check(text: str) -> None:
    """Raise unless lorafa has a command, or a setting, or takes the settings with the values."""
    words = shlex.split(text)
    if words[0] == "lorafa":
        assert words[1] in {command.__name__.rpartition(".")[2] for command in COMMANDS}
    elif "=" not in text:
        group, _, name = text.partition(".")
        config: Any = getattr(RunConfig(), group)
        assert is_dataclass(config)
        assert name in {field.name for field in fields(config)}
    else:
        lora_config(compose(words))


@pytest.mark.parametrize("text", OURS)
def test_what_stands_beside_another_tools_setting_is_one_of_ours(text: str) -> None:
    check(text)


@pytest.mark.parametrize("text", ["peft.rank=8", "peft.no_such", "model.quantize=bnb3", "optim=adamw_8bit"])
def test_what_is_none_of_ours_is_found(text: str) -> None:
    with pytest.raises((LoraError, AssertionError)):
        check(text)


@pytest.mark.parametrize("tool", ["Unsloth", "LLaMA-Factory", "axolotl"])
def test_each_tool_has_a_command_a_table_and_what_has_no_counterpart(tool: str) -> None:
    part = SECTIONS[tool]
    assert part.count("```sh\nlorafa train ") == 1  # tests/integration/test_documents.py runs it
    assert len([row for row in ROWS if row[0] == tool]) > 20
    assert "Without a counterpart: " in part


def test_a_row_has_a_setting_of_theirs_and_one_of_ours_or_says_why_not() -> None:
    for _, theirs, ours, said in ROWS:
        assert theirs
        assert ours or said, theirs
