"""What was found of an adapter as rows of text, for the terminal and for a page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorafa.costs.sizes import size
from lorafa.inspection.adapter import Comparison, Inspection, Layer
from lorafa.report.values import number

if TYPE_CHECKING:
    from lorafa.inspection.base import OnBase

Rows = list[tuple[str, ...]]


def facts(found: Inspection) -> list[tuple[str, str]]:
    """(name, value) of the adapter as a whole."""
    config, layers = found.config, found.layers
    formulas = sorted({layer.update.formula for layer in layers})
    kinds = {layer.update.kind for layer in layers}
    rows = [
        ("adapter", found.name),
        ("made for", config.base_model_name_or_path or "not said"),
        ("formula", ", ".join(formulas) + (", rsLoRA" if config.use_rslora else "")),
        ("rank", _spread([layer.update.rank for layer in layers])),
        ("scaling", _spread([layer.update.scaling for layer in layers])),
        ("layers", f"{len(layers):,} of {len(kinds)} kinds"),
        ("numbers", f"{found.numbers:,} in A and B ({', '.join(found.dtypes)}), file {size(found.bytes, 2)}"),
        ("norm of the update", f"{found.frobenius:.4g} (Frobenius, all layers)"),
    ]
    if found.beside:
        whole = sum(found.beside.values())
        rows.append(("beside A and B", f"{whole:,} numbers in {len(found.beside)} tensors"))
    if found.base is not None:
        rows += [("base", found.base_name or "given"), ("fit", found.base.fit.words)]
    if found.intruders is not None and found.base is not None:
        having = sum(bool(one.intruders) for one in found.base.weights.values())
        rows.append(("intruder dimensions", f"{found.intruders} in {having} of {len(found.base.weights)} layers"))
    if found.effect is not None:
        effect = found.effect
        read = f"{effect.positions} positions" + (", the beginning of the text" if effect.cut else "")
        rows += [
            ("KL(base || adapted)", f"{effect.kl:.4g} nats a position, at most {effect.largest_kl:.4g} ({read})"),
            ("logits", f"differ by {effect.difference:.4g} at most"),
            ("likeliest output", f"another one at {effect.changed:.1%} of positions"),
        ]
    if found.other is not None:
        both, here, there = len(found.other.layers), len(found.other.only_here), len(found.other.only_there)
        apart = f"; {here} layers only here, {there} only there" if here or there else ""
        rows.append(("compared with", f"{found.other.name}: {both} common layers{apart}"))
        rows.append(("cosine of the updates", number(found.other.cosine)))
    return rows


def _spread(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}, median {statistics.median(values):.4g}"


def by_kind(found: Inspection) -> dict[str, list[Layer]]:
    """The layers of each kind, q_proj and so on, in the order in which they first appear."""
    kinds: dict[str, list[Layer]] = {}
    for layer in found.layers:
        kinds.setdefault(layer.update.kind, []).append(layer)
    return kinds


def kind_table(found: Inspection) -> tuple[tuple[str, ...], Rows]:
    """Headings and one row a kind of layer: sums, and medians over its layers."""
    headings = ("kind", "layers", "rank", "norm", "share", "effective rank", "stable rank", *_further_headings(found))
    rows = []
    for kind, layers in by_kind(found).items():
        row = [
            kind,
            str(len(layers)),
            _spread([layer.update.rank for layer in layers]),
            _median([layer.measured.frobenius for layer in layers]),
            f"{sum(layer.share for layer in layers):.1%}",
            _median([layer.measured.effective_rank for layer in layers], ".2f"),
            _median([layer.measured.stable_rank for layer in layers], ".2f"),
        ]
        rows.append((*row, *_further_cells(found, layers)))
    return headings, rows


def _median(values: Sequence[float | None], form: str = ".4g") -> str:
    there = [value for value in values if value is not None]
    return number(statistics.median(there) if there else None, form)


def _further_headings(found: Inspection) -> list[str]:
    """The headings of columns for a base and for another adapter, where there are such."""
    headings = [] if found.base is None or not found.base.weights else ["norm / weight", "intruders"]
    return headings if found.other is None else [*headings, "cosine", "phi of A", "phi of B"]


def _further_cells(found: Inspection, layers: Sequence[Layer]) -> list[str]:
    """What stands under :func:`_further_headings` for some layers together."""
    cells = [] if found.base is None or not found.base.weights else _on_base(found.base, layers)
    return cells if found.other is None else [*cells, *_likeness(found.other, layers)]


def _on_base(base: OnBase, layers: Sequence[Layer]) -> list[str]:
    on = [base.weights[layer.update.name] for layer in layers if layer.update.name in base.weights]
    counted = [len(one.intruders) for one in on if one.intruders is not None]
    return [_median([one.ratio for one in on], ".2%"), str(sum(counted)) if counted else "-"]


def _likeness(other: Comparison, layers: Sequence[Layer]) -> list[str]:
    both = [other.layers[layer.update.name] for layer in layers if layer.update.name in other.layers]
    values = ([one.cosine for one in both], [one.rows for one in both], [one.columns for one in both])
    return [_median(each, ".3f") for each in values]


def layer_table(found: Inspection, top: int | None = None) -> tuple[tuple[str, ...], Rows]:
    """Headings and one row a layer, those with the largest share of the energy first.

    Args:
        top: how many; None: all, in the order of the model.
    """
    own = ("layer", "rank", "scaling", "norm", "largest", "share", "effective rank", "stable rank")
    chosen = found.layers if top is None else sorted(found.layers, key=lambda layer: -layer.share)[:top]
    rows = []
    for layer in chosen:
        update, numbers = layer.update, layer.measured
        row = [
            update.name,
            str(update.rank),
            f"{update.scaling:.4g}",
            f"{numbers.frobenius:.4g}",
            f"{numbers.spectral:.4g}",
            f"{layer.share:.1%}",
            f"{numbers.effective_rank:.2f}",
            f"{numbers.stable_rank:.2f}",
        ]
        rows.append((*row, *_further_cells(found, [layer])))
    return (*own, *_further_headings(found)), rows


def intruder_rows(found: Inspection) -> Rows:
    """(layer, place, singular value, share of the largest, cosine) of every intruder dimension, the first places, and
    among them the newest directions, first."""
    weights = {} if found.base is None else found.base.weights
    listed = [(name, on.largest or 1.0, one) for name, on in weights.items() for one in on.intruders or ()]
    rows: Rows = []
    for name, largest, one in sorted(listed, key=lambda row: (row[2].place, row[2].cosine)):
        layer = name if one.expert is None else f"{name}, matrix {one.expert}"
        share = f"{one.singular_value / largest:.1%}"
        rows.append((layer, str(one.place), f"{one.singular_value:.4g}", share, f"{one.cosine:.3f}"))
    return rows
