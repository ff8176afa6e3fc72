"""docs/map.md is true: every folder and file it should name is there, and every name it gives is in its file."""

from __future__ import annotations

import ast
import re
from functools import cache

from toys.places import ROOT

PACKAGE = ROOT / "src" / "lorafa"
PAGE = (ROOT / "docs" / "map.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"`([^`\n]+)`", PAGE)
PATHS = [text for text in QUOTED if "/" in text or text.endswith(".py")]
NAME = r"[A-Za-z_][\w.]*"
NAMED = [
    (name, path)
    for names, path in re.findall(rf"((?:`{NAME}`(?:, | and )?)+) \(`([\w/]+\.py)`\)", PAGE)
    for name in re.findall(rf"`({NAME})`", names)
]
"""(name, file): "`fitting` (`io/load.py`)", or several names before one file."""


@cache
def names_in(path: str) -> frozenset[str]:
    """What a file defines: functions, classes and constants, and the methods of each class as Class.method."""
    found = set()
    for node in ast.parse((PACKAGE / path).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{one.name}" for one in node.body if isinstance(one, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return frozenset(found)


def rooms() -> list[list[str]]:
    """What each line of the table of rooms is about."""
    table = PAGE.partition("## The rooms")[2].partition("\n## ")[0]
    lines = [re.findall(r"`([^`]+)`", line.partition(" | ")[0]) for line in table.splitlines()]
    return [line for line in lines if line]


def test_every_folder_and_every_file_at_the_top_has_a_place_on_the_map() -> None:
    folders = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    assert {room for line in rooms() for room in line} == folders | {path.name for path in PACKAGE.glob("*.py")}


def test_a_line_of_the_map_imports_from_itself_and_the_lines_above_it() -> None:
    line_of = {room.removesuffix(".py").rstrip("/"): number for number, line in enumerate(rooms()) for room in line}
    upward = set()
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = (getattr(node, "module", None) or "").split(".") if isinstance(node, ast.ImportFrom) else []
            if parts[:1] == ["lorafa"] and len(parts) > 1 and line_of[parts[1]] > line_of[room]:
                upward.add((room, parts[1]))
    assert upward == set()


def test_every_path_on_the_map_exists() -> None:
    def exists(path: str) -> bool:
        place = (ROOT if path.startswith("src/") else PACKAGE) / path
        return place.is_dir() if path.endswith("/") or path == "src/lorafa" else place.is_file()

    assert [path for path in sorted(set(PATHS)) if not exists(path)] == []


def test_every_name_on_the_map_is_in_the_file_beside_it() -> None:
    assert [(name, path) for name, path in sorted(set(NAMED)) if name not in names_in(path)] == []


def test_every_name_on_the_map_stands_with_its_file() -> None:
    alone = {text for text in QUOTED if re.fullmatch(NAME, text) and text not in PATHS}
    assert alone - {name for name, _ in NAMED} == set()
    assert len(set(NAMED)) > 40  # the patterns above still find them
