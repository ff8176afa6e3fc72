"""A run that stops where the held-out loss no longer falls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorafa.cli.main import main
from lorafa.conf.compose import compose
from lorafa.errors import ConfigError
from lorafa.train import recipe
from lorafa.train.fit import run_out
from toys.workplace import make_workplace, metrics, read, settings

NAN = float("nan")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"))


@pytest.mark.parametrize(
    ("losses", "patience", "stops"),
    [
        ([3, 2, 1], 1, False),
        ([3, 2, 2], 1, True),
        ([1, 2, 3], 2, True),
        ([1, 2, 0.5], 2, False),
        ([1, NAN, NAN], 2, True),
        ([NAN, 1, 2], 2, False),
        ([], 1, False),
    ],
)
def test_it_stops_after_so_many_measurements_without_a_lower_one(
    losses: list[float], patience: int, stops: bool
) -> None:
    log: list[dict[str, float]] = [{"step": 1, "loss": 0}]
    log += [{"step": step, "eval_loss": loss} for step, loss in enumerate(losses, 2)]
    assert (run_out(log, patience) is not None) == stops
    assert run_out(log, None) is None


def test_patience_needs_measurements() -> None:
    with pytest.raises(ConfigError, match=r"train\.patience=2 counts measurements .* Set train\.eval_every"):
        compose(["train.patience=2"])


RISING = ["train.steps=40", "train.checkpoint_every=2", "train.keep_best=true", "train.patience=3", "optim.lr=30"]


def test_a_run_that_stops_early_says_so_and_ends_with_the_best(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = [*RISING, "optim.schedule=constant", "optim.warmup=0", "eval.size=0"]
    assert main(["train", *settings(workplace, whole), *more]) == 0
    result = read(whole / "result.json")
    losses = [row["eval_loss"] for row in metrics(whole) if "eval_loss" in row]
    assert result["steps"] == 2 * len(losses) < 40
    assert losses.index(min(losses)) == len(losses) - 4
    assert result["kept_step"] == 2 * (len(losses) - 3)
    assert result["after"]["loss"] == pytest.approx(min(losses), rel=1e-4)
    assert "the held-out loss has not fallen in 3 measurements since step" in result["stopped"]
    assert f"Stopped after step {result['steps']}: " in capsys.readouterr().out

    original = recipe.measure

    def measure(*args: Any) -> dict[str, Any]:
        if args[-1] == "After":
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "measure", measure)
        assert main(["train", *settings(workplace, cut), *more]) == 130
    assert main(["train", f"train.resume={cut}"]) == 0
    again = read(cut / "result.json")
    for name in ("steps", "stopped", "after", "kept_step"):
        assert again[name] == result[name], name
