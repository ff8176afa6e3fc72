"""The notebooks under examples/: committed without outputs, no dead link, and they run from top to bottom."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from toys.places import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
BY_NAME = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def test_there_are_three_and_pages_link_to_them() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["compare_methods", "first_adapter", "guide_by_a_teacher"]
    for page in ("README.md", "docs/index.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert [path.name for path in NOTEBOOKS if f"examples/{path.name})" not in text] == []


@BY_NAME
def test_a_notebook_is_committed_without_what_it_printed(path: Path) -> None:
    assert cells(path, "code")
    for cell in cells(path, "code"):
        assert (cell["outputs"], cell["execution_count"], cell["metadata"]) == ([], None, {})


@BY_NAME
def test_a_notebook_links_to_files_and_headings_that_are_there(path: Path) -> None:
    text = "\n".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    links = re.findall(r"\]\(([^)#\s]+)(?:#([^)]+))?\)", text)
    assert links
    for name, heading in links:
        target = (path.parent / name).resolve()
        assert target.is_file(), name
        titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert not heading or heading in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.slow
@BY_NAME
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    inherited = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(part for part in (str(ROOT / "src"), inherited) if part))
    monkeypatch.setenv("PATH", os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    place = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(book, timeout=600, kernel_name="python3", resources=place)
    client.execute()  # raises with the cell and its traceback
    shown = [cell for cell in book.cells if cell.cell_type == "code" and cell.outputs]
    assert shown
