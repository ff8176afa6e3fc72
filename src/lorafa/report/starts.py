"""How a start from data came out: spectra and ranks by kind of layer, as a drawing and as rows of text."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from lorafa.report.plots import TALL, dashes, drawn, finish
from lorafa.report.styles import style_of


def kind_of(layer: str) -> str:
    """The last name of a layer: q_proj of model.layers.3.self_attn.q_proj."""
    return layer.rpartition(".")[2]


def rank_rows(start: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(kind of layer, layers, ranks, share of the leading singular value the last rank has)."""
    ranks, spectra = start.get("ranks") or {}, start.get("spectra") or {}
    rows = []
    for kind, layers in _by_kind(ranks).items():
        chosen = [ranks[layer] for layer in layers]
        lasts = [
            spectra[layer][ranks[layer] - 1] / spectra[layer][0]
            for layer in layers
            if layer in spectra and 0 < ranks[layer] <= len(spectra[layer]) and spectra[layer][0] > 0
        ]
        share = f"{statistics.median(lasts):.1%}" if lasts else "-"
        low, high = min(chosen), max(chosen)
        spread = str(low) if low == high else f"{low} to {high}, median {statistics.median(chosen):g}"
        rows.append((kind, str(len(layers)), spread, share))
    return rows


def fact_rows_of_start(start: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of what the start read and chose."""
    if not start:
        return []
    rows = [
        ("rows read by the start", f"{start['rows']:,}"),
        ("statistics", f"{start['bytes'] / 2**20:.1f} MiB, {start['seconds']:.1f} s"),
    ]
    if "stable_gamma" in start:
        rows.append(("stable_gamma", f"{start['stable_gamma']:g}"))
    if "samples" in start:
        rows.append(("rows that its noise is divided by", f"{start['samples']:,}"))
    if joint := start.get("joint"):
        rows.append(("teacher's weight in the start", _weight_in_words(joint)))
    if start.get("fallbacks"):
        rows.append(("layers that started as by default", str(len(start["fallbacks"]))))
    return rows


def _weight_in_words(joint: Mapping[str, Any]) -> str:
    if joint["weight"] is None:
        return f"none: {joint['why']}"
    return f"{joint['weight']:.3g}{', which balances the gradients' if joint['balanced'] else ''}"


def spectra_and_ranks(start: Mapping[str, Any]) -> str | None:
    """Above, the median spectrum of each kind of layer; below, the rank of every layer in the model's order."""
    spectra, ranks = start.get("spectra") or {}, start.get("ranks") or {}
    if not spectra or not ranks:
        return None
    kinds = _by_kind(ranks)

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1)
        for number, (kind, layers) in enumerate(kinds.items()):
            style = style_of(number)  # below too, where there is no legend, also if a kind has no spectrum
            if middle := median_spectrum(spectra, layers):
                places = range(1, len(middle) + 1)
                above.plot(places, middle, label=kind, color=style.colour, linewidth=1.5, **dashes(style))
            blocks, chosen = [block_of(layer) for layer in layers], [ranks[layer] for layer in layers]
            below.plot(blocks, chosen, color=style.colour, marker=style.mark, markersize=3, linewidth=0.8)
        finish(above, "direction", "singular value / largest", log_up=True)
        finish(below, "block", "rank")
        above.legend(frameon=False, fontsize="small")

    return drawn(draw, TALL)


def median_spectrum(spectra: Mapping[str, Sequence[float]], layers: Sequence[str]) -> list[float]:
    """The median over layers of each singular value as a share of the layer's largest; empty where no layer has any."""
    curves = [_relative(spectra[layer]) for layer in layers if spectra.get(layer) and spectra[layer][0] > 0]
    return [statistics.median(values) for values in zip(*curves, strict=False)]


def _by_kind(layers: Mapping[str, Any]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for layer in layers:
        kinds.setdefault(kind_of(layer), []).append(layer)
    return kinds


def _relative(values: Sequence[float]) -> list[float]:
    return [value / values[0] for value in values]


def block_of(layer: str) -> int:
    """The first number in a layer's name: its block."""
    found = re.search(r"\.(\d+)\.", f".{layer}.")
    return int(found[1]) if found else 0
