"""What works where only the declared dependencies are installed, without ``lorafa[train]``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from lorafa.cli.main import EXTRA
from toys.places import ROOT

PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")

COMMAND = "import sys\nfrom lorafa.cli.main import main\nsys.exit(main(sys.argv[1:]))\n"
USE = """
import sys
import torch
from lorafa import LoraConfig, PeftModel, get_peft_model

def base():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))

model = get_peft_model(base(), LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights="pissa"))
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
x = torch.randn(5, 6)
model(x).square().mean().backward()
optimizer.step()
model.save_pretrained(sys.argv[1])
assert torch.equal(PeftModel.from_pretrained(base(), sys.argv[1])(x), model(x))
model.merge_and_unload()
import lorafa
for name in lorafa.__all__:
    getattr(lorafa, name)
"""


def declared(lines: str) -> set[str]:
    """Names in a list of requirements of pyproject.toml."""
    return {_plain(name) for name in re.findall(r'"([A-Za-z0-9._-]+)[^"]*"', lines)}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


BASE = declared(re.search(r"^dependencies = \[(.*?)\]", PYPROJECT, re.MULTILINE | re.DOTALL)[1])  # type: ignore[index]
TRAIN = declared(re.search(r"^train = \[(.*?)\n\]", PYPROJECT, re.MULTILINE | re.DOTALL)[1])  # type: ignore[index]


def brought(names: set[str]) -> set[str]:
    """These distributions and all that they require, extras apart."""
    found: set[str] = set()
    while names - found:
        name = (names - found).pop()
        found.add(name)
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of another platform
            continue
        names = names | {_plain(re.split(r"[^\w.-]", line)[0]) for line in required if "extra ==" not in line}
    return found


def modules_of(distributions: set[str]) -> set[str]:
    table = metadata.packages_distributions().items()
    return {module for module, owners in table if distributions & {_plain(owner) for owner in owners}}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the declared dependencies alone, by links into this environment."""
    folder = tmp_path_factory.mktemp("packages")
    for name in brought(BASE):
        try:
            files = metadata.files(name) or []
        except metadata.PackageNotFoundError:
            continue
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            source = Path(str(metadata.distribution(name).locate_file(top)))
            (folder / top).symlink_to(source, target_is_directory=source.is_dir())
    return folder


def run(packages: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT / "src"), str(packages)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", "-c", program, *arguments]  # -S: without what else is installed
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_library_trains_saves_and_loads(packages: Path, tmp_path: Path) -> None:
    done = run(packages, USE, str(tmp_path / "adapter"))
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [(["--version"], "lorafa "), (["--help"], "usage: lorafa"), (["params", "--help"], "usage: lorafa params")],
)
def test_version_and_help_are_answered(packages: Path, arguments: list[str], answer: str) -> None:
    done = run(packages, COMMAND, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(answer)


@pytest.mark.parametrize("command", ["train", "train --help", "report x", "params", "compare a b"])
def test_a_command_says_in_one_sentence_what_to_install(packages: Path, command: str) -> None:
    done = run(packages, COMMAND, *command.split())
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: The commands need packages that are not installed \(.*\brich\b.*\)\. "
        r"Run: pip install lorafa\[train\]\n",
        done.stderr,
    )
    assert done.stdout == "" or done.stdout.startswith("usage: lorafa train")


def test_what_commands_need_is_what_the_extra_brings() -> None:
    installed = {_plain(str(found.metadata["Name"])) for found in metadata.distributions()}
    assert installed >= TRAIN
    for distribution in TRAIN:
        assert modules_of({distribution}) & set(EXTRA), distribution
    assert set(EXTRA) <= modules_of(TRAIN | {"omegaconf"})  # Hydra's
