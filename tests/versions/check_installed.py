"""What `pip install lorafa[train]` gives works as installed: no source is on the path. Run by try_versions.py alone."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import lorafa
from lorafa.cli.main import COMMANDS, Parser
from toys.workplace import make_workplace, settings

LORAFA = Path(sysconfig.get_path("scripts")) / "lorafa"
NAMES = sorted(Parser().add_subparsers().choices or ()) or [module.__name__.rpartition(".")[2] for module in COMMANDS]


def command(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command as pip has put it beside the interpreter."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.run([str(LORAFA), *words], capture_output=True, text=True, cwd=cwd, env=environment, check=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training from the command line, with ``model/`` beside it."""
    place = make_workplace(tmp_path_factory.mktemp("work"))
    done = command("train", *settings(place, place / "run"))
    assert done.returncode == 0, done.stdout + done.stderr
    return place / "run"


def test_the_package_is_the_installed_one() -> None:
    assert Path(lorafa.__file__).is_relative_to(Path(sysconfig.get_path("purelib")))
    assert importlib.metadata.version("lorafa") == lorafa.__version__


def test_every_public_name_is_there() -> None:
    assert [name for name in lorafa.__all__ if getattr(lorafa, name) is None] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_command_explains_itself(name: str) -> None:
    done = command(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: lorafa {name}")


def test_a_training_writes_adapter_result_and_page(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "finished", result
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert "<svg" in (run / "report.html").read_text()


def test_pages_of_runs_and_of_an_adapter_are_made_of_the_package_s_files(run: Path, tmp_path: Path) -> None:
    done = command("report", str(run), "--page", str(tmp_path / "runs.html"))
    assert done.returncode == 0, done.stderr
    done = command("inspect", str(run), "--page", str(tmp_path / "look.html"))
    assert done.returncode == 0, done.stderr
    assert all("<html" in (tmp_path / name).read_text() for name in ("runs.html", "look.html"))
    assert "<html" in importlib.resources.files("lorafa.chat").joinpath("chat.html").read_text()


def test_an_adapter_is_merged_and_exported(run: Path, tmp_path: Path) -> None:
    done = command("merge", str(run), "--base", str(run.parent / "model"), "--out", str(tmp_path / "merged"))
    assert done.returncode == 0, done.stderr
    done = command("export", str(run), "--for", "gguf", "--out", str(tmp_path / "gguf"))
    assert done.returncode in (0, 1), done.stderr


def test_a_published_script_reads_its_settings() -> None:
    code = "from lorafa.scripts.run_exp import main; main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "+peft=" in done.stdout


def test_a_script_runs_by_peft_s_name(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import peft, lorafa\nassert peft.LoraConfig is lorafa.LoraConfig\nprint(peft.__version__)\n")
    done = command("run", str(script))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
