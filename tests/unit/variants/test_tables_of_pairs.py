"""The tables of docs/variants.md are those that trying gives, and what they say works is under the laws."""

from __future__ import annotations

from lorafa.variants import VARIANTS
from toys.adapters import VARIANT
from toys.pairs import ALONE, pair, with_tables
from toys.places import ROOT

DOCUMENT = (ROOT / "docs" / "variants.md").read_text()


def test_the_tables_are_those_of_today() -> None:
    assert with_tables(DOCUMENT) == DOCUMENT, "run: PYTHONPATH=tests python -m toys.pairs"


def test_every_formula_is_in_the_tables() -> None:
    assert set(ALONE) == set(VARIANTS.names())
    assert all(f"| `{name}` | {VARIANTS.get(name).stage} |" in DOCUMENT for name in ALONE)


def test_every_norm_that_goes_over_a_formula_is_under_the_laws_over_it() -> None:
    """Gates are under theirs over every formula of test_gates.py."""
    stages = {name: VARIANTS.get(name).stage for name in ALONE}
    over = {
        f"{norm} over {inner}"
        for norm in ALONE
        for inner in ALONE
        if stages[norm] == "norm" and stages[inner] == "factors" and inner != "lora" and pair(norm, inner) is None
    }
    assert over
    assert over <= set(VARIANT)
