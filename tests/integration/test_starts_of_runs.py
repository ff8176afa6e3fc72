"""`lorafa train` with starts from data: what is chosen by the rows is in the run's result and in its adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_toys import make_workplace, read, settings

from lorafa.cli.main import main


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
