"""A model that does not fit is refused with figures before anything of it is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafa.conf.compose import compose
from lorafa.costs import fits
from lorafa.costs.fits import in_words, left_after, require_room
from lorafa.costs.memory import Memory
from lorafa.errors import SourceError
from toys.workplace import make_workplace


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_workplace(tmp_path_factory.mktemp("work")) / "model")


def available(monkeypatch: pytest.MonkeyPatch, number: int | None) -> None:
    monkeypatch.setattr(fits, "available_bytes", lambda: number)


def test_a_run_that_does_not_fit_is_refused_with_the_figures(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, 100_000)
    with pytest.raises(SourceError) as caught:
        require_room(compose([f"model={model}", "peft.r=4"]))
    assert str(caught.value) == (
        f"The model {model!r} does not fit: the run needs at least 0.1 MiB (weights 0.1 MiB, adapter 0.0 MiB, "
        "optimizer state 0.0 MiB), and 0.1 MiB are available. Nothing was loaded. `lorafa plan` counts activations "
        "too. Take a smaller model, or go on all the same with model.check_memory=false."
    )
    with pytest.raises(SourceError, match=r"Take a smaller model, model\.dtype=bfloat16, or"):
        require_room(compose([f"model={model}", "peft.r=4", "model.dtype=float32"]))


def test_a_run_that_fits_goes_on(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, 180_000)
    require_room(compose([f"model={model}", "peft.r=1"]))
    with pytest.raises(SourceError, match="does not fit"):  # its optimizer state is what does not
        require_room(compose([f"model={model}", "peft.r=16"]))


def test_the_check_can_be_left_out_and_needs_to_know_the_memory(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, 1)
    require_room(compose([f"model={model}", "model.check_memory=false"]))
    available(monkeypatch, None)
    require_room(compose([f"model={model}"]))


def test_where_weights_are_a_small_share_nothing_is_counted(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, 2**40)
    monkeypatch.setattr(fits, "shape_of", lambda *_: pytest.fail("counted"))
    require_room(compose([f"model={model}"]))


def test_a_model_of_pickles_is_let_pass(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, 1)
    (tmp_path / "config.json").write_text((Path(model) / "config.json").read_text())
    require_room(compose([f"model={tmp_path}"]))


def test_figures_leave_out_what_is_not_there_and_the_process() -> None:
    memory = Memory(7, 3 * 2**30, 0, 2**20, 0, 0, 0, 0, 0, 0)
    assert in_words(memory) == "3.00 GiB (weights 3.00 GiB, optimizer state 1.0 MiB)"


def test_what_is_left_counts_this_process_once(monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, 1000)
    monkeypatch.setattr(fits, "resident_bytes", lambda: 500)
    assert left_after(Memory(500, 300, 0, 0, 0, 0, 0, 0, 0, 0)) == 700
    assert left_after(Memory(500, 1300, 0, 0, 0, 0, 0, 0, 0, 0)) == -300
    available(monkeypatch, None)
    assert left_after(Memory(500, 300, 0, 0, 0, 0, 0, 0, 0, 0)) is None
