"""An adapter as one HTML file that needs no other file: spectra, and energy by layer and kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lorafa.inspection.adapter import Inspection, Layer
from lorafa.report.inspected import by_kind, facts, intruder_rows, kind_table, layer_table
from lorafa.report.plots import dashes, drawn, finish
from lorafa.report.starts import block_of, median_spectrum
from lorafa.report.styles import style_of
from lorafa.report.templates import Drawing, legend_of, write_page

_LEAST = 1e-6
"""Singular values below this share of the largest are drawn there: on a logarithmic axis zero has no place."""
_CELL, _FRAME = 0.26, 1.3
"""Inches of a row of the map of layers, and what its axes take beside."""
Value = Callable[[Layer], float | None]


def write_inspection(path: str | Path, found: Inspection) -> Path:
    """Write the page of an adapter and return its path.

    Raises:
        CheckpointError: it could not be written.
    """
    return write_page(
        Path(path),
        "inspection.html",
        title=found.name,
        facts=facts(found),
        notes=found.notes,
        kinds=kind_table(found),
        layers=layer_table(found),
        intruders=intruder_rows(found),
        unreadable=sorted(found.base.unreadable.items()) if found.base is not None else [],
        drawings=drawings(found),
    )


def drawings(found: Inspection) -> list[Drawing]:
    """Everything that can be drawn of what was found."""
    on = found.base.weights if found.base is not None else {}
    other = found.other.layers if found.other is not None else {}

    def ratio(layer: Layer) -> float | None:
        return on[layer.update.name].ratio if layer.update.name in on else None

    def cosine(layer: Layer) -> float | None:
        return other[layer.update.name].cosine if layer.update.name in other else None

    made = [
        _spectra(found),
        _by_block(found, "Share of the energy, by block", "share of the energy", lambda layer: layer.share),
        _by_block(found, "Effective rank, by block", "effective rank", lambda layer: layer.measured.effective_rank),
        _map(found, "Norm of the update, by block and kind", "norm", lambda layer: layer.measured.frobenius),
        _by_block(found, "Norm of the update beside the weight, by block", "norm / norm of the weight", ratio),
        _by_block(found, "Cosine with the other adapter, by block", "cosine", cosine),
    ]
    return [each for each in made if each is not None]


def _spectra(found: Inspection) -> Drawing | None:
    """The median spectrum of each kind of layer."""
    curves: dict[str, list[float]] = {}
    for kind, layers in by_kind(found).items():
        spectra = {layer.update.name: layer.measured.values for layer in layers}
        curves[kind] = [max(value, _LEAST) for value in median_spectrum(spectra, list(spectra))]
    if not any(curves.values()):
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for number, curve in enumerate(curves.values()):
            style = style_of(number)
            places = range(1, len(curve) + 1)
            mark: dict[str, Any] = {"marker": style.mark, "markersize": 4} if len(curve) == 1 else {}
            axes.plot(places, curve, color=style.colour, linewidth=1.4, **dashes(style), **mark)
        finish(axes, "direction", "singular value / largest", log_up=True)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))

    return Drawing("Spectra of the updates, median over layers", drawn(draw), _legend(curves))


def _legend(kinds: Iterable[str]) -> list[tuple[str, str]]:
    return legend_of([(style_of(number), kind) for number, kind in enumerate(kinds)])


def _by_block(found: Inspection, title: str, up: str, value: Value) -> Drawing | None:
    """A value of each layer over the blocks of the model, a line a kind; None where no layer has one."""
    points: dict[str, list[tuple[int, float]]] = {}
    for kind, layers in by_kind(found).items():
        pairs = [(block_of(layer.update.name), value(layer)) for layer in layers]
        points[kind] = sorted((block, one) for block, one in pairs if one is not None)
    if not any(points.values()):
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for number, places in enumerate(points.values()):
            style = style_of(number)
            x, y = [block for block, _ in places], [one for _, one in places]
            axes.plot(x, y, color=style.colour, marker=style.mark, markersize=3, linewidth=0.9, **dashes(style))
        finish(axes, "block", up)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))

    return Drawing(title, drawn(draw), _legend(points))


def _map(found: Inspection, title: str, what: str, value: Value) -> Drawing | None:
    """A value of each layer as a colour, blocks from left to right, kinds from top to bottom; None with one block."""
    kinds = by_kind(found)
    blocks = sorted({block_of(layer.update.name) for layer in found.layers})
    if len(blocks) < 2:
        return None
    cells: list[list[float]] = []
    for layers in kinds.values():
        squares = dict.fromkeys(blocks, float("nan"))
        for layer in layers:
            block, one = block_of(layer.update.name), value(layer) or 0.0
            squares[block] = one if squares[block] != squares[block] else (squares[block] ** 2 + one**2) ** 0.5
        cells.append([squares[block] for block in blocks])

    def draw(figure: Figure) -> None:
        axes: Axes = figure.add_subplot()
        mesh = axes.pcolormesh(range(len(blocks) + 1), range(len(kinds) + 1), cells, cmap="viridis")
        axes.invert_yaxis()
        axes.set_yticks([row + 0.5 for row in range(len(kinds))], list(kinds))
        every = max(1, len(blocks) // 8)
        axes.set_xticks([place + 0.5 for place in range(0, len(blocks), every)], [str(b) for b in blocks[::every]])
        axes.set_xlabel("block")
        figure.colorbar(mesh, ax=axes, label=what)

    return Drawing(title, drawn(draw, (5.4, _FRAME + _CELL * max(len(kinds), 5))))
