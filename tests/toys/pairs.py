"""Which formulas, and which starts, go with which: tried one by one on a linear layer, as tables of docs/variants.md.

    PYTHONPATH=tests python -m toys.pairs        makes them anew
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lorafa.errors import LoraError
from lorafa.initializers import INITIALIZERS, find_start
from lorafa.layers import LAYERS
from lorafa.variants import VARIANTS
from toys.adapters import EVERY_NAME, config_for, settings_of, with_adapter
from toys.layers import Single, base_layer, weight_for
from toys.places import ROOT

LINEAR = "torch.nn.modules.linear.Linear"
ALONE: dict[str, dict[str, Any]] = {
    "lora": {},
    "kasa": {"init_lora_weights": "kasa"},
    "lora_sb": {"init_lora_weights": "lora_sb"},
    "qalora": {"use_qalora": True, "qalora_group_size": 2},
    "bdlora": {"use_bdlora": {"target_modules_bd_a": EVERY_NAME, "nblocks": 2}},
    "velora": {"velora_config": {"num_groups": 4, "init_type": "random"}},
    "monteclora": {"monteclora_config": {"num_samples": 2}},
    "dora": {"use_dora": True},
    "alora": {"alora_invocation_tokens": [1, 2]},
    "arrow": {"arrow_config": {"top_k": 1}},
    "goat": {"init_lora_weights": "goat", "init_config": {"experts": 2}},
}
"""The settings that ask for each formula."""
OTHERS: dict[str, dict[str, Any]] = {"rsLoRA": {"use_rslora": True}, "freeze_A": {"freeze_A": True}}
"""Settings of every formula."""
WORKS, SAME = "yes", ""
IN_GENERAL = {
    r"ask for two formulas": "Both form B A, or both say when an update counts: an adapter has one of a kind.",
    r"makes A and B of shapes": "The start makes A and B of other shapes than the formula stores.",
    r"routes tokens to parts of plain A and B": "GOAT's experts are parts of plain A and B.",
    r"decides by itself where it counts": "Arrow does not route to an adapter that decides by itself where it counts.",
    r"works by the gradient of A": "The formula is about the gradient of A.",
}
"""What an error says of settings of the toy -> what it says in general."""


def layer() -> nn.Module:
    torch.manual_seed(0)
    return Single(base_layer(LINEAR))


def routed(settings: dict[str, Any]) -> None:
    """An adapter with the settings as the expert of a router."""
    model = with_adapter(layer(), LINEAR, **settings)
    model.add_adapter("router", config_for(LINEAR, **ALONE["arrow"]))
    model.set_adapter("router")
    with torch.no_grad():
        model.eval()(torch.randn(3, weight_for(LINEAR).shape[-1]))


def refused(try_it: Callable[[], object]) -> str | None:
    """What the error says, in general where it names settings of the toy; None: there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try_it()
    except LoraError as error:
        general = next((text for pattern, text in IN_GENERAL.items() if re.search(pattern, str(error))), None)
        return general or str(error)
    return None


def pair(first: str, second: str) -> str | None:
    """Why two formulas do not go together; None: they do."""
    one, other = ({**ALONE, **OTHERS}[name] for name in (first, second))
    both = [key for key in one if key in other and one[key] != other[key]]
    if both:
        return f"Both are asked for by {both[0]}, which has one value."
    if "arrow" in (first, second):
        return refused(lambda: routed(other if first == "arrow" else one))
    return refused(lambda: with_adapter(layer(), LINEAR, **one, **other))


def start_with(start: str, formula: str) -> str | None:
    """Why a start does not go with a formula that is not asked for by a start of its own; None: it does."""
    asked = settings_of(find_start(start).value)  # type: ignore[union-attr]
    if formula == "arrow":
        return refused(lambda: routed(asked))
    return refused(lambda: with_adapter(layer(), LINEAR, **asked, **ALONE[formula]))


class Notes:
    """Reasons, numbered as they are met."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def cell(self, reason: str | None) -> str:
        if reason is None:
            return WORKS
        if reason not in self.found:
            self.found.append(reason)
        return f"no ({self.found.index(reason) + 1})"

    def lines(self) -> list[str]:
        return [f"{number}. {reason}" for number, reason in enumerate(self.found, 1)]


def _table(corner: str, columns: list[str], rows: dict[str, list[str]]) -> list[str]:
    head = [f"| {corner} | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 1)}"]
    return head + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]


def formulas() -> str:
    """The table of formulas with formulas."""
    notes, names = Notes(), list(ALONE)
    others = [*names[1:], *OTHERS]
    rows = {one: [SAME if one == other else notes.cell(pair(one, other)) for other in others] for one in names}
    return "\n".join([*_table("", others, rows), "", *notes.lines()])


def layers() -> str:
    """The table of formulas and kinds of layer."""
    kinds = LAYERS.names()
    rows = {name: [WORKS if kind in VARIANTS.get(name).hosts else "no" for kind in kinds] for name in ALONE}
    return "\n".join(_table("", kinds, rows))


def starts() -> str:
    """The table of starts with formulas."""
    notes = Notes()
    own = {INITIALIZERS.get(name).variant for name in INITIALIZERS.names()}
    columns = [name for name in ALONE if name not in own]
    rows = {
        name: [notes.cell(start_with(name, formula)) for formula in columns]
        for name in INITIALIZERS.names()
        if INITIALIZERS.get(name).variant is None
    }
    return "\n".join([*_table("start", columns, rows), "", *notes.lines()])


TABLES = {"formulas": formulas, "starts": starts, "layers": layers}


def with_tables(text: str) -> str:
    """A document with its tables made anew, each between ``<!-- name -->`` and ``<!-- end -->``."""
    for name, make in TABLES.items():
        before, rest = text.split(f"<!-- {name} -->\n")
        text = f"{before}<!-- {name} -->\n\n{make()}\n\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return text


if __name__ == "__main__":
    document = ROOT / "docs" / "variants.md"
    document.write_text(with_tables(document.read_text()))
