"""Scripts that import `peft` and get lorafa, each in an interpreter of its own: this one has PEFT itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from typing import Any

from toys.places import ROOT

SAID = "what was found: "


def by_name(code: str, *words: str, strict: bool = False, served: bool = True) -> subprocess.CompletedProcess[str]:
    """Run code after ``import lorafa.compat``; the environment is this one's, so that it finds lorafa and the toys."""
    first = "import lorafa.compat\n" if served else ""
    paths = [str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "LORAFA_STRICT": "1" if strict else "0",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return subprocess.run(
        [sys.executable, "-W", "default", "-c", first + textwrap.dedent(code), *words],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def found_by_name(code: str, *words: str, strict: bool = False) -> Any:
    """What the code hands to its function ``say``, a value json can hold; an assertion fails where the code does."""
    say = f"""
import json
def say(value):
    print({SAID!r} + json.dumps(value))
"""
    done = by_name(say + textwrap.dedent(code), *words, strict=strict)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(SAID)]
    assert lines, f"the script said nothing:\n{done.stdout}{done.stderr}"
    return json.loads(lines[-1].removeprefix(SAID))
