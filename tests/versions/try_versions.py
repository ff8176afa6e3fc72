"""The claim of pyproject.toml, tried: a wheel of lorafa in fresh environments with the oldest and the newest versions.

    make test-versions                                        all of them
    python tests/versions/try_versions.py lowest              one of them
    python tests/versions/try_versions.py highest --python 3.11 --with torch==2.13.0   where an index has not all

Each environment gets the wheel with its extra ``train`` from the package index, and what the tests need. `pip check`
must be clean, then tests run against what was installed: no source is on their path. The environment is removed
afterwards. The last lines say which versions these were, for CONTRIBUTING.md. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Combination:
    """Versions that go together."""

    python: str
    oldest: bool
    """Whether each requirement has its lowest version; else its newest."""


COMBINATIONS: Mapping[str, Combination] = {
    "lowest": Combination("3.10", oldest=True),
    "highest": Combination("3.13", oldest=False),
}
TOOLS = ("pytest>=8", "hypothesis>=6.100", "attrs>=23")
"""What the tests below need beside lorafa."""
TESTS = (
    "tests/versions/check_installed.py",
    *("tests/laws/test_variants.py", "tests/laws/test_merge.py", "tests/laws/test_files.py"),
    *("tests/laws/test_starts.py", "tests/laws/test_atomic.py", "tests/laws/test_mixed_rows.py"),
    *("tests/unit/numerics", "tests/unit/layers", "tests/unit/settings", "tests/unit/conf", "tests/unit/storage"),
    *("tests/unit/test_config.py", "tests/unit/test_peft_model.py"),
    *("tests/integration/test_transformers.py", "tests/integration/test_train_command.py"),
    *("tests/integration/test_torch_features.py", "tests/integration/test_generate.py"),
)
"""Laws, the core, and one of each kind of work: a training, its page, answers, transformers' own trainer."""


def main(words: Sequence[str] | None = None) -> int:
    """Try the combinations that are named, and return 1 where one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[], metavar="NAME", help=f"{' or '.join(COMBINATIONS)}; all")
    parser.add_argument("--python", metavar="PLACE", help="another Python: 3.11, or the path of one")
    parser.add_argument("--with", action="append", default=[], dest="pins", metavar="PACKAGE==VERSION")
    parser.add_argument("--wheel", type=Path, help="a wheel of lorafa (default: made of this checkout)")
    parser.add_argument("--site", action="store_true", help="use what that Python has already: a system's torch")
    parser.add_argument("--keep", action="store_true", help="keep the environments, and say where they are")
    parser.add_argument("--only", action="append", metavar="TEST", help="these alone; no: install and `pip check`")
    args = parser.parse_args(words)
    if odd := [name for name in args.names if name not in COMBINATIONS]:
        parser.error(f"unknown combination {odd[0]!r}; known: {', '.join(COMBINATIONS)}")
    outcomes = {}
    for name in args.names or COMBINATIONS:
        combination = COMBINATIONS[name]
        if args.python and os.sep not in args.python:
            combination = replace(combination, python=args.python)
        folder = Path(tempfile.mkdtemp(prefix=f"lorafa-{name}-"))
        try:
            python = args.python if args.python and os.sep in args.python else interpreter(combination.python)
            outcomes[name] = tried(combination, python, folder, args)
        finally:
            if args.keep:
                print(f"kept: {folder}")
            else:
                shutil.rmtree(folder)
    for name, (passed, versions) in outcomes.items():
        print(f"{name}: {'passed' if passed else 'FAILED'} with {', '.join(versions)}")
    return 0 if all(passed for passed, _ in outcomes.values()) else 1


def tried(combination: Combination, python: str, folder: Path, args: argparse.Namespace) -> tuple[bool, list[str]]:
    """Whether a combination passes, and the versions it came to."""
    wheel = args.wheel or built(folder / "wheel")
    environment = folder / "environment"
    run(python, "-m", "venv", *(["--system-site-packages"] if args.site else []), str(environment))
    inside = str(environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    claimed = requirements(wheel)
    pins = {**(lowest(claimed) if combination.oldest else {}), **dict(pin.split("==") for pin in args.pins)}
    if args.site:
        there = {name: version for name, version in installed(inside).items() if name in claimed}
        oldest = lowest(claimed)
        run(inside, "-m", "pip", "install", "-q", "setuptools", "wheel")  # a system may have half of one
        pins |= {name: version for name, version in there.items() if numbers(version) >= numbers(oldest[name])}
    constraints = folder / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()))
    run(inside, "-m", "pip", "install", "-q", "-c", str(constraints), f"{wheel}[train]", *TOOLS)
    checked = subprocess.run([inside, "-m", "pip", "check"], check=False).returncode == 0
    found = installed(inside)
    versions = [f"Python {said(inside, '--version').split()[-1]}", *(f"{name} {found[name]}" for name in claimed)]
    print(", ".join(versions), flush=True)
    tests = args.only or TESTS
    well = tests == ["no"] or passed(inside, folder / "tests-alone", tests)
    return checked and well, versions


def passed(python: str, folder: Path, tests: Sequence[str] = TESTS) -> bool:
    """Whether tests pass in an environment, in a copy that has no sources."""
    for name in (*tracked("tests"), *tracked("docs/results/starts/gora"), "pyproject.toml", "requirements.lock"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "-o", "pythonpath=tests"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "PYTHONNOUSERSITE": "1"}
    start = time.monotonic()
    done = subprocess.run([python, *words, *tests], cwd=folder, env=environment, check=False)
    print(f"tests took {time.monotonic() - start:.0f} s", flush=True)
    return done.returncode == 0


def built(folder: Path) -> Path:
    """A wheel of the files that git knows, as they are now; what an earlier build has left does not get into it."""
    sources = folder / "sources"
    for name in (*tracked("src"), "pyproject.toml", "README.md", "LICENSE"):
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, sources / name)
    words = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(sources)]
    run(sys.executable, *words)
    shutil.rmtree(sources)
    (wheel,) = folder.glob("*.whl")
    return wheel


def tracked(place: str) -> list[str]:
    """Files below a folder of the checkout that git knows."""
    return [name for name in said("git", "-C", str(ROOT), "ls-files", "-z", place).split("\0") if name]


def requirements(wheel: Path) -> dict[str, str]:
    """What the wheel asks for, its extra ``train`` included: name -> range."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []
    asked = (line.partition(";") for line in lines)
    wanted = [need for need, _, marker in asked if not marker or re.search(r"extra == .train.", marker)]
    return {re.match(r"[\w.-]+", need)[0].lower(): re.sub(r"^[\w.-]+", "", need).strip() for need in wanted}  # type: ignore[index]


def lowest(claimed: Mapping[str, str]) -> dict[str, str]:
    """The lower ends of ranges: name -> version."""
    found = {name: re.search(r">=\s*([\w.]+)", text) for name, text in claimed.items()}
    if open_ended := [name for name, end in found.items() if end is None]:
        raise SystemExit(f"error: pyproject.toml gives no lowest version of {', '.join(open_ended)}. Add one.")
    return {name: end[1] for name, end in found.items() if end}


def numbers(version: str) -> list[int]:
    """The numbers of a version, in order."""
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]


def interpreter(version: str) -> str:
    """The path of a Python of that version, on the path or among pyenv's.

    Raises:
        SystemExit: there is none.
    """
    of_pyenv = Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python")
    for place in filter(None, [shutil.which(f"python{version}"), *map(str, sorted(of_pyenv))]):
        words = [place, "-c", "import sys; print(sys.version)"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.stdout.startswith(f"{version}."):  # a shim of pyenv may be there without the Python
            return place
    raise SystemExit(f"error: There is no Python {version} here. Install it, or name one: --python path/to/python")


def installed(python: str) -> dict[str, str]:
    """Distributions of an environment: name in small letters -> version."""
    listed = json.loads(said(python, "-m", "pip", "list", "--format=json"))
    return {one["name"].lower(): one["version"] for one in listed}


def said(*words: str) -> str:
    """What a program writes; it must end well."""
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout


def run(*words: str) -> None:
    """Run a program that must end well.

    Raises:
        SystemExit: it did not.
    """
    if status := subprocess.run(words, check=False).returncode:
        raise SystemExit(f"error: {' '.join(words)} ended with {status}.")


if __name__ == "__main__":
    sys.exit(main())
