"""The pictures of README.md: bars from committed figures, and the page of a committed run as a browser shows it.

    python docs/site/pictures.py            # both; the second needs Chromium
    python docs/site/pictures.py beside-peft
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1]
FIGURES = DOCS / "results" / "end_to_end.json"
PICTURES = DOCS / "pictures"
COLORS = {"lorafa": "#2a6f97", "PEFT": "#adb5bd"}


def panels() -> list[tuple[str, dict[str, float], str]]:
    """What is drawn: a title, the figure of each library, and how it is written."""
    found = json.loads(FIGURES.read_text(encoding="utf-8"))
    training, step = found["whole_training"], found["training_step"]
    memory = {name: mib / 1024 for name, mib in training["peak_mib"].items()}
    return [
        ("trained tokens a second\n(more is better)", training["tokens_per_second"], "{:.0f}"),
        ("peak memory, GiB\n(less is better)", memory, "{:.1f}"),
        ("time of a training step, PEFT = 1\n(less is better)", step["time"], "{:.2f}"),
    ]


def draw_beside_peft(path: Path) -> None:
    """Bars of lorafa and PEFT, a panel for each figure."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lorafa"  # the same bytes each time
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(9, 1.9), layout="constrained")
    for place, (title, values, form) in zip(axes, panels(), strict=True):
        names = list(values)[::-1]
        bars = place.barh(names, [values[name] for name in names], color=[COLORS[name] for name in names])
        place.bar_label(bars, [form.format(values[name]) for name in names], padding=3)
        place.set_title(title, fontsize=9)
        place.set_xlim(0, 1.2 * max(values.values()))
        place.spines[["top", "right", "bottom"]].set_visible(False)
        place.set_xticks([])
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def draw_report(path: Path) -> None:
    """The page of the committed run, as Chromium shows it."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("This picture needs Chromium: apt-get install chromium")
    page = (DOCS / "results" / "demo" / "report.html").as_uri()
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-color-profile=srgb",
             f"--user-data-dir={profile}", "--window-size=1100,820", f"--screenshot={path}", page],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip


DRAWN = {"beside-peft": ("beside-peft.svg", draw_beside_peft), "report": ("report.png", draw_report)}


def main(names: Sequence[str]) -> None:
    PICTURES.mkdir(exist_ok=True)
    for name in names or DRAWN:
        file, draw = DRAWN[name]
        draw(PICTURES / file)


if __name__ == "__main__":
    main(sys.argv[1:])
