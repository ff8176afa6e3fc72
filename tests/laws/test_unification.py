"""The page on the unification holds the table of the registry, and every start of ours is a row of it."""

from __future__ import annotations

from dataclasses import fields, replace

from lorafa.initializers import INITIALIZERS
from lorafa.initializers.base import Stages
from lorafa.initializers.unification import table
from toys.places import ROOT

PAGE = (ROOT / "docs" / "unification.md").read_text(encoding="utf-8")


def test_the_page_has_the_table_of_the_registry() -> None:
    assert f"\n\n{table()}\n" in PAGE, "docs/unification.md: python -m lorafa.initializers.unification prints its table"


def test_every_start_says_its_stages_and_none_is_empty() -> None:
    starts = {name: INITIALIZERS.get(name) for name in INITIALIZERS.names()}
    assert [name for name, start in starts.items() if start.stages is None] == []
    for name, start in starts.items():
        assert all(getattr(start.stages, field.name) for field in fields(Stages)), name
    assert table().count("\n") == len(starts) + 2


def test_the_stages_agree_with_what_a_start_declares_and_does() -> None:
    for name in INITIALIZERS.names():
        start = INITIALIZERS.get(name)
        stages = start.stages
        assert stages is not None
        if name not in ("random",):
            moved = not stages.base.startswith("kept")
            assert moved == (start.moves_base or start.quantizer is not None), name
        reads = any("gradient" in need for need in start.needs)
        assert reads == ("G" in stages.target), name
        if stages.objective == "zero product" and start.variant is None:
            assert start.keeps_function, name
        if start.reads_weight and not start.needs and stages.target == "W":
            assert stages.metric == "identity", name


def test_a_start_from_outside_without_stages_has_no_row() -> None:
    silent = replace(INITIALIZERS.get("kaiming"), stages=None)
    with INITIALIZERS.added("silent", silent):
        assert "silent" not in table()
