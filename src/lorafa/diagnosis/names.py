"""Names that mean another thing than they should: files that hide a package, records of two versions, PEFT itself."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

from lorafa.diagnosis.finding import Bench, Finding
from lorafa.diagnosis.packages import PACKAGES, Package, installed_version, is_there
from lorafa.errors import shorten
from lorafa.version import VERSION


def names(bench: Bench) -> Iterator[Finding]:
    """What hides a package, and whether `peft` can be taken over; nothing where all is as it should be but that."""
    yield from _itself()
    for package in PACKAGES:
        if is_there(package):
            yield from _twice(package)
            yield from _hidden(package)
    here = sorted({package.imported for package in PACKAGES if _is_in(Path.cwd(), package.imported)})
    if here:
        yield Finding(
            subject="this folder", state="note",
            said=f"it has {shorten(here)} of its own, which scripts that are started here import in its place",
            remedy="rename it, or start them elsewhere", facts={"folder": str(Path.cwd()), "modules": here},
        )  # fmt: skip
    yield from _peft(bench)


def _itself() -> Iterator[Finding]:
    said = installed_version("lorafa")
    if said is not None and said != VERSION:
        yield Finding(
            subject="lorafa", state="note", said=f"{VERSION} runs here, and {said} is what pip has installed",
            remedy="pip install --force-reinstall --no-deps lorafa", facts={"runs": VERSION, "installed": said},
        )  # fmt: skip


def _twice(package: Package) -> Iterator[Finding]:
    try:
        versions = sorted({one.version for one in metadata.distributions(name=package.name)} - {None})
    except Exception:  # a record that cannot be read
        return
    if len(versions) > 1:
        yield Finding(
            subject=package.name, state="note",
            said=f"there are records of {' and '.join(versions)}; the first one that Python finds counts",
            remedy=f"pip uninstall {package.name}, until it finds none; then pip install {package.requirement}",
            facts={"versions": versions},
        )  # fmt: skip


def _hidden(package: Package) -> Iterator[Finding]:
    """A module that is not where the distribution of its name has put it."""
    module = package.imported.partition(".")[0]
    try:
        files = [file for file in metadata.files(package.name) or [] if file.parts[0].partition(".")[0] == module]
        origin = getattr(PathFinder.find_spec(module), "origin", None)
        if not files or origin is None:  # an installation that only points to its files; a folder of several packages
            return
        if any(Path(str(file.locate())) == Path(origin) for file in files if file.name == Path(origin).name):
            return
    except Exception:  # no record, or one that cannot be read
        return
    yield Finding(
        subject=package.name, state="bad",
        said=f"`import {package.imported}` gives {origin}, which is not the package's",
        remedy="rename that file or folder, or take its place out of PYTHONPATH", needed=package.needed,
        facts={"origin": origin},
    )  # fmt: skip


def _is_in(folder: Path, module: str) -> bool:
    """Whether a folder has a module of that name; a folder without __init__.py hides no package."""
    return (folder / f"{module}.py").is_file() or (folder / module / "__init__.py").is_file()


def _peft(bench: Bench) -> Iterator[Finding]:
    """Whether `import peft` gives lorafa under `lorafa run`."""
    early, served = bench.outcome("peft_is_there"), bench.outcome("served")
    version = installed_version("peft")
    beside = f"; PEFT {version} is installed too, and stays out of the way" if version else ""
    facts = {"peft": version}
    if early is None or served is None:
        yield Finding(
            subject="peft", state="ok", said=f"{version} is installed" if version else "not installed, nor needed",
            facts=facts,
        )  # fmt: skip
    elif early.value:
        yield Finding(
            subject="lorafa run", state="bad", facts=facts,
            said="something imports peft as Python starts, so that `lorafa run` is refused",
            remedy="look for `import peft` in sitecustomize.py, usercustomize.py and .pth files",
        )  # fmt: skip
    elif not served.well or served.value != "lorafa":
        told = served.error or f"`import peft` gives {served.value}"
        yield Finding(subject="lorafa run", state="bad", said=told, facts=facts)
    else:
        yield Finding(subject="lorafa run", state="ok", said=f"`import peft` gives lorafa{beside}", facts=facts)


