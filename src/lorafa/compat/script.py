"""A script run under PEFT's name, as Python would run it: with its own traceback and exit status."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from lorafa.errors import ConfigError

USAGE = "usage: python -m lorafa.compat script.py [its arguments]"
FAILED, WRONG_ARGUMENTS = 1, 2


def require_script(path: str) -> None:
    """Raises ConfigError where there is no script at a path."""
    found = Path(path)
    if not found.exists():
        raise ConfigError(f"There is no script {path}. Give the path of a Python file.")
    if found.is_dir() and not (found / "__main__.py").is_file():
        raise ConfigError(f"{path} is a folder without a __main__.py. Give the path of a Python file.")


def main(words: Sequence[str]) -> int:
    """Run a script in this process: its path and its own arguments.

    Returns:
        The exit status: 0; 1 after an exception, whose traceback is printed as Python would; 2 where there is no
        script. What the script itself leaves with (``sys.exit``) goes on as it is.
    """
    if not words or words[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        return WRONG_ARGUMENTS
    path = words[0]
    try:
        require_script(path)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_ARGUMENTS
    sys.argv = list(words)
    sys.path[0] = str(Path(path).resolve() if Path(path).is_dir() else Path(path).resolve().parent)
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit:
        raise
    except BaseException as error:
        shown = error.with_traceback(_of_script(error.__traceback__, path))
        sys.excepthook(type(error), shown, shown.__traceback__)
        if isinstance(error, KeyboardInterrupt) and os.name != "nt":
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)  # as Python ends: a shell sees that it was interrupted
        return FAILED
    return 0


def _of_script(frames: TracebackType | None, path: str) -> TracebackType | None:
    """The traceback from the first frame of a script on; all of it where none is there (a syntax error)."""
    names = {path, str(Path(path) / "__main__.py")}
    inner = frames
    while inner is not None and inner.tb_frame.f_code.co_filename not in names:
        inner = inner.tb_next
    return inner or frames


def run_apart(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a script by a new interpreter in the place of this process.

    Returns:
        The exit status, where the system cannot replace a process by another (Windows); else it never returns.

    Raises:
        ConfigError: there is no script.
    """
    require_script(words[0])
    command = [sys.executable, "-m", "lorafa.compat", *words]
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if os.name == "nt":
        return subprocess.call(command, env=environment)
    os.execve(sys.executable, command, environment)
