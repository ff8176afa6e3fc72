"""Code that comes with a model runs where the user has said so this time, and nowhere else."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lorafa import AutoPeftModelForCausalLM, LoraConfig, get_peft_model, merge_to_folder
from lorafa.auto import load_base
from lorafa.cli.main import main
from lorafa.conf.compose import compose
from lorafa.errors import SourceError
from lorafa.export.base import facts_of
from lorafa.export.job import export_adapter
from lorafa.io.verify_folder import check_merged_folder
from lorafa.models.load import load_model, load_tokenizer
from lorafa.models.shapes import shape_model
from lorafa.settings.typed import plain
from toys.own_code import give_own_code, keep_code_in
from toys.workplace import make_teacher, make_workplace, settings

REFUSED = r"comes with code of its own \(auto_map\).*model\.trust_remote_code=true"
TRUST = "model.trust_remote_code=true"


class Place:
    """A workplace whose model needs its own code."""

    def __init__(self, path: Path) -> None:
        self.path, self.ran = make_workplace(path), path / "ran"
        make_teacher(path)
        give_own_code(path / "model", self.ran)

    @property
    def model(self) -> str:
        return str(self.path / "model")

    def has_run(self) -> bool:
        """Whether the code has run since this was asked last; what transformers has loaded of it is forgotten."""
        found = self.ran.exists()
        self.ran.unlink(missing_ok=True)
        for name in [name for name in sys.modules if name.startswith("transformers_modules.")]:
            del sys.modules[name]
        return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("own"))


@pytest.fixture(autouse=True)
def _apart(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_code_in(tmp_path / "modules", monkeypatch)
    place.has_run()


def lorafa(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    capsys.readouterr()
    status = main(list(words))
    return status, " ".join(capsys.readouterr().err.split())


def short(place: Place, run: Path) -> list[str]:
    usual = [text for text in settings(place.path, run) if not text.startswith("eval.")]
    return [*usual, "train.steps=4", "eval=loss", "optim.schedule=constant"]


def test_a_library_call_refuses_the_code_by_name_and_runs_it_where_it_is_trusted(place: Place) -> None:
    for call in (load_model, shape_model):
        with pytest.raises(SourceError, match=REFUSED):
            call(place.model)
        assert not place.has_run()
        call(place.model, trust_remote_code=True)
        assert place.has_run()
    model, _ = load_model(place.model, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"


def test_a_tokenizer_with_code_is_refused_by_name(place: Place, tmp_path: Path) -> None:
    shutil.copytree(place.model, folder := tmp_path / "model")
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.OwnConfig", null]}}'
    )
    with pytest.raises(SourceError, match=REFUSED):
        load_tokenizer(str(folder))
    assert not place.has_run()


def test_a_run_and_what_measures_it_are_told_each_time(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    status, said = lorafa(capsys, "train", *short(place, run))
    assert (status, "model.trust_remote_code=true" in said) == (1, True), said
    assert not run.exists()
    assert not place.has_run()
    assert lorafa(capsys, "train", *short(place, run), TRUST)[0] == 0
    assert place.has_run()
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["trust_remote_code"] is True
    for words in (
        ["train", f"train.resume={run}", "train.steps=6", "--dry-run"],
        ["plan", f"train.resume={run}", "train.steps=6"],
        ["eval", str(run)],
        ["eval", f"{run}/adapter", "task=perplexity", f"data={place.path / 'rows.jsonl'}"],
        ["generate", str(run), str(place.path / "rows.jsonl"), "--max-new-tokens", "2"],
        ["params", f"model={place.model}"],
    ):
        shutil.rmtree(run / "finished", ignore_errors=True)
        (run / "result.json").write_text((run / "result.json").read_text().replace('"finished"', '"failed"'))
        status, said = lorafa(capsys, *words)
        assert (status, "comes with code of its own" in said) == (1, True), (words, said)
        assert not place.has_run(), words
        assert lorafa(capsys, *words, TRUST)[0] == 0, words
        assert place.has_run(), words


def test_a_run_of_the_same_settings_goes_on_where_the_code_is_trusted_again(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", *short(place, tmp_path / "run"), "if_exists=resume"]
    assert lorafa(capsys, *words, TRUST)[0] == 0
    assert lorafa(capsys, *words, TRUST)[0] == 0  # finished: nothing is loaded
    result = tmp_path / "run" / "result.json"
    result.write_text(result.read_text().replace('"finished"', '"failed"'))
    place.has_run()
    status, said = lorafa(capsys, *words)
    assert (status, "model.trust_remote_code=true" in said) == (1, True), said
    assert not place.has_run()
    assert lorafa(capsys, *words, TRUST)[0] == 0


def test_a_teacher_has_a_setting_of_its_own(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place.path / "teacher", teacher := tmp_path / "teacher")
    give_own_code(teacher, ran := tmp_path / "teacher ran")
    words = ["train", *short(place, tmp_path / "run"), TRUST, "align=external", f"align.teacher={teacher}"]
    status, said = lorafa(capsys, *words)
    assert (status, "align.trust_remote_code=true" in said) == (1, True), said
    assert not ran.exists()
    status, said = lorafa(capsys, *words, "align.trust_remote_code=true", "if_exists=new")
    assert status == 0, said
    assert ran.exists()


def test_trust_in_a_teacher_that_is_not_there_is_refused(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", *short(place, tmp_path / "run"), "--dry-run", "align.trust_remote_code=true"]
    status, said = lorafa(capsys, *words)
    assert (status, "align.trust_remote_code=true would change nothing: there is no teacher" in said) == (2, True), said
    status, said = lorafa(capsys, *words, "align=base")
    assert (status, "align.trust_remote_code=True would change nothing here" in said) == (2, True), said


@pytest.fixture
def adapter(place: Place, tmp_path: Path) -> str:
    model, _ = load_model(place.model, trust_remote_code=True)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    model.save_pretrained(tmp_path / "adapter")
    place.has_run()
    return str(tmp_path / "adapter")


def test_base_and_adapter_at_once(place: Place, adapter: str) -> None:
    with pytest.raises(SourceError, match=REFUSED):
        facts_of(LoraConfig.from_pretrained(adapter))
    assert facts_of(LoraConfig.from_pretrained(adapter), trust_remote_code=True).architecture == "OwnForCausalLM"
    place.has_run()
    for call in (AutoPeftModelForCausalLM.from_pretrained, load_base):
        with pytest.raises(SourceError, match=REFUSED):
            call(adapter)
        assert not place.has_run()
        assert call(adapter, trust_remote_code=True) is not None
        assert place.has_run()
    with pytest.raises(SourceError, match=REFUSED):
        AutoPeftModelForCausalLM.from_pretrained(adapter, trust_remote_code=None)
    assert not place.has_run()


def test_merging_exporting_and_looking_into(
    place: Place, adapter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = str(shutil.copytree(adapter, tmp_path / "other"))
    for number, words in enumerate((
        ["merge", adapter, "--verify", "--out"], ["export", adapter, "--for", "peft", "--merged", "--out"],
        ["combine", adapter, other, "--base", place.model, "--out"],
        ["inspect", adapter, "--base", place.model, "--page"],
    )):  # fmt: skip
        out = str(tmp_path / f"{number}.html")
        status, said = lorafa(capsys, *words, out)
        assert (status, "--trust-remote-code" in said) == (1, True), (words, said)
        assert not place.has_run(), words
        assert lorafa(capsys, *words, out, "--trust-remote-code")[0] == 0, words
        assert place.has_run(), words


def test_a_merged_folder_is_that_of_the_models_own_class(place: Place, adapter: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=REFUSED):
        merge_to_folder(adapter, tmp_path / "merged")
    merge_to_folder(adapter, tmp_path / "merged", trust_remote_code=True)
    check_merged_folder(tmp_path / "merged", adapter, trust_remote_code=True).require_explained()
    export_adapter(adapter, "peft", tmp_path / "exported", merged=True, trust_remote_code=True)
    one, _ = load_model(str(tmp_path / "merged"), trust_remote_code=True)
    other, _ = load_model(str(tmp_path / "exported"), trust_remote_code=True)
    assert type(one).__name__ == "OwnForCausalLM"
    torch.testing.assert_close(dict(one.named_parameters()), dict(other.named_parameters()))


def test_a_chat_is_told_by_an_option(place: Place, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    status, said = lorafa(capsys, "chat", place.model)
    assert (status, "--trust-remote-code" in said) == (1, True), said
    assert not place.has_run()
    assert lorafa(capsys, "chat", place.model, "--trust-remote-code")[0] == 0
    assert place.has_run()


# ---- functions of the user's -----------------------------------------------------------------------------------------


@pytest.fixture
def rewarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that somebody else may have made, beside the module that its record names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs.py").write_text("open('ran', 'w')\n\n\ndef short(**_):\n    return [0.0]\n")
    asked = ["model=model", "data=rows.jsonl", "objective=grpo", "objective.reward=theirs:short", "run_dir=run"]
    record = yaml.safe_dump(plain(compose(asked)))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(record)
    (tmp_path / "run" / "result.json").write_text('{"status": "failed"}')
    return tmp_path


@pytest.mark.parametrize("more", [[], ["--dry-run"], ["objective=grpo", "objective.reward=theirs:other"]], ids=str)
def test_a_reward_that_a_record_names_is_named_again_or_does_not_run(
    rewarded: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    assert main(["train", "train.resume=run", *more]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "The record names functions as rewards (theirs:short), and code runs only where it is named each" in said
    assert "add to train.resume: objective=grpo 'objective.reward=[theirs:short]'." in said
    assert not (rewarded / "ran").exists()


def test_named_again_it_is_the_run_s_own(rewarded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "train.resume=run", "objective=grpo", "objective.reward=[theirs:short]"]) != 0
    assert "has no checkpoint to continue from" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("more", [["objective=dpo"], ["objective=grpo", "objective.reward=exact_match"]], ids=str)
def test_other_objectives_are_no_settings_of_a_run_that_goes_on(
    rewarded: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    assert main(["train", "train.resume=run", *more]) == 2
    assert "A continued run keeps its settings" in " ".join(capsys.readouterr().err.split())


def test_a_run_without_such_a_reward_gets_none(rewarded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (rewarded / "run" / "config.yaml").write_text(yaml.safe_dump(plain(compose(["model=model", "data=rows.jsonl"]))))
    assert main(["train", "train.resume=run", "objective=grpo", "objective.reward=theirs:short"]) == 2
    assert "A continued run keeps its rewards" in " ".join(capsys.readouterr().err.split())
    assert not (rewarded / "ran").exists()
