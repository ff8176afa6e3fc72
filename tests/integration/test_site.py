"""The site of documentation: nothing public is missing from it, no link in it is dead, and a browser can read it."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import lorafa
from toys.chromium import dom
from toys.places import ROOT

SITE = ROOT / "docs" / "site"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"site_{name}", SITE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


make_site, pictures = script("make_site"), script("pictures")


def test_every_page_of_the_repository_is_in_the_contents() -> None:
    listed = {page for pages in make_site.SECTIONS.values() for page in pages}
    pages = {f"docs/{path.stem}" for path in (ROOT / "docs").glob("*.md")} | {"README", "CONTRIBUTING", "CHANGELOG"}
    assert pages | {f"reference/{module}" for module in make_site.PARTS} == listed


@pytest.mark.parametrize("module", make_site.PARTS)
def test_every_public_name_is_in_the_reference_with_a_docstring(module: str) -> None:
    page = make_site.reference(module)
    names = make_site.public_names(module)
    assert names
    assert re.findall(r"^## (\w+)$", page, flags=re.MULTILINE) == sorted(names, key=str.lower)
    loaded = importlib.import_module(module)
    assert [name for name in names if callable(getattr(loaded, name)) and not getattr(loaded, name).__doc__] == []


def test_the_reference_has_all_that_lorafa_offers() -> None:
    assert set(make_site.public_names("lorafa")) == {name for name in lorafa.__all__ if not name.startswith("_")}


def test_a_link_to_a_folder_of_results_goes_to_the_page_in_it() -> None:
    link = make_site._LINK.search("[the run](docs/results/demo)")
    assert make_site._to_file(link, ROOT) == "](docs/results/demo/report.html)"
    other = make_site._LINK.search("[starts](docs/starts.md#ranks)")
    assert make_site._to_file(other, ROOT) == "](docs/starts.md#ranks)"


def test_the_figures_of_the_picture_are_those_of_the_page_of_benchmarks() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    figures = json.loads((ROOT / "docs" / "results" / "end_to_end.json").read_text(encoding="utf-8"))
    training = figures["whole_training"]
    for name in ("tokens_per_second", "peak_mib", "heldout_loss"):
        row = training[name]
        assert f"{row['lorafa']:,}" in page
        assert f"{row['PEFT']:,}" in page
    assert training["command"] in page
    assert figures["training_step"]["command"] in page


def test_the_committed_picture_is_that_of_the_figures(tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.svg"
    pictures.draw_beside_peft(drawn)
    texts = [re.findall(r"<text[^>]*>([^<]+)</text>", path.read_text(encoding="utf-8")) for path in (
        drawn, ROOT / "docs" / "pictures" / "beside-peft.svg",
    )]
    assert texts[0] == texts[1]
    assert "2.74" not in texts[0]  # the bars say both figures, not their ratio
    assert {"208", "76"} <= set(texts[0])


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_a_browser_shows_and_searches_it(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    built = subprocess.run([sys.executable, SITE / "make_site.py"], capture_output=True, text=True, cwd=ROOT)
    assert built.returncode == 0, built.stderr[-4000:]
    address = (ROOT / "build" / "docs" / "html").as_uri()
    assert "Read this first" in dom(f"{address}/index.html", tmp_path)
    assert "rescale_adapter_scale" in dom(f"{address}/reference/lorafa.html", tmp_path)
    found = dom(f"{address}/search.html?q=intruder", tmp_path)
    assert "docs/inspecting.html" in found
