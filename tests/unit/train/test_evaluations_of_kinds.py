"""What a kind of model can be asked, and what is said of what it cannot."""

from __future__ import annotations

import pytest

from lorafa.errors import ConfigError
from lorafa.evals import EVALS
from lorafa.models.kinds import KINDS
from lorafa.models.kinds.entry import Kind
from lorafa.train.evaluation import evaluation_of, fitting, not_for
from lorafa.train.settings.run import EvalConfig

UNFIT = [
    (name, KINDS.get(kind))
    for name in EVALS.names()
    for kind in KINDS.names()
    if not EVALS.get(name).needs <= KINDS.get(kind).offers
]


def named_in(text: str) -> list[str]:
    found = text.partition("Give one of: ")[2].removesuffix(".")
    return found.split(", ") if found else []


@pytest.mark.parametrize(("name", "kind"), UNFIT, ids=[f"{name}-{kind.name}" for name, kind in UNFIT])
def test_what_is_given_in_its_place_works(name: str, kind: Kind) -> None:
    for other in named_in(not_for(name, kind)):
        assert evaluation_of(EvalConfig(name=other), kind).name == other
        assert EVALS.get(other).of_run
    in_eval = not_for(name, kind, of_run=False)
    assert in_eval.startswith(f"task={name} ")
    for other in named_in(in_eval):
        assert EVALS.get(other).read is not None
        assert EVALS.get(other).needs <= kind.offers


@pytest.mark.parametrize("kind", KINDS.names())
def test_every_kind_has_something_to_be_asked_for(kind: str) -> None:
    usual = KINDS.get(kind).usual_eval
    assert usual in fitting(KINDS.get(kind), of_run=True)
    assert fitting(KINDS.get(kind), of_run=False) or KINDS.get(kind).objective is not None


def test_what_nothing_measures_by_name_is_measured_by_its_run() -> None:
    text = not_for("gsm8k", KINDS.get("reward"), of_run=False)
    assert text.endswith("Such models are measured by the run that trains them (objective=reward), before and after.")


def test_what_asks_nothing_of_a_run_says_so_where_a_run_is_to_be_measured_by_it() -> None:
    for name in EVALS.names():
        entry = EVALS.get(name)
        if entry.of_run:
            continue
        own = entry.settings() if entry.settings else None
        assert entry.asks([], own) == []
        with pytest.raises(ConfigError, match=f"eval={name} asks nothing of a run"):
            entry.check(None, [], own)  # type: ignore[arg-type]


def test_a_classifier_is_recommended_what_tells_classes() -> None:
    kind = KINDS.get("classification")
    assert named_in(not_for("gsm8k", kind)) == ["accuracy", "loss"]
    assert named_in(not_for("gsm8k", kind, of_run=False)) == ["accuracy"]
