"""`lorafa train` with starts from data: what is chosen by the rows is in the run's result and in its adapter."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lorafa.cli.main import main
from toys.pages import axes_of, curves, heights, legend
from toys.workplace import make_workplace, read, settings


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"))


def started(workplace: Path, run: Path, *own: str) -> tuple[dict[str, int], dict[str, object]]:
    """Ranks by layer, and the config of the adapter."""
    short = ["eval.size=0", "eval.before=false", "train.steps=1", "train.checkpoint_every=0", "init.iters=2"]
    assert main(["train", *settings(workplace, run), *short, *own]) == 0
    return read(run / "result.json")["start"]["ranks"], read(run / "adapter" / "adapter_config.json")


def test_gora_shares_ranks_out_by_itself(workplace: Path, tmp_path: Path) -> None:
    ranks, config = started(workplace, tmp_path / "shared", "init=gora", "peft=rslora", "peft.r=4")
    assert len(set(ranks.values())) > 1
    assert all(2 <= rank <= 16 for rank in ranks.values())
    assert config["alpha_pattern"] == {}
    kept, _ = started(workplace, tmp_path / "kept", "init=gora", "init.share_ranks=false")
    assert set(kept.values()) == {4}


def test_the_report_of_a_run_draws_its_spectra_and_holds_the_table_of_its_ranks(
    workplace: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ranks, _ = started(workplace, run, "init=lora_one", "init.ranks=budget")
    kinds = list(dict.fromkeys(layer.rpartition(".")[2] for layer in ranks))
    by_kind = {kind: [rank for layer, rank in ranks.items() if layer.endswith(kind)] for kind in kinds}
    assert len(set(ranks.values())) > 1
    assert [len(chosen) for chosen in by_kind.values()] == [2] * 7
    page = (run / "report.html").read_text(encoding="utf-8")
    left, right = axes_of(page, drawing=1)
    colours = legend(left)
    assert list(colours) == kinds
    assert curves(left) == list(colours.values())
    assert heights(right) == {colours[kind]: pytest.approx(chosen) for kind, chosen in by_kind.items()}
    for kind, (one, other) in by_kind.items():
        spread = f"{one}" if one == other else f"{min(one, other)} to {max(one, other)}, median {(one + other) / 2:g}"
        assert re.search(rf"<tr><td>{kind}</td><td>2</td><td>{spread}</td><td>[\d.]+%</td></tr>", page), kind
