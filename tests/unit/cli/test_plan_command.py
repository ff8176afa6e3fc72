"""`lorafa plan`: coverage, memory and recommendations on the terminal and as JSON, of names, folders and settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorafa.cli import main as cli
from lorafa.costs import fits
from lorafa.data.sources import load_records
from lorafa.models import load
from toys.workplace import make_workplace


def plan(*arguments: str) -> int:
    try:
        return cli.main(["plan", *arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"))


def settings(place: Path) -> list[str]:
    return [
        f"model={place / 'model'}", f"data={place / 'rows.jsonl'}", "data.eval_size=4", "peft.r=4", "train.steps=3",
        "train.batch_size=4", "eval.max_new_tokens=8", "train.checkpoint_every=0",
    ]  # fmt: skip


def planned(place: Path, capsys: pytest.CaptureFixture[str], *more: str) -> Any:
    assert plan("--json", *settings(place), *more) == 0
    return json.loads(capsys.readouterr().out)


def test_tables_and_reasons_are_shown(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(*settings(place)) == 0
    text = capsys.readouterr().out
    for title in ("What is adapted", "What the run takes at its peak", "What to set"):
        assert title in text
    words = " ".join(text.split())
    assert "peft.lora_alpha=32: Twice the rank" in words
    assert "But published guides say 4 to 8 for a model of this size" in words
    assert "Counted for the rows of" in words
    assert "a training batch of 4 x" in words
    assert "The run fits:" in words or "left" not in words  # where the system tells how much there is


def test_json_holds_the_same_and_the_parts_add_up(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(place, capsys)
    total = found["memory"].pop("total")
    assert total == sum(found["memory"].values())
    assert found["stored"]["by_dtype"] == {"F32": found["stored"]["bytes"]}
    assert found["trained"] == sum(row["trainable"] for row in found["coverage"])
    assert {each["setting"] for each in found["advice"]} >= {"peft.r", "optim.lr", "init", "optim"}
    assert "probe" not in found


def test_the_batch_is_the_longest_the_run_makes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batches = planned(place, capsys)["batches"]
    tokenizer: Any = load.load_tokenizer(str(place / "model"))
    from lorafa.data.chat import encode_all

    records = load_records(str(place / "rows.jsonl"), train_size=None, eval_size=4, seed=0)
    samples = encode_all(records.train, tokenizer, 1024).samples
    assert batches["training"]["tokens"] == max(len(sample.input_ids) for sample in samples)
    assert (batches["training"]["rows"], batches["heldout"]["rows"], batches["asked"]["new_tokens"]) == (4, 4, 8)
    assert batches["steps"] == 3


def test_a_model_known_by_its_shape_is_planned_with_the_bounds_of_the_settings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert plan("--json", "model=opt-125m", "data.max_length=32", "train.batch_size=2", "eval.batch_size=2") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 125_239_296
    assert found["stored"] is None
    notes = " ".join(found["notes"])
    assert "opt-125m is known by its shape only, without a tokenizer" in notes
    assert "No safetensors headers could be read: the weights are counted by the config alone." in notes
    rate = next(each for each in found["advice"] if each["setting"] == "optim.lr")
    assert "not known for this family" in rate["reason"]


def test_rows_of_the_hub_are_not_fetched(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(place, capsys, "data=nobody/rows", "data.max_length=40")
    assert found["batches"]["training"]["tokens"] == 40
    assert "the rows of nobody/rows are not fetched for a plan" in found["notes"][0]


def test_a_probe_measures_two_real_steps(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    probe = planned(place, capsys, "--probe")["probe"]
    assert probe["seconds"] > 0
    assert probe["tokens_a_second"] > 0
    assert probe["training_seconds"] > 0
    assert probe["peak_rss_bytes"] > 0
    assert sorted(path.name for path in place.iterdir()) == ["model", "rows.jsonl"]
    assert plan("--probe", *settings(place)) == 0
    assert "Measured:" in capsys.readouterr().out


def test_a_start_from_data_says_what_is_left_out(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes = planned(place, capsys, "init=lora_one")["notes"]
    assert "What init=lora_one collects of the data before the training is not counted." in notes
    notes = planned(place, capsys, "model.quantize=nf4")["notes"]
    assert "model.quantize=nf4 is not counted: the base is counted as if it were dense." in notes


def test_what_forgetting_draws_is_said_to_be_left_out(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note = "What eval.forgetting draws and compares is not counted."
    assert note in planned(place, capsys, "eval.forgetting=true")["notes"]
    assert note not in planned(place, capsys)["notes"]


def test_a_run_that_is_continued_is_planned_with_its_settings(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    first = [*settings(place), "train.checkpoint_every=1", "optim.schedule=constant", f"run_dir={run}"]
    assert cli.main(["train", *first]) == 0
    capsys.readouterr()
    assert plan("--json", f"train.resume={run}") == 2
    assert "is finished; there is nothing to continue" in " ".join(capsys.readouterr().err.split())
    assert plan("--json", f"train.resume={run}", "peft.r=8") == 2
    assert "A continued run keeps its settings, found 'peft.r=8' beside train.resume" in " ".join(
        capsys.readouterr().err.split()
    )
    assert plan("--json", f"train.resume={run}", "train.steps=9") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == str(place / "model")
    assert found["batches"]["steps"] == 9
    assert found["trained"] == planned(place, capsys)["trained"]


def test_an_adapter_that_a_run_goes_on_with_is_counted_by_its_own_config(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = [*settings(place), "peft.target_modules=[q_proj]"]
    assert cli.main(["train", *words, f"run_dir={run}"]) == 0
    capsys.readouterr()
    whole = planned(place, capsys)["trained"]
    more = [word for word in settings(place) if not word.startswith("peft.")]
    assert plan("--json", *more, f"peft.adapter={run / 'adapter'}") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["trained"] == json.loads((run / "result.json").read_text())["parameters"]["trainable"] < whole


def test_an_accelerator_is_said_to_be_left_out(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    plain = planned(place, capsys)["notes"]
    assert "Counted for one process; each of several takes as much, for its own batch." in plain
    assert not any("accelerator" in note for note in plain)
    monkeypatch.setattr("lorafa.cli.plan.accelerator_here", lambda: torch.device("cuda").type)
    notes = planned(place, capsys)["notes"]
    assert any(note.startswith("There is an accelerator (cuda), where a run computes.") for note in notes)
    assert notes[-1].endswith("Whether it does there is not known.")


def test_without_activations_it_does_not_say_that_the_run_fits(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(*_: Any) -> Any:
        raise RuntimeError("no numbers here")

    monkeypatch.setattr("lorafa.costs.memory.course_of", without)
    notes = planned(place, capsys)["notes"]
    assert notes[-1].startswith("Whether the run fits is not known: ")
    monkeypatch.setattr(fits, "available_bytes", lambda: 1)
    monkeypatch.setattr(fits, "resident_bytes", lambda: 0)
    assert planned(place, capsys)["notes"][-1].startswith("THE RUN DOES NOT FIT: at least ")


def test_a_count_that_takes_long_shows_how_far_it_is_beside_the_answer(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan("--json", *settings(place)) == 0
    out, err = capsys.readouterr()
    json.loads(out)
    assert "Counting evaluations and a step" in " ".join(err.split())
    assert "3/3" in err


def test_a_template_that_is_named_writes_the_rows(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "long.jinja"
    template.write_text(
        "{% for m in messages %}<|{{ m['role'] }}|>a longer way to say it: {{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>a longer way to say it: {% endif %}"
    )
    plain = planned(place, capsys)["batches"]["training"]["tokens"]
    assert planned(place, capsys, f"data.template={template}")["batches"]["training"]["tokens"] > plain


def test_packed_rows_are_counted_as_the_model_reads_them(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(place, capsys, "train.packing=true", "data.max_length=128", "model.attention=eager")
    assert "positions_of_samples" in found["batches"]["training"]["shapes"]
    assert not any("not counted: its code" in note for note in found["notes"])


def test_a_run_that_does_not_fit_is_planned_all_the_same_and_said(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fits, "available_bytes", lambda: 1)
    monkeypatch.setattr(fits, "resident_bytes", lambda: 0)
    found = planned(place, capsys)
    assert found["left"] < 0
    assert found["notes"][-1].startswith("THE RUN DOES NOT FIT: ")


def test_training_refuses_it_before_it_loads_anything(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fits, "available_bytes", lambda: 100_000)
    monkeypatch.setattr("lorafa.train.recipe.load_base", lambda *_: pytest.fail("loaded"))
    assert cli.main(["train", *settings(place), f"run_dir={tmp_path / 'run'}"]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "does not fit: the run needs at least 0.1 MiB (weights 0.1 MiB" in error
    assert not (tmp_path / "run").exists()
    assert cli.main(["train", "--dry-run", *settings(place), f"run_dir={tmp_path / 'run'}"]) == 1


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["peft.rr=3"], 2, "peft.rr"),
        (["model=nowhere"], 1, "No model 'nowhere': there is no such folder."),
        (["data=nowhere.jsonl"], 1, "nowhere.jsonl"),
        (["peft.target_modules=[nothing]"], 2, "nothing"),
    ],
)
def test_what_is_wrong_is_said(
    place: Path, arguments: list[str], status: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(*settings(place), *arguments) == status
    assert text in " ".join(capsys.readouterr().err.split())


def test_a_damaged_file_of_weights_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = make_workplace(tmp_path)
    file = work / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert plan(*settings(work)) == 1
    assert "was cut off: 100 of" in " ".join(capsys.readouterr().err.split())
