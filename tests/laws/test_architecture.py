"""The tree of the house: imports go down only, files stay short, and importing the package stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from toys.places import ROOT

PACKAGE = ROOT / "src" / "lorafa"
FILES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = ("src", "tests", "benchmarks", "recipes")
ALL_FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
MAX_LINES = 400

LEVELS = (
    ("errors", "version"),
    ("registry", "linalg", "checks", "storage", "fingerprint", "modes"),
    ("functional", "adapter", "backends", "losses", "calibration"),
    ("variants", "initializers", "method_configs", "config_checks"),
    ("config", "layers"),
    ("surgery",),
    ("io", "optimizers", "alignment"),
    ("peft_model", "statistics", "starting", "loftq_weights", "eva_weights", "preprocess", "ranks"),
    ("data", "train", "evals"),
    ("conf", "runs"),
    ("report",),
    ("cli",),
)
"""Top-level names of the package, from the bottom up; a module imports from its own level and those before it here."""
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
HEAVY = {
    *("transformers", "tokenizers", "datasets", "accelerate", "hydra", "omegaconf"),
    *("matplotlib", "jinja2", "bitsandbytes", "torchao", "gguf", "peft"),
}


def _top(module: str) -> str:
    """``lorafa.data.chat`` -> ``data``; the package itself -> an empty text."""
    return module.partition(".")[2].partition(".")[0]


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of the package, those inside functions included, those for types only left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in (node for node in ast.walk(tree) if id(node) not in for_types):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the full name"
            if node.module == "lorafa":
                yield from ((node.lineno, f"lorafa.{alias.name}") for alias in node.names)
            elif node.module and node.module.startswith("lorafa."):
                yield node.lineno, node.module
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "lorafa")


def _name(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_module_has_a_level() -> None:
    names = {_name(path) for path in FILES} - {"__init__", "__main__"}
    assert names - LEVEL_OF.keys() == set(), "give the new module its place in LEVELS"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    own = LEVEL_OF.get(_name(path), len(LEVELS))  # the package's __init__ stands above all
    upward = [
        f"line {line}: {module}" for line, module in _imports(path) if LEVEL_OF.get(_top(module), len(LEVELS)) > own
    ]
    assert upward == []


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def _loaded_by(statement: str) -> set[str]:
    """Top-level modules a fresh interpreter has loaded after the statement."""
    code = f"import sys; {statement}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("statement", ["import lorafa", "import lorafa.cli.main"])
def test_importing_the_package_loads_torch_and_nothing_of_the_training_stack(statement: str) -> None:
    assert _loaded_by(statement) & HEAVY == set()
