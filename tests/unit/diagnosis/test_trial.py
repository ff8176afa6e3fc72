"""Trials in another process: whatever a package does there, the rest goes on and the screen stays clean."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lorafa.diagnosis.trial import Outcome, outcomes

Make = Callable[..., list[str]]


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Write modules with this code, and give the trials that import them."""

    def make(**codes: str) -> list[str]:
        for name, code in codes.items():
            (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
        return [f"use:{name}" for name in codes]

    return make


def made(jobs: list[str], patience: float = 60) -> dict[str, Outcome]:
    return dict(outcomes(jobs, patience))


def test_an_import_that_fails_is_told_with_its_error_and_the_others_go_on(modules: Make) -> None:
    found = made(modules(odd_one="raise RuntimeError('no kernel\\n  image')", odd_two="x = 1"))
    assert found["use:odd_one"].error == "RuntimeError: no kernel image"
    assert found["use:odd_two"] == Outcome()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; os.write(1, b'bye'); os._exit(3)", "It ended the whole process (exit status 3). Last words: bye"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "It ended the whole process (signal SIGSEGV)."),
        ("import sys; sys.exit(7)", "SystemExit: 7"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt:"),
        ("import sys; sys.stdout = sys.stderr = None", None),
        ("import os; os.close(0); os.close(1); os.close(2)", None),
    ],
    ids=["it exits", "it crashes", "it leaves", "it interrupts", "it takes the streams away", "it closes them"],
)
def test_an_import_that_ends_the_interpreter_is_one_line(code: str, said: str | None, modules: Make) -> None:
    found = made(modules(odd_first="x = 1", odd_bad=code, odd_last="y = 2"))
    assert found["use:odd_bad"].error == said
    assert found["use:odd_first"].well
    assert found["use:odd_last"].well
    assert list(found) == ["use:odd_first", "use:odd_bad", "use:odd_last"]


def test_an_import_without_end_is_ended(modules: Make) -> None:
    found = made(modules(odd_slow="import time; print('wait', flush=True); time.sleep(600)", odd_last="y = 2"), 3)
    assert found["use:odd_slow"].error == "It had not ended after 3 s."
    assert found["use:odd_slow"].written == "wait\n"
    assert found["use:odd_last"].well


def test_what_is_written_by_any_way_is_kept_and_not_shown(modules: Make, capfd: pytest.CaptureFixture[str]) -> None:
    code = "import os, sys; print('one'); print('two', file=sys.stderr); os.write(1, b'three\\n'); os.system('echo 4')"
    found = made(modules(odd_loud=code, odd_still="x = 1", odd_long="print('a' * 10**6)"))
    assert sorted(found["use:odd_loud"].written.split()) == ["4", "one", "three", "two"]
    assert found["use:odd_still"].written == ""
    assert len(found["use:odd_long"].written) < 2100
    assert len(found["use:odd_long"].first_written()) < 300
    assert capfd.readouterr() == ("", "")


def test_a_name_that_a_module_lacks_is_told(modules: Make) -> None:
    modules(odd_lazy="def __getattr__(name): raise ImportError(f'{name} needs another version')")
    assert made(["use:odd_lazy=Trainer"])["use:odd_lazy=Trainer"].error == "ImportError: Trainer needs another version"


def test_an_interpreter_that_does_not_come_up_fails_each_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["/nowhere"])
    found = made(["use:json", "use:os"])
    assert [outcome.error is not None for outcome in found.values()] == [True, True]
    assert "ModuleNotFoundError" in str(found["use:json"].error)


def test_closing_early_ends_the_process(modules: Make, tmp_path: Path) -> None:
    sign = tmp_path / "sign"
    jobs = modules(odd_first="x = 1", odd_slow=f"import time; time.sleep(3); open({str(sign)!r}, 'w')")
    going = outcomes(jobs, 60)
    next(going)
    going.close()
    assert list(going) == []
    assert not sign.exists()
