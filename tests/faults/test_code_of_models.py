"""What others bring is executed on nobody's prompt and unpacked nowhere: transformers is told each time whether code is
trusted, and no archive says where its members go."""

from __future__ import annotations

import ast
import zipfile
from pathlib import Path

import pytest

from lorafa.errors import SourceError
from lorafa.storage.wheels import take_out
from toys.places import ROOT


def test_every_loading_from_transformers_says_whether_code_is_trusted() -> None:
    silent, said = [], 0
    for path in sorted((ROOT / "src" / "lorafa").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = ast.unparse(node.func.value).rpartition(".")[2]
                of_models = owner.startswith("Auto") or "auto_class" in owner or owner == "found"
                if node.func.attr in ("from_pretrained", "from_config") and of_models:
                    trusted = {word.arg for word in node.keywords} & {"trust_remote_code", None}
                    said += bool(trusted)
                    silent += [] if trusted else [f"{path.name}:{node.lineno}"]
    assert silent == []
    assert said >= 9


def test_no_archive_is_unpacked_to_where_it_says() -> None:
    found = [
        f"{path.name}:{node.lineno}"
        for path in sorted((ROOT / "src" / "lorafa").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("extract", "extractall", "unpack_archive")
        # a setting of evaluations has that name
        and not (node.attr == "extract" and ast.unparse(node.value).rpartition(".")[2] in ("self", "settings", "own"))
    ]
    assert found == []


NAMES = ["../out", "/tmp/lorafa-out", "a/../../out", "C:\\out", "link"]


@pytest.mark.parametrize("name", NAMES)
def test_a_member_goes_where_it_is_asked_for(name: str, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    entry = zipfile.ZipInfo(name)
    entry.external_attr = 0o120777 << 16  # a symbolic link
    with zipfile.ZipFile(inside / "a.whl", "w") as archive:
        archive.writestr(entry, "/etc/passwd")
    take_out(inside / "a.whl", {name: inside / "taken"})
    assert (inside / "taken").read_text() == "/etc/passwd"
    assert not (inside / "taken").is_symlink()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.whl", "inside", "taken"]


def test_a_wheel_that_lacks_a_member_or_is_none_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(SourceError, match=r"a\.whl cannot be taken apart: .*no item named 'b'.*Fetch it again\."):
        take_out(tmp_path / "a.whl", {"b": tmp_path / "b"})
    (tmp_path / "a.whl").write_text("none")
    with pytest.raises(SourceError, match=r"a\.whl cannot be taken apart: File is not a zip file\. Fetch it again\."):
        take_out(tmp_path / "a.whl", {"b": tmp_path / "b"})
