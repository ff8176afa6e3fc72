"""A writer that is stopped midway, by the system or by a signal, leaves the old file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lorafa.storage.tensors import read_tensors, write_tensors
from toys.compare import assert_same_tensors
from toys.data import some_tensors
from toys.places import ROOT

SOURCE = str(ROOT / "src")


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.skipif(os.name == "nt", reason="file size limits are a POSIX feature")
def test_a_write_the_system_refuses_midway_leaves_the_old_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "w.safetensors", some_tensors())
    result = run_python(
        """
        import resource, sys, torch
        from lorafa.errors import CheckpointError
        from lorafa.storage.tensors import write_tensors
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_tensors(sys.argv[1], {"large": torch.zeros(10000)})
        except CheckpointError as error:
            print(error)
        """,
        str(tmp_path / "w.safetensors"),
    )
    assert "w.safetensors could not be written: " in result.stdout, result.stderr
    assert os.listdir(tmp_path) == ["w.safetensors"]
    assert_same_tensors(read_tensors(tmp_path / "w.safetensors")[0], some_tensors())


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is a POSIX feature")
def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "w.safetensors", some_tensors())
    result = run_python(
        """
        import os, signal, sys, torch
        import lorafa.storage.whole as whole
        from lorafa.storage.tensors import write_tensors
        replace = os.replace
        whole.os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)  # the last moment before the new name
        write_tensors(sys.argv[1], {"new": torch.zeros(10)})
        """,
        str(tmp_path / "w.safetensors"),
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert_same_tensors(read_tensors(tmp_path / "w.safetensors")[0], some_tensors())
