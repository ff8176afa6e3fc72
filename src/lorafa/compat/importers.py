"""Which line of a program brought a module in."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType


def line_that_imported(name: str) -> str:
    """ " by line 3 of train.py (`from trl import SFTTrainer`)" of the running program; "" where none can be named.

    The first import is named that is of the module itself, or of a package that holds something of it.
    """
    main = sys.modules.get("__main__")
    path = getattr(main, "__file__", None)
    if not path:
        return ""
    holders = {name, *_holders(name)}
    for line, package in _imports(Path(path)):
        if package in holders:
            text = Path(path).read_text(encoding="utf-8").splitlines()[line - 1].strip()
            return f" by line {line} of {path} (`{text}`)"
    return ""


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.partition(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append((node.lineno, node.module.partition(".")[0]))
    yield from sorted(found)


def _holders(name: str) -> set[str]:
    """Packages with a module that has the module, or something defined in it, among its own names."""
    return {
        other.partition(".")[0]
        for other, module in list(sys.modules.items())
        if isinstance(module, ModuleType) and other.partition(".")[0] != name and _holds(module, name)
    }


def _holds(module: ModuleType, name: str) -> bool:
    for value in list(vars(module).values()):
        home = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        if isinstance(home, str) and home.partition(".")[0] == name:
            return True
    return False
