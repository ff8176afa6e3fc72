"""`lorafa doctor` among packages that are missing, old, broken, loud or hidden: each is a line, the screen is clean.

The command runs by an interpreter that sees no package but made-up ones; the trials, which a process of their own
makes, see the same.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorafa.cli.doctor import NARROWEST, WIDEST
from lorafa.diagnosis.finding import Bench, Finding
from lorafa.diagnosis.names import names
from lorafa.diagnosis.packages import PACKAGES, packages
from toys.places import ROOT

COMMAND = "import sys\nfrom lorafa.cli.main import main\nsys.exit(main(sys.argv[1:]))\n"
RIGHT = {package.name: package.least or "1.0" for package in PACKAGES}

HOOK = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name == "gguf":
            raise ModuleNotFoundError(f"{name} is hidden", name=name)
sys.meta_path.insert(0, Hidden())
"""

Doctor = Callable[..., subprocess.CompletedProcess[str]]


def put(folder: Path, name: str, version: str | None, code: str = "") -> None:
    """Make up a package: its module, and the record of its installation."""
    module = next(package.imported for package in PACKAGES if package.name == name).partition(".")[0]
    (folder / module).mkdir(parents=True, exist_ok=True)
    (folder / module / "__init__.py").write_text(code or "def __getattr__(name): return name\n__path__ = []\n")
    if version is not None:
        record = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        record.mkdir()
        (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (record / "RECORD").write_text(f"{module}/__init__.py,,\n")


@pytest.fixture
def doctor(tmp_path: Path) -> Doctor:
    """The command, in ``tmp_path``, where ``site/`` has the only packages there are."""

    def run(*words: str, before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        paths = [str(ROOT / "src"), *([before] if before else []), str(tmp_path / "site")]
        own = {"PYTHONPATH": os.pathsep.join(paths), "LORAFA_CACHE": str(tmp_path), "HF_HOME": str(tmp_path)}
        return subprocess.run(
            [sys.executable, "-S", "-c", COMMAND, "doctor", *words],
            capture_output=True,
            encoding="utf-8",
            cwd=tmp_path,
            env={**os.environ, "COLUMNS": "100", **own, **environment},
            check=False,
        )

    return run


def lines(done: subprocess.CompletedProcess[str]) -> str:
    """What was said, in one line."""
    return " ".join(done.stdout.split())


def found(done: subprocess.CompletedProcess[str], check: str, subject: str) -> dict[str, Any]:
    (one,) = (each for each in json.loads(done.stdout)["checks"][check] if each["subject"] == subject)
    return dict(one)


def test_without_any_package_each_one_is_named_with_what_to_install(doctor: Doctor) -> None:
    done = doctor()
    assert (done.returncode, done.stderr) == (1, "")
    assert "BAD torch: not installed -> pip install lorafa " in lines(done)
    assert "BAD transformers: not installed -> pip install 'lorafa[train]'" in lines(done)
    assert "no report_to=wandb: needs wandb -> pip install 'wandb>=0.19'" in lines(done)
    verdict = lines(done).partition("Training does not work here:")[2]
    for package in PACKAGES:
        assert (f" {package.name}: not installed" in verdict) == package.needed
    assert "Traceback" not in done.stdout


def test_with_every_package_in_order_only_what_is_tried_can_fail(doctor: Doctor, tmp_path: Path) -> None:
    for name, version in RIGHT.items():
        put(tmp_path / "site", name, version)
    done = doctor("--quick")
    assert (done.returncode, done.stderr) == (0, "")
    assert "BAD" not in done.stdout
    assert done.stdout.endswith("Training should work here: versions are right, and nothing was tried.\n")
    tried = doctor("--json")  # these packages are empty
    assert tried.returncode == 1
    assert found(tried, "packages", "torch")["state"] == "ok"
    assert found(tried, "training", "the library")["state"] == "bad"
    assert json.loads(tried.stdout)["reasons"]


OUTSIDE = {
    "torch": ("2.6.0rc2", "2.6.0rc2 is older than 2.6", "pip install --upgrade 'torch>=2.6'"),
    "transformers": ("6.0.0", "6.0.0 is too new", "pip install 'transformers>=5.2,<6'"),
    "accelerate": ("0.34", "0.34 is older than 1.4", "pip install --upgrade 'accelerate>=1.4'"),
    "bitsandbytes": ("0.40.0", "0.40.0 is older than 0.45", "pip install --upgrade 'bitsandbytes>=0.45'"),
}


def test_versions_outside_of_their_ranges_stop_training_where_it_needs_them(doctor: Doctor, tmp_path: Path) -> None:
    for name, right in RIGHT.items():
        put(tmp_path / "site", name, OUTSIDE.get(name, [right])[0])
    done = doctor("--quick", "--json")
    assert done.returncode == 1
    for name, (_, said, remedy) in OUTSIDE.items():
        finding = found(done, "packages", name)
        assert (finding["state"], finding["remedy"]) == ("bad", remedy)
        assert finding["said"].startswith(said)
    stopping = [reason.partition(":")[0] for reason in json.loads(done.stdout)["reasons"]]
    assert stopping == ["torch", "transformers", "accelerate", "the library", "the commands"]


def test_an_old_version_of_what_is_optional_stops_nothing(doctor: Doctor, tmp_path: Path) -> None:
    for name, version in {**RIGHT, "bitsandbytes": "0.40.0"}.items():
        put(tmp_path / "site", name, version)
    done = doctor("--quick", "--json")
    assert done.returncode == 0
    feature = found(done, "features", "model.quantize=bnb4")
    assert feature["said"] == "needs bitsandbytes, which is not in order: see above"


BROKEN = {
    "datasets": ("raise ImportError('libcudart.so.12: cannot open')", "ImportError: libcudart.so.12: cannot open"),
    "accelerate": ("print('noise' * 999); 1 / 0", "ZeroDivisionError: division by zero"),
    "gguf": ("import os; os.abort()", "It ended the whole process (signal SIGABRT)."),
    "rich": ("import sys; sys.exit('no licence')", "SystemExit: no licence"),
    "jinja2": ("raise RuntimeError('\\x1b[2J\\nred')", "RuntimeError: \u241b[2J red"),
}


def test_packages_that_cannot_be_imported_are_told_with_their_errors(doctor: Doctor, tmp_path: Path) -> None:
    loud = "import os; os.write(2, b'\\x1b[31mFailed to load kernels\\n' + b'x' * 5000); print('more')\n__path__ = []"
    for name, version in RIGHT.items():
        put(tmp_path / "site", name, version, loud if name == "torchao" else BROKEN.get(name, [""])[0])
    done = doctor()
    assert (done.returncode, done.stderr) == (1, "")
    for name, (_, said) in BROKEN.items():
        assert f"BAD {name}: {RIGHT[name]}, and cannot be imported: {said}" in lines(done)
    assert "-> pip install --force-reinstall 'datasets>=3.0'" in lines(done)
    assert "ok filelock: 3.20.3" in lines(done)
    assert "note torchao: 0.14; it writes when it is imported: \u241b[31mFailed to load kernels" in lines(done)
    assert not any(noise in done.stdout for noise in ("noisenoise", "xxxxx", "more"))


def test_a_record_that_is_cut_off_and_one_that_is_missing_are_survived(doctor: Doctor, tmp_path: Path) -> None:
    for name, version in RIGHT.items():
        put(tmp_path / "site", name, None if name == "gguf" else version)
    (tmp_path / "site" / "datasets-3.0.dist-info" / "METADATA").write_bytes(b"\xff\xfe")
    done = doctor("--json")
    assert done.stderr == ""
    assert found(done, "packages", "gguf")["said"] == "there, and no record says of which version"
    assert found(done, "packages", "datasets")["state"] in ("note", "ok")


def test_two_records_of_a_package_are_told(doctor: Doctor, tmp_path: Path) -> None:
    for name, version in RIGHT.items():
        put(tmp_path / "site", name, version)
    put(tmp_path / "before", "torch", "2.7.0")
    done = doctor("--quick", before=str(tmp_path / "before"))
    assert "note torch: there are records of 2.6 and 2.7.0; the first one that Python finds counts" in lines(done)
    assert "-> pip uninstall torch, until it finds none" in lines(done)


def test_a_file_that_hides_a_package_is_told_with_its_place(doctor: Doctor, tmp_path: Path) -> None:
    for name, version in RIGHT.items():
        put(tmp_path / "site", name, version)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "datasets.py").touch()
    done = doctor("--quick", "--json", before=str(tmp_path / "mine"))
    assert done.returncode == 1
    finding = found(done, "names", "datasets")
    assert finding["said"] == f"`import datasets` gives {tmp_path / 'mine' / 'datasets.py'}, which is not the package's"
    assert finding["remedy"].startswith("rename that file")


def test_a_file_of_this_folder_that_scripts_would_take_is_told(doctor: Doctor, tmp_path: Path) -> None:
    (tmp_path / "peft.py").touch()
    (tmp_path / "datasets").mkdir()  # a folder with data hides no package
    done = doctor("--quick")
    assert "note this folder: it has peft of its own, which scripts that are started here import" in lines(done)


def test_modules_that_an_import_hook_refuses_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    bench = Bench(["use:yaml", "use:gguf"])
    try:
        told = {finding.subject: finding for finding in packages(bench)}
    finally:
        bench.close()
    assert told["gguf"].stops_training
    assert told["gguf"].said.endswith("cannot be imported: ModuleNotFoundError: gguf is hidden")
    assert told["pyyaml"].state == "ok"


@pytest.mark.parametrize("columns", [1, 200])
def test_lines_fit_the_terminal(columns: int, doctor: Doctor, tmp_path: Path) -> None:
    put(tmp_path / "site", "torch", "2.5.1")
    done = doctor("--quick", COLUMNS=str(columns))
    width = min(max(columns, NARROWEST), WIDEST)
    broken = [line for line in done.stdout.splitlines() if len(line) > width and len(line.split()) > 3]
    assert broken == []


def test_a_terminal_of_ascii_alone_is_written_to(doctor: Doctor) -> None:
    done = doctor("--quick", PYTHONIOENCODING="ascii", LORAFA_CACHE="/nowhere/\u65e5\u672c")
    assert done.stderr == ""
    assert re.search(r"cache: /nowhere/\?\?", done.stdout)


def test_a_check_that_fails_itself_is_a_line_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorafa.cli.main import main
    from lorafa.diagnosis import machine

    def fail(*_: Any) -> None:
        raise PermissionError("not\nfor you")

    monkeypatch.setattr(machine, "available_bytes", fail)
    assert main(["doctor", "--quick"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "note machine: this check failed: PermissionError: not for you" in out
    assert "ok torch:" in out


def test_it_is_no_work_for_a_group() -> None:
    from lorafa.cli.main import parse

    assert parse(["doctor"]).alone == "lorafa doctor"


def _names(monkeypatch: pytest.MonkeyPatch, place: Path, code: str) -> list[Finding]:
    place.mkdir()
    (place / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", f"{place}{os.pathsep}{ROOT / 'src'}")
    monkeypatch.setattr(sys, "path", [str(place), *sys.path])
    monkeypatch.chdir(place)
    bench = Bench(["peft_is_there", "served"])
    try:
        return [finding for finding in names(bench) if finding.subject == "lorafa run"]
    finally:
        bench.close()


def test_peft_beside_lorafa_stays_out_of_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = _names(monkeypatch, tmp_path / "site", "")
    assert finding.state == "ok"
    assert finding.said.startswith("`import peft` gives lorafa; PEFT 0.")


def test_peft_that_is_imported_as_python_starts_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, types; sys.modules['peft'] = types.ModuleType('peft')"
    (finding,) = _names(monkeypatch, tmp_path / "site", code)
    assert (finding.state, finding.needed) == ("bad", False)
    assert "something imports peft as Python starts" in finding.said


@pytest.mark.slow
def test_where_these_tests_run_training_works(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "LORAFA_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "lorafa.cli.main", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    states = {each["subject"]: each["state"] for each in json.loads(done.stdout)["checks"]["features"]}
    assert {name for name, state in states.items() if state == "bad"} == set()
    assert states["model.quantize=bnb4"] == states["lorafa export --for gguf"] == "ok"
