"""What an adapter covers: which modules of each kind were matched, how much of the model they are, what is trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.table import Table
from torch import nn

from lorafa.layers.base import LoraLayer
from lorafa.layers.host import Host
from lorafa.surgery.walk import places


@dataclass(frozen=True)
class CoverageRow:
    """All modules of one last name and one class."""

    name: str
    """Last part of the modules' dotted names: ``q_proj``."""
    kind: str
    """Class of the module, of the base layer where it is adapted: ``Linear``."""
    modules: int
    matched: int
    """How many of them carry an adapter."""
    base: int
    """Parameters of the base model in them."""
    trainable: int
    """Parameters in them that are trained."""


def coverage(model: nn.Module) -> list[CoverageRow]:
    """One row a kind of module that holds parameters, the matched kinds first, each parameter counted once.

    A parameter two modules share (a tied output head) counts for the first one. A module trained in full counts as
    unmatched, with its trained copy as trainable.
    """
    counts: dict[tuple[str, str], list[int]] = {}
    seen: set[int] = set()
    for place in places(model):
        if id(place.module) in seen:
            continue
        seen.add(id(place.module))
        original, in_base, added = _parameters(place.module)
        if not in_base and not added:
            continue
        total = counts.setdefault((_kind_name(place.name), type(original).__name__), [0, 0, 0, 0])
        in_base, added = ([p for p in part if id(p) not in seen] for part in (in_base, added))
        seen.update(id(p) for p in (*in_base, *added))
        total[0] += 1
        total[1] += isinstance(place.module, LoraLayer)
        total[2] += sum(p.numel() for p in in_base)
        total[3] += sum(p.numel() for p in (*in_base, *added) if p.requires_grad)
    rows = [CoverageRow(name, kind, *numbers) for (name, kind), numbers in counts.items()]
    return sorted(rows, key=lambda row: (row.matched == 0, row.trainable == 0))


def coverage_table(rows: Iterable[CoverageRow]) -> Table:
    """The rows as a table with a last line of sums."""
    rows = list(rows)
    whole = sum(row.base for row in rows)
    table = Table(title="What is adapted", title_justify="left")
    table.add_column("module")
    table.add_column("kind")
    for heading in ("matched", "parameters", "of model", "trainable"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = _cells(row.matched, row.modules, row.base, whole, row.trainable)
        table.add_row(row.name, row.kind, *cells, style=None if row.trainable else "dim")
    table.add_section()
    covered = [row for row in rows if row.matched]
    trainable = sum(row.trainable for row in rows)
    table.add_row(
        f"{len(covered)} of {len(rows)} kinds",
        "",
        *_cells(sum(r.matched for r in rows), sum(r.modules for r in rows), whole, whole, trainable),
        style="bold",
    )
    return table


def _cells(matched: int, modules: int, base: int, whole: int, trainable: int) -> tuple[str, str, str, str]:
    share = f"{base / whole:.1%}" if whole else "-"
    return f"{matched}/{modules}", f"{base:,}", share, f"{trainable:,}" if trainable else "-"


def _parameters(module: nn.Module) -> tuple[nn.Module, list[nn.Parameter], list[nn.Parameter]]:
    """The module as it was before wrapping, the parameters it holds itself, and those that adapters added."""
    if not isinstance(module, Host):
        return module, list(module.parameters(recurse=False)), []
    original: nn.Module = module
    while isinstance(original, Host):  # there may be one for each parameter
        original = original.get_submodule(original.wrapped_path)
    inside = {id(p) for p in original.parameters()}
    added = [p for p in module.parameters() if id(p) not in inside]
    return original, list(original.parameters(recurse=not module.nests)), added


def _kind_name(name: str) -> str:
    """The last part of a dotted name that is no number: modules of a list count as one kind."""
    words = [part for part in name.split(".") if not part.isdigit()]
    return words[-1] if words else "(model)"
