"""What a teacher did in a run: the divergence by step with its phases, and each decision of the schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from lorafa.report.plots import drawn, finish
from lorafa.report.styles import style_of
from lorafa.report.values import number
from lorafa.runs.measures import Metrics, curve

HEADINGS = ("step", "decision", "phase from here on", "task's loss", "divergence", "why")


def decision_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each decision of the record, as ``HEADINGS`` has it: losses in nats a token on the probe."""
    return [
        (
            f"{row['step']:,}", str(row["kind"]), str(row["phase"]), number(row.get("task")),
            number(row.get("divergence")), _why(row),
        )
        for row in result.get("decisions") or ()
    ]  # fmt: skip


def divergence_curve(metrics: Metrics, decisions: Sequence[Mapping[str, Any]] = ()) -> str | None:
    """The divergence from the teacher by step, with a line where a phase begins; None where it was never measured."""
    points = curve(metrics, "divergence")
    if not points:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.plot(*zip(*points, strict=True), color=style_of(0).colour, marker=".", label="divergence")
        for place, phase in enumerate(("teacher", "task"), 1):
            steps = [row["step"] for row in decisions if row["kind"] == "switch" and row["phase"] == phase]
            for first, step in zip((True, *(False for _ in steps)), steps, strict=False):
                colour, label = style_of(place).colour, f"a phase of the {phase} begins" if first else None
                axes.axvline(step, color=colour, linewidth=1, linestyle=":", label=label)
        finish(axes, "step", "nats per trained token")
        axes.legend(frameon=False)

    return drawn(draw)


def _why(row: Mapping[str, Any]) -> str:
    lost = f"; the teacher could not hold {row['discarded']:.2%} of the update" if row.get("discarded") else ""
    return f"{row['why']}{lost}"
