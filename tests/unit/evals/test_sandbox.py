"""Programs in a process of their own: what passes, what does not, and that nothing gets out."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from lorafa.errors import NotAvailableError
from lorafa.evals import sandbox
from lorafa.evals.sandbox import Limits, Outcome, run_all, run_program

QUICK, SLOW = Limits(seconds=0.5, memory_bytes=2**28), Limits(seconds=8.0, memory_bytes=2**28)
"""For what never ends, and for what ends at once where nothing else keeps the processor."""
TEST = "\ndef check(f):\n    assert f(2) == 4\ncheck(double)\n"
RIGHT = "def double(x):\n    return 2 * x\n"


@pytest.mark.parametrize(
    ("program", "reason", "text"),
    [
        (RIGHT + TEST, "passed", ""),
        ("import math, typing, hashlib, re, random, collections\n" + RIGHT + TEST, "passed", ""),
        ("print('passed')\n" + RIGHT + TEST, "passed", ""),
        ("def double(x):\n    return x\n" + TEST, "failed", "AssertionError"),
        ("print('passed')\ndef double(x):\n    return x\n" + TEST, "failed", "AssertionError"),
        ("def double(x:\n" + TEST, "error", "SyntaxError"),
        ("x = 1 / 0\n", "error", "ZeroDivisionError"),
        ("import sys\nsys.exit(0)\n" + RIGHT + TEST, "error", "SystemExit: 0"),
        ("import os\nos._exit(0)\n" + RIGHT + TEST, "error", "before its test was over"),
        ("import os, json\nos.write(3, json.dumps(['', 'passed', '', True]).encode())\nos._exit(0)\n", "error",
         "before its test was over"),
        ("def double(x):\n    return double(x)\n" + TEST, "error", "RecursionError"),
        ("class E(Exception):\n    def __str__(self):\n        raise SystemExit\nraise E", "error", "cannot be"),
        ("if __name__ == '__main__':\n    raise ValueError\n" + RIGHT + TEST, "passed", ""),
        ("while True:\n    pass\n", "timeout", "its time was over"),
        ("import time\ntime.sleep(100)\n", "timeout", "its time was over"),
        ("x = bytearray(2 ** 30)\n", "error", "MemoryError"),
        ("x = []\nwhile True:\n    x.append(' ' * 2 ** 24)\n", "error", "MemoryError"),
    ],
)  # fmt: skip
def test_a_program_passes_only_where_it_runs_to_its_end_and_its_assertions_hold(
    program: str, reason: str, text: str
) -> None:
    started = time.monotonic()
    found = run_program(program, QUICK if reason == "timeout" else SLOW)
    assert (found.reason, text in found.text) == (reason, True), found
    assert time.monotonic() - started < 12


@pytest.mark.parametrize(
    ("program", "text"),
    [
        ("import os\nwhile True:\n    os.fork()", "os.fork is refused"),
        ("import os\nos.system('true')", "os.system is refused"),
        ("import subprocess", "subprocess is refused"),
        ("import _posixsubprocess", "_posixsubprocess is refused"),
        ("import ctypes", "ctypes is refused"),
        ("import socket", "socket is refused"),
        ("import _socket\n_socket.socket()", "_socket is refused"),
        ("import os\nos.kill(1, 9)", "os.kill is refused"),
        ("import resource", "resource is refused"),
        ("open('{outside}', 'w')", "writing to {outside} is refused"),
        ("open('../here', 'w')", "is refused"),
        ("import os\nos.symlink('/', 'x')", "os.symlink is refused"),
        ("open('x', 'wb').write(bytes(2 ** 22))", "File too large"),
    ],
)
def test_what_a_program_may_not_do_is_an_error_and_is_not_done(program: str, text: str, tmp_path: Path) -> None:
    outside = tmp_path / "here"
    found = run_program(program.replace("{outside}", str(outside)), SLOW)
    assert found.reason == "error"
    assert text.replace("{outside}", str(outside)) in found.text
    assert not outside.exists()


def test_a_program_may_write_into_its_own_folder_which_is_gone_afterwards() -> None:
    program = "import os\nopen('x', 'w').write('1')\nassert open('x').read() == '1'\nassert False, os.getcwd()"
    found = run_program(program, SLOW)
    folder = found.text.removeprefix("AssertionError: ")
    assert os.path.isabs(folder)
    assert not os.path.exists(folder)


def test_its_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    program = "import os\nassert 'SECRET' not in os.environ and 'PATH' not in os.environ"
    assert run_program(program, SLOW).reason == "passed"


def test_a_program_that_ignores_the_end_of_its_time_is_ended_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "START", 1.0)
    program = "import signal, time\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\nwhile True:\n    time.sleep(1)"
    started = time.monotonic()
    assert run_program(program, Limits(seconds=0.5)).reason == "timeout"
    assert time.monotonic() - started < 5


def test_without_namespaces_the_interpreter_refuses_sockets_and_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    text = Path(sandbox.confined.__file__).read_text()
    unshared = "return bool(_libc().unshare(flags) == 0)"
    assert unshared in text
    text = text.replace(unshared, "return False")
    monkeypatch.setattr(sandbox, "_text", lambda: text)
    assert run_program(RIGHT + TEST, SLOW) == Outcome("passed", "", apart=False)
    assert "refused" in run_program("import socket", SLOW).text
    assert "refused" in run_program("import os\nos.fork()", SLOW).text
    assert run_program("while True: pass", QUICK).reason == "timeout"


def test_no_connection_reaches_a_server_of_this_machine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = run_program(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 0.5)", SLOW)
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()
    assert found.reason == "error"


def test_outcomes_are_in_the_order_of_the_programs() -> None:
    found = run_all([f"assert {at} % 2" for at in range(5)], SLOW)
    assert [one.reason for one in found] == ["failed", "passed", "failed", "passed", "failed"]
    assert run_all([], SLOW) == []


def test_a_system_without_limits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.os, "name", "nt")
    with pytest.raises(NotAvailableError, match=r"limits that this system .* does not have"):
        sandbox.require_system()
