"""`make docs`: the pages of the repository and a reference of every public name, as a site that can be read offline.
`make links` asks for every external link in them.

Sphinx reads a copy of the pages under build/docs/source, in which files lie as in the repository, so that links between
them are the same in both places; the site is in build/docs/html.
"""

from __future__ import annotations

import importlib
import inspect
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build" / "docs"
SOURCE, SITE = OUT / "source", OUT / "html"
LINKS = "links"
"""The word after which external links are asked for, in place of a site; what they answered is in build/docs/links."""
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE")
"""Pages at the top of the repository."""
IN_FOLDERS = ("comparison.html", "report.html")
"""Pages by which a folder of results is shown."""
PARTS = {
    "lorafa": "What scripts import",
    "lorafa.alignment": "A teacher beside the task",
    "lorafa.optimizers": "Optimizers",
    "lorafa.train.trainer": "The trainer",
    "lorafa.train.adapter_checkpoints": "Adapter-only checkpoints for any trainer",
    "lorafa.errors": "Errors",
}
"""Modules whose public names the reference has: a page each."""
SECTIONS: Mapping[str, Sequence[str]] = {
    "Read this first": (
        *("README", "docs/concepts", "docs/how-to-choose", "docs/peft", "docs/from-others", "docs/doctor"),
    ),
    "Training": (
        *("docs/training", "docs/starts", "docs/variants", "docs/optimizers", "docs/quantized", "docs/alignment"),
        *("docs/objectives", "docs/plan", "docs/params", "docs/published-commands"),
    ),
    "Measuring": ("docs/benchmarks", "docs/evaluation", "docs/inspecting", "docs/claims", "docs/unification"),
    "Finished adapters": (
        *("docs/loading", "docs/combining", "docs/mixed-batches", "docs/swapping", "docs/merging", "docs/exporting"),
        *("docs/chat", "docs/reliability"),
    ),
    "Reference": tuple(f"reference/{name}" for name in PARTS),
    "The project": ("docs/index", "docs/map", "CONTRIBUTING", "CHANGELOG", "docs/LOG"),
}
"""The contents, by the paths of pages without their endings."""
_LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


def gather() -> None:
    """Copy the pages, and the files that they link to, and write the index and the reference."""
    shutil.rmtree(OUT, ignore_errors=True)
    for page in [ROOT / name for name in PAGES] + sorted((ROOT / "docs").glob("*.md")):
        _copy(page)
        for linked in _linked_files(page):
            if linked.suffix != ".md":
                _copy(linked)
    (SOURCE / "index.md").write_text(index(), encoding="utf-8")
    (SOURCE / "reference").mkdir()
    for module in PARTS:
        (SOURCE / "reference" / f"{module}.md").write_text(reference(module), encoding="utf-8")


def _copy(path: Path) -> None:
    target = SOURCE / path.relative_to(ROOT)
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".md":
        text = _LINK.sub(lambda link: _to_file(link, path.parent), path.read_text(encoding="utf-8"))
        target.write_text(text, encoding="utf-8")
    else:
        shutil.copyfile(path, target)


def _to_file(link: re.Match[str], folder: Path) -> str:
    """A link as the site has it: one to a folder of results goes to the page in it."""
    for name in IN_FOLDERS:
        if (folder / link[1] / name).is_file():
            return link[0].replace(link[1], f"{link[1].rstrip('/')}/{name}", 1)
    return link[0]


def _linked_files(page: Path) -> Iterator[Path]:
    """Files of the repository that a page links to."""
    for link in _LINK.finditer(page.read_text(encoding="utf-8")):
        path = (page.parent / _to_file(link, page.parent)[2:-1].partition("#")[0]).resolve()
        if path.is_file() and path.is_relative_to(ROOT):
            yield path


def index() -> str:
    """The first page: the contents by section, each page by its own title."""
    lines = ["# lorafa", "", "Low-rank adaptation of PyTorch models.", ""]
    for title, pages in SECTIONS.items():
        lines += ["```{toctree}", f":caption: {title}", ":maxdepth: 1", "", *pages, "```", ""]
    return "\n".join(lines)


def public_names(module: str) -> list[str]:
    """The names that a module offers: what it lists, else what it defines without an underscore."""
    loaded = importlib.import_module(module)
    listed = getattr(loaded, "__all__", None)
    if listed is not None:
        return [name for name in listed if not name.startswith("_")]
    return [
        name
        for name, value in vars(loaded).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module
    ]


def reference(module: str) -> str:
    """The page of a module: its names, sorted, each as its docstring has it."""
    lines = [f"# {module}", "", f"{PARTS[module]}.", ""]
    for name in sorted(public_names(module), key=str.lower):
        value = getattr(importlib.import_module(module), name)
        kind = "class" if inspect.isclass(value) else "function" if callable(value) else "data"
        options = [":members:", ":show-inheritance:"] if kind == "class" else []
        lines += [f"## {name}", "", "```{eval-rst}", f".. auto{kind}:: {module}.{name}"]
        lines += [*(f"   {option}" for option in options), "   :no-index:", "```", ""]
    return "\n".join(lines)


def main(words: Sequence[str]) -> int:
    """Build the site, or after "links" ask for each external link; further words are options of Sphinx.

    Warnings, dead links between pages among them, are errors, and so are external links that do not answer.

    Returns:
        Sphinx's exit status.
    """
    from sphinx.cmd.build import main as build

    gather()
    asking, options = list(words[:1]) == [LINKS], words
    if asking:
        options = words[1:]
    builder, target = ("linkcheck", OUT / LINKS) if asking else ("html", SITE)
    here = str(Path(__file__).parent)
    return int(build(["-c", here, "-b", builder, "-W", "--keep-going", "-q", *options, str(SOURCE), str(target)]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
