"""Curves as SVG text, to stand inside a page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

SMOOTHING = 0.9
"""Weight of the past in the running mean of the loss."""


def loss_curve(metrics: Sequence[Mapping[str, Any]]) -> str | None:
    """Training loss by step with its running mean, the held-out loss where it was measured; None without any."""
    train = [(row["step"], row["loss"]) for row in metrics if "loss" in row]
    heldout = [(row["step"], row["eval_loss"]) for row in metrics if "eval_loss" in row]
    if not train:
        return None
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.add_subplot()
    steps, losses = zip(*train, strict=True)
    axes.plot(steps, losses, color="#9db8d9", linewidth=1, label="training loss")
    axes.plot(steps, running_mean(losses), color="#1f4e8c", linewidth=2, label="running mean")
    if heldout:
        axes.plot(*zip(*heldout, strict=True), color="#c0562f", marker="o", label="held-out loss")
    axes.set_xlabel("step")
    axes.set_ylabel("nats per trained token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return svg(figure)


def running_mean(values: Sequence[float], weight: float = SMOOTHING) -> list[float]:
    """Exponential mean, corrected for its start as in Adam (arXiv:1412.6980, section 3)."""
    means, mean = [], 0.0
    for count, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        means.append(mean / (1 - weight**count))
    return means


def svg(figure: Figure) -> str:
    """The drawing without the XML head, text kept as text; equal drawings give equal text."""
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "lorafa"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
