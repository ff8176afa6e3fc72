"""The site of documentation: nothing public is missing from it, no link in it is dead, and a browser can read it."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

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


HOSTS = {"arxiv.org", "github.com", "hydra.cc", "keepachangelog.com", "semver.org"}
"""Where external links may lead; `make links` asks whether they still do."""
OWN_MACHINE = {"127.0.0.1"}
_ADDRESS = re.compile(r"https?:[^\s`\"'<>\\]*")


def addresses(text: str) -> list[str]:
    """Every address in a text, without the marks of Markdown and of a sentence after it."""
    return [match[0].split(")")[0].rstrip(".,;:") for match in _ADDRESS.finditer(text)]


def is_sound(address: str) -> bool:
    """Whether an address is one that a page may link to."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        return False
    if host in OWN_MACHINE:
        return parts.scheme == "http" and port is not None
    rest = f"{parts.path}{parts.query}{parts.fragment}"
    plain = bool(re.fullmatch(r"[\w./~%+=&@,-]*", rest)) and "//" not in parts.path
    return parts.scheme == "https" and host in HOSTS and port is None and plain


def test_external_links_are_well_formed_and_lead_to_known_hosts() -> None:
    pages = [ROOT / f"{page}.md" for pages in make_site.SECTIONS.values() for page in pages if "reference/" not in page]
    found = {
        address: page.name
        for page in (*pages, *(ROOT / "examples").glob("*.ipynb"))
        for address in addresses(page.read_text(encoding="utf-8"))
    }
    assert {address: page for address, page in found.items() if not is_sound(address)} == {}
    assert {urlsplit(address).hostname for address in found} == HOSTS | OWN_MACHINE


@pytest.mark.parametrize(
    "address",
    [
        *("http://arxiv.org/abs/2311.03099", "https://arxiv.com/abs/2311.03099", "https:/arxiv.org/abs/2311.03099"),
        *("https://arxiv.org//abs/2311.03099", "https://arxiv.org/abs/{number}", "https://[arxiv.org", "https://"),
        *("https://github.com:99999/x", "http://127.0.0.1/"),
    ],
)
def test_an_address_that_is_none_is_found(address: str) -> None:
    assert addresses(f"see [it]({address}).") == [address]
    assert not is_sound(address)


@pytest.mark.parametrize(
    ("words", "builder", "folder"), [(["links", "-j", "2"], "linkcheck", "links"), (["-j", "2"], "html", "html")]
)
def test_links_are_asked_for_by_sphinx_itself(
    words: list[str], builder: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = pytest.importorskip("sphinx.cmd.build")
    asked: list[list[str]] = []
    monkeypatch.setattr(make_site, "gather", lambda: None)
    monkeypatch.setattr(build, "main", lambda given: asked.append(given) or 0)
    assert make_site.main(words) == 0
    (given,) = asked
    assert given[given.index("-b") + 1] == builder
    assert given[-1] == str(make_site.OUT / folder)
    assert given[given.index("-j") + 1] == "2"
    assert "links" not in given[:-1]


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
