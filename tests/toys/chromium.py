"""A page as Chromium shows it: how wide it is, what its drawings hold, what it complains of.

The page lies in a frame of the width asked for, inside a wrapper whose script writes what it finds into the wrapper,
which Chromium then prints: no driver is needed. Debian has it as `chromium`.
"""

from __future__ import annotations

import html
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NEEDED = "LORAFA_NEEDS_CHROMIUM"
"""Set to 1 where a test without a browser is to fail instead of being skipped."""
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
)

_WRAPPER = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe id="frame" style="width:{width}px;height:900px;border:0" srcdoc="{page}"></iframe>
<script>
function overlaps(svg) {{
  const found = [];
  for (const axis of svg.querySelectorAll('[id^="matplotlib.axis"]')) {{
    const texts = [...axis.querySelectorAll('[id^="xtick"] text, [id^="ytick"] text')];
    const boxes = texts.map(t => t.getBoundingClientRect());
    for (let i = 0; i < boxes.length; i++) for (let j = 0; j < i; j++) {{
      const a = boxes[i], b = boxes[j];
      if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom) found.push([i, j]);
    }}
  }}
  return found;
}}
function outside(svg) {{
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter(t => {{
    const b = t.getBoundingClientRect();
    return b.left < box.left - 2 || b.right > box.right + 2 || b.top < box.top - 2 || b.bottom > box.bottom + 2;
  }}).map(t => t.textContent);
}}
addEventListener('load', () => {{
  const frame = document.getElementById('frame').contentDocument, root = frame.documentElement;
  for (const closed of frame.querySelectorAll('details')) closed.open = true;
  const texts = [...frame.querySelectorAll('figure svg:not(.swatch) text')];
  const drawings = [...frame.querySelectorAll('svg')];
  const found = {{
    width: frame.defaultView.innerWidth, scroll: root.scrollWidth, client: root.clientWidth,
    drawings: drawings.length, empty: drawings.filter(s => !s.querySelector('path')).length,
    overlaps: drawings.flatMap(overlaps).length, outside: drawings.flatMap(outside),
    ink: getComputedStyle(frame.body).color, paper: getComputedStyle(frame.body).backgroundColor,
    text: Math.min(...texts.map(t => t.getBoundingClientRect().height)),
  }};
  const written = document.createElement('pre');
  written.id = 'findings';
  written.textContent = JSON.stringify(found);
  document.body.append(written);
  document.getElementById('frame').remove();
}});
</script>
"""


def chromium() -> str:
    """The browser; skips the test where there is none, unless the environment asks for it."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        if os.environ.get(NEEDED) == "1":
            pytest.fail(f"{NEEDED}=1, and there is no chromium. Install it: apt-get install chromium")
        pytest.skip(f"needs chromium; {NEEDED}=1 makes this a failure")
    return found


def shown(page: Path, width: int, folder: Path, *more: str) -> dict[str, Any]:
    """What Chromium finds on a page in a window of this width, every closed part of it opened.

    ``complaints`` are the lines that the page made it log.

    Args:
        folder: for the wrapper and the profile of the browser.
        more: words of its command line.
    """
    wrapper = folder / f"wrapper-{width}.html"
    text = html.escape(page.read_text(encoding="utf-8"), quote=True)
    wrapper.write_text(_WRAPPER.format(width=width, page=text), encoding="utf-8")
    place = [f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000", "--dump-dom", wrapper.as_uri()]
    command = [chromium(), *QUIET, *more, *place]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    written = done.stdout.partition('<pre id="findings">')[2].partition("</pre>")[0]
    assert written, done.stderr[-2000:]
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return {**json.loads(html.unescape(written)), "complaints": complaints}


def dom(address: str, folder: Path) -> str:
    """The page at an address, as html, once its scripts have run.

    Args:
        folder: for the profile of the browser.
    """
    place = [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000", "--dump-dom", address]
    return subprocess.run([chromium(), *QUIET, *place], capture_output=True, text=True, timeout=120, check=True).stdout
