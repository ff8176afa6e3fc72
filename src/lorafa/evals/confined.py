"""A program that nobody has read, run in a process of its own with limits. This file is that process, too.

It is started as ``python -I -S -c <this text>`` and imports nothing of lorafa. The first of its two stages takes what
the system lets it take away: another user where it is root, and a new user, process and network namespace; it waits
for the second, which is an interpreter with hard limits, and a hook that refuses what the interpreter itself reports:
sockets, processes, signals, files outside of its folder. The program is run there, and only what this file says after
it, with a word that the program was not given, counts.

None of this is a wall against code that attacks it; it is one against code that is wrong.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

PASSED, FAILED, ERROR, TIMEOUT = "passed", "failed", "error", "timeout"
NEW_USER, NEW_PROCESSES, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000  # CLONE_NEW... of Linux
NOBODY = 65534
BY_SIGNAL = 128
"""The exit status of a process that waits for one that a signal has ended is more than this by the signal's number."""


# ---- the first stage


def outer(text: str, limits: dict[str, Any]) -> int:
    """Take rights away, start the second stage and wait for it."""
    if os.geteuid() == 0:
        _become_nobody()
    apart = _unshare(NEW_USER | NEW_PROCESSES | NEW_NETWORK)
    for _ in range(2):  # the first child is the namespace's first process, which a signal does not end
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
            ended = os.waitstatus_to_exitcode(status)
            return ended if ended >= 0 else BY_SIGNAL - ended
        _die_with_parent()
    _set_limits(limits)
    words = [sys.executable, "-I", "-S", "-B", "-c", text, "inner", json.dumps({**limits, "apart": apart})]
    os.execv(sys.executable, words)


def _become_nobody() -> None:
    """Leave root, to whom limits on processes do not apply; stay where nobody could not run the interpreter."""
    if os.access not in os.supports_effective_ids:
        return
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    readable = os.access(os.__file__, os.R_OK, effective_ids=True)
    runs = os.access(sys.executable, os.X_OK, effective_ids=True)
    os.seteuid(0)
    os.setegid(0)
    if readable and runs:
        os.chown(".", NOBODY, NOBODY)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def _libc() -> Any:
    import ctypes

    return ctypes.CDLL(None, use_errno=True)


def _unshare(flags: int) -> bool:
    """Whether the process has namespaces of its own now."""
    try:
        return bool(_libc().unshare(flags) == 0)
    except (OSError, AttributeError):  # no Linux
        return False


def _die_with_parent() -> None:
    try:
        _libc().prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL
    except (OSError, AttributeError):
        return


def _set_limits(limits: dict[str, Any]) -> None:
    import resource

    for name, value in (
        ("RLIMIT_CPU", limits["cpu_seconds"]), ("RLIMIT_AS", limits["memory_bytes"]), ("RLIMIT_CORE", 0),
        ("RLIMIT_FSIZE", limits["file_bytes"]), ("RLIMIT_NOFILE", 32), ("RLIMIT_NPROC", 0),
    ):  # fmt: skip
        kind = getattr(resource, name, None)
        if kind is not None:
            hard = resource.getrlimit(kind)[1]
            lowest = value if hard == resource.RLIM_INFINITY else min(value, hard)
            above = lowest + (name == "RLIMIT_CPU")  # first a signal that says what it is, then the end
            try:
                resource.setrlimit(kind, (lowest, above if hard == resource.RLIM_INFINITY else min(above, hard)))
            except (OSError, ValueError):  # a kind that this system does not limit
                continue


# ---- the second stage


def inner(limits: dict[str, Any]) -> int:
    """Run the program that stands on the standard input, and say what became of it."""
    word, program = json.loads(sys.stdin.buffer.read())
    answer = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    sys.addaudithook(_guard(os.path.realpath(".")))
    signal.setitimer(signal.ITIMER_REAL, limits["seconds"])
    reason, text = _outcome(program)
    try:
        said = json.dumps([word, reason, text[:300], limits["apart"]])
        os.write(answer, said.encode())
    finally:
        os._exit(0)  # without what the program has left to be done at the end


def _outcome(program: str) -> tuple[str, str]:
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "program"})
    except AssertionError as error:
        return FAILED, f"AssertionError: {error}"
    except BaseException as error:
        try:
            return ERROR, f"{type(error).__name__}: {error}"
        except BaseException:
            return ERROR, "an error that cannot be written"
    return PASSED, ""


REFUSED = (
    *("socket.", "subprocess.", "os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "pty."),
    *("os.kill", "signal.pthread_kill", "ctypes.", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link"),
    *("os.symlink", "os.chmod", "os.chown", "os.truncate", "os.utime", "os.setxattr", "os.removexattr", "os.chdir"),
    *("os.fchdir", "os.chroot", "resource.", "shutil.", "syslog.", "ftplib.", "urllib.", "webbrowser."),
)
"""What the interpreter reports before it does it, by how the reports begin (the audit events of Python's library)."""
MODULES = {
    *("socket", "_socket", "subprocess", "_posixsubprocess", "multiprocessing", "_multiprocessing", "ctypes"),
    *("_ctypes", "resource", "pty", "ssl", "_ssl", "asyncio"),
}
"""Modules that could do without such a report."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _guard(folder: str) -> Any:
    """A hook that refuses all of these, and to write files outside of a folder; a program cannot take it away."""

    def hook(event: str, values: tuple[Any, ...]) -> None:
        if event.startswith(REFUSED):
            raise PermissionError(f"{event} is refused here")
        if event == "import" and values[0] in MODULES:
            raise ImportError(f"{values[0]} is refused here")
        if event == "open" and isinstance(values[2], int) and values[2] & WRITES and not isinstance(values[0], int):
            path = os.path.realpath(os.fsdecode(values[0]))
            if os.path.commonpath([folder, path]) != folder and path != os.devnull:
                raise PermissionError(f"writing to {path} is refused here")

    return hook


if __name__ == "__main__":
    if sys.argv[1] == "inner":
        sys.exit(inner(json.loads(sys.argv[2])))
    sys.exit(outer(sys.argv[3], json.loads(sys.argv[2])))
