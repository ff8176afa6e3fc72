"""The wheel that pip installs has every file of the package, and the environment of the tests is in order."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lorafa.diagnosis.packages import PACKAGES
from versions.try_versions import built, lowest, requirements, tracked


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout, made without a network."""
    return built(tmp_path_factory.mktemp("wheel"))


def test_a_wheel_has_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    known = {name.removeprefix("src/") for name in tracked("src/lorafa")}
    assert sorted(known - held) == []
    assert sorted(held - known) == []
    assert {name for name in known if not name.endswith(".py")} >= {"lorafa/py.typed", "lorafa/report/page.html"}


def test_a_wheel_asks_for_the_packages_that_the_doctor_knows(wheel: Path) -> None:
    claimed = requirements(wheel)
    assert claimed.keys() == {package.name for package in PACKAGES if package.needed}
    assert lowest(claimed) == {package.name: package.least for package in PACKAGES if package.needed}


def test_the_environment_of_the_tests_is_in_order() -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "No broken requirements found.\n")
