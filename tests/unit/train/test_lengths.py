"""Lengths given in passes over the rows, and warm-ups that are cut: what becomes of them in steps."""

from __future__ import annotations

import pytest

from lorafa.conf.compose import compose
from lorafa.errors import ConfigError
from lorafa.train.fit import check_length, in_steps, training_arguments
from lorafa.train.settings.optim import warmup_of


@pytest.mark.parametrize(
    ("rows", "epochs", "steps"),
    [(64, 1, 8), (63, 1, 7), (64, 0.5, 4), (64, 2.5, 20), (3, 1, 1), (100, 0.25, 3)],
)
def test_passes_between_measurements_are_whole_rows_then_whole_batches(rows: int, epochs: float, steps: int) -> None:
    """As the published scripts count: int(rows * epochs) // batch, and at least one step."""
    words = ["train.epochs=4", "train.batch_size=4", "train.accumulation=2"]
    config = compose([*words, f"train.eval_epochs={epochs}"])
    found = in_steps(config, rows).train
    assert (found.eval_every, found.eval_epochs) == (steps, None)
    arguments = training_arguments(in_steps(config, rows), "x")  # type: ignore[arg-type]
    assert (arguments.eval_strategy, arguments.eval_steps) == ("steps", steps)


@pytest.mark.parametrize(
    ("rows", "epochs", "steps"), [(64, 1, 8), (65, 1, 9), (18, 1, 3), (18, 2, 6), (64, 0.5, 4), (3, 0.1, 1)]
)
def test_a_checkpoint_is_made_where_a_pass_ends(rows: int, epochs: float, steps: int) -> None:
    words = ["train.epochs=4", "train.batch_size=4", "train.accumulation=2"]
    config = compose([*words, f"train.checkpoint_epochs={epochs}"])
    found = in_steps(config, rows)
    assert (found.train.checkpoint_every, found.train.checkpoint_epochs) == (steps, None)
    assert training_arguments(found, "x").save_steps == steps  # type: ignore[arg-type]
    best = in_steps(compose([*words, f"train.checkpoint_epochs={epochs}", "train.keep_best=true"]), rows)
    assert training_arguments(best, "x").eval_steps == steps  # type: ignore[arg-type]


@pytest.mark.parametrize(("processes", "steps", "pass_"), [(1, 8, 8), (2, 4, 4), (3, 2, 3)])
def test_a_pass_of_several_processes_is_as_many_steps_as_they_take_together(
    processes: int, steps: int, pass_: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafa.train.fit.world_size", lambda: processes)
    words = ["train.epochs=1", "train.batch_size=4", "train.accumulation=2"]
    found = in_steps(compose([*words, "train.eval_epochs=1", "train.checkpoint_epochs=1"]), 64).train
    assert (found.eval_every, found.checkpoint_every) == (steps, pass_)


def test_without_passes_everything_is_left_as_it_was_said() -> None:
    config = compose(["train.epochs=2", "train.eval_every=3"])
    assert in_steps(config, 100) == config


@pytest.mark.parametrize(("steps", "expected"), [(1000, 100), (101, 100), (100, 99), (7, 6), (1, 0)])
def test_a_warm_up_is_cut_to_one_step_less_than_the_training(steps: int, expected: int) -> None:
    optim = compose(["optim.warmup=100", "optim.shorten_warmup=true"]).optim
    assert warmup_of(optim, steps) == expected
    config = compose(["optim.warmup=100", "optim.shorten_warmup=true", f"train.steps={steps}"])
    assert in_steps(config, 50).optim.warmup == expected


def test_a_warm_up_that_is_a_share_stays_one() -> None:
    assert warmup_of(compose(["optim.warmup=0.5", "optim.shorten_warmup=true"]).optim, 1) == 0.5


def test_without_leave_a_long_warm_up_is_refused_in_passes_too() -> None:
    with pytest.raises(ConfigError, match=r"optim\.warmup=100 steps are the whole training"):
        compose(["optim.warmup=100", "train.steps=100"])
    words = ["optim.warmup=100", "train.epochs=1"]
    with pytest.raises(ConfigError, match=r"are the whole training \(train\.epochs=1, 2 steps\)"):
        check_length(compose(words), 16)
    check_length(compose([*words, "optim.shorten_warmup=true"]), 16)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.eval_every=2", "train.eval_epochs=1"], r"train\.eval_every=2 and train\.eval_epochs=1 say the same"),
        (["train.checkpoint_every=40", "train.checkpoint_epochs=1"], r"train\.checkpoint_every=40 and train\.checkpoi"),
        (["train.eval_epochs=0"], r"train\.eval_epochs must be a number > 0"),
        (["train.keep_best=true", "train.eval_epochs=1"], r"keep_best measures at every checkpoint .*eval_epochs=1\.0"),
    ],
)
def test_lengths_that_contradict_each_other_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(words)


def test_passes_serve_what_goes_by_the_held_out_loss() -> None:
    assert compose(["train.eval_epochs=1", "train.patience=2"]).train.measures
    assert compose(["train.eval_epochs=1", "optim.schedule=reduce_lr_on_plateau"]).train.measures
    best = ["train.keep_best=true", "train.checkpoint_epochs=1"]
    assert compose(best).train.measures
    assert compose([*best, "train.eval_epochs=1"]).train.measures
    assert not compose().train.measures
