"""Forgetting from the command line: after a training, and measured again; what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorafa.cli.main import main
from lorafa.conf.compose import compose
from lorafa.errors import ConfigError
from toys.workplace import make_workplace, read, settings


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace with a finished run that has measured what it forgot."""
    folder = make_workplace(tmp_path_factory.mktemp("place"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAFA_CACHE", str(folder / "cache"))
        words = settings(folder, folder / "run")
        assert main(["train", *words, "eval.forgetting=true", "train.checkpoint_every=0", "eval.size=0"]) == 0
    return folder


@pytest.fixture(autouse=True)
def _cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFA_CACHE", str(place / "cache"))


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    capsys.readouterr()
    status = main(["eval", *map(str, words)])
    captured = capsys.readouterr()
    return status, " ".join((captured.out + captured.err).split())


def test_a_run_says_what_it_forgot_and_its_adapter_says_the_same(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = read(place / "run" / "result.json")["after"]["forgetting"]
    assert found["kl"] > 0
    assert found["texts"] == 64
    assert "forgetting" not in read(place / "run" / "result.json")["before"]
    capsys.readouterr()
    assert main(["eval", str(place / "run" / "adapter"), str(place / "run"), "task=forgetting", "--json"]) == 0
    adapter, run = json.loads(capsys.readouterr().out)
    assert (adapter["kl"], adapter["tokens"]) == (pytest.approx(found["kl"], rel=1e-5), found["tokens"])
    assert (run["difference"], run["measure"]) == (0.0, "kl")
    assert len(list((place / "cache" / "drawn").iterdir())) == 1


def test_rows_of_one_s_own_take_the_place_of_drawn_texts(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = said(capsys, place / "run", "task=forgetting", f"data={place / 'rows.jsonl'}")
    assert status == 0
    assert "KL to the base" in text


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["{place}/model", "task=forgetting"], 2, "There is no base to compare with: task=forgetting"),
        (["{place}/run", "task=forgetting", "eval.texts=0"], 2, "eval.texts must be an integer >= 1"),
        (["{place}/run", "task=forgetting", "eval.max_new_tokens=256"], 1, "exceeds the model's context of 256"),
        (["{place}/run", "task=gsm8k", "eval.forgetting=true"], 2, "of a training. Here give task=forgetting"),
    ],
)
def test_what_cannot_be_measured_is_an_error(
    place: Path, capsys: pytest.CaptureFixture[str], words: list[str], status: int, text: str
) -> None:
    found = said(capsys, *(word.format(place=place) for word in words))
    assert found[0] == status
    assert text in found[1]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["peft=full_ft", "eval.forgetting=true"], "the model whose adapters are off, and with peft.full"),
        (["peft.bias=all", "eval.forgetting=true"], "peft.bias=all trains biases of the base itself"),
    ],
)
def test_a_training_without_a_base_to_compare_with_is_refused(words: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        compose(words)


def test_a_training_does_not_take_forgetting_for_its_evaluation(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = [word for word in settings(place, tmp_path / "run") if not word.startswith("eval.")]
    assert main(["train", *words, "eval=forgetting"]) == 2
    assert "asks nothing of a run's held-out rows" in " ".join(capsys.readouterr().err.split())
