"""The pages of reports in a browser, on a phone and on a desk, in light and in dark."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from lorafa.cli.main import main
from lorafa.report.comparison import write_comparison
from toys.chromium import chromium, shown
from toys.places import ROOT
from toys.runs import make_run

WORDS = "An answer-without-any-space-in-it_that_goes_on_and_on_for_longer_than_a_phone_is_wide= " * 3
COVERED = [{"name": "q_proj", "kind": "Linear", "modules": 12, "matched": 12, "base": 10**9, "trainable": 10**6}]


def start(number: int) -> dict[str, object]:
    layers = [f"layers.{block}.{kind}" for block in range(30) for kind in ("q_proj", "up_proj")]
    return {
        "rows": 8, "bytes": 1, "seconds": 1.0,
        "ranks": {layer: 4 + (place + number) % 9 for place, layer in enumerate(layers)},
        "spectra": {layer: [math.exp(-0.3 * k * (1 + number)) for k in range(32)] for layer in layers},
    }  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of many runs with all that can be there, one of a run, one of a comparison by an earlier version."""
    chromium()
    folder = tmp_path_factory.mktemp("pages")
    given = {"output": WORDS, "correct": False}
    for method in range(21):
        for seed in range(2 if method < 4 else 1):
            loss = 2.0 + 0.5 * math.sin(method) + 0.05 * seed
            make_run(
                folder / "runs" / f"a-method-with-a-long-name-{method}-seed-{seed}", loss=loss, seed=seed, steps=60,
                rank=4 * 2**method, rate=1e-5 * (1 + method), coverage=COVERED,
                samples=[{"question": WORDS, "gold": "4", "before": given, "after": given}],
                after={"loss": loss, "accuracy": 1 / (method + 2), "forgetting": {"kl": 0.1 * method + 1e-3 * seed}},
                peak_device_bytes=(1000 + 37 * method) * 2**20, **({"start": start(method)} if method < 3 else {}),
            )  # fmt: skip
    make_run(folder / "runs" / "broke-off", loss=1.0, status="failed", error=WORDS)
    make_run(folder / "runs" / "other", loss=1.0, samples_sha256="7" * 64)
    assert main(["report", str(folder / "runs")]) == 0
    one = folder / "runs" / "a-method-with-a-long-name-2-seed-1"
    assert main(["report", str(one)]) == 0
    shutil.copytree(ROOT / "docs" / "results" / "optimizers", folder / "optimizers")
    comparison = write_comparison(folder / "optimizers")
    return {"runs": folder / "runs" / "runs.html", "one": one / "report.html", "comparison": comparison}


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("page", ["runs", "one", "comparison"])
def test_a_page_fits_its_window_and_every_drawing_holds_something(
    page: str, width: int, pages: dict[str, Path], tmp_path: Path
) -> None:
    found = shown(pages[page], width, tmp_path)
    assert found["complaints"] == []
    assert found["width"] == width
    assert found["scroll"] <= found["client"], found
    assert found["drawings"] >= 2
    assert found["empty"] == 0
    assert found["overlaps"] == 0
    assert found["outside"] == []
    assert found["text"] > 7  # px: what is written on a drawing can be read on a phone


def test_a_page_is_dark_where_the_reader_is(pages: dict[str, Path], tmp_path: Path) -> None:
    light = shown(pages["runs"], 390, tmp_path)
    dark = shown(pages["runs"], 390, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert sum(json.loads(f"[{light['paper'][4:-1]}]")) > 700
    assert sum(json.loads(f"[{dark['paper'][4:-1]}]")) < 100
    assert light["ink"] != dark["ink"]


def test_what_is_wrong_with_a_page_is_found(tmp_path: Path) -> None:
    """Or the tests above could not fail."""
    ticks = "".join(f'<g id="xtick_{n}"><text x="{n}" y="15" font-size="4">10</text></g>' for n in range(2))
    (tmp_path / "bad.html").write_text(
        f'<body><div style="width:900px">wide</div><svg viewBox="0 0 50 20"><g id="matplotlib.axis_1">{ticks}</g>'
        '<text x="40" y="9">cut off here</text></svg><script>console.error("no"); throw new Error("oh")</script>'
    )
    found = shown(tmp_path / "bad.html", 390, tmp_path)
    assert found["scroll"] > found["client"]
    assert (found["empty"], found["overlaps"], found["outside"]) == (1, 1, ["cut off here"])
    assert len(found["complaints"]) == 2
