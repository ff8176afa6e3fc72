"""A teacher from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from lorafa.cli.main import main
from lorafa.train import teacher as teaching
from toys.workplace import at_step, make_teacher, make_workplace, read, settings

CYCLE = [
    *("align=snapshot", "align.schedule=cyclic", "align.task_steps=2", "align.teacher_steps=1", "align.gate=false"),
    *("align.rewarm_steps=1", "align.probe_rows=3"),
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"))


def command(workplace: Path, run: Path, *more: str) -> list[str]:
    given = {text.partition("=")[0] for text in more} | {"train.steps", "train.checkpoint_every"}
    if "peft=full_ft" in more:
        given |= {text.partition("=")[0] for text in settings(workplace, run) if text.startswith("peft.")}
    own = [text for text in settings(workplace, run) if text.partition("=")[0] not in given]
    return ["train", *own, "train.steps=4", "train.checkpoint_every=1", "optim.schedule=constant", *more]


@pytest.fixture(scope="module")
def teacher(workplace: Path) -> Path:
    return make_teacher(workplace)


def losses_of(run: Path) -> list[tuple[float, float]]:
    return [(row["loss"], row["divergence"]) for row in rows_of(run / "metrics.jsonl") if "loss" in row]


def decisions_of(run: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in read(run / "result.json").get("decisions", ()) if row["kind"] == kind]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    out = capsys.readouterr()
    return " ".join((out.out + out.err).split())


@pytest.mark.matrix(2, each_word=False)
@pytest.mark.parametrize("teacher", ["base", "snapshot", "ema", "anchor"])
def test_the_divergence_of_every_step_stands_in_the_metrics(workplace: Path, tmp_path: Path, teacher: str) -> None:
    run = tmp_path / "run"
    assert main(command(workplace, run, f"align={teacher}", "align.divergence=fkl", "align.temperature=2.0")) == 0
    rows = [row for row in rows_of(run / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 4
    assert all(row["divergence"] >= 0 for row in rows)
    assert teacher == "ema" or rows[-1]["divergence"] > 0


def test_weight_zero_is_a_plain_run(workplace: Path, tmp_path: Path) -> None:
    plain, aligned = tmp_path / "plain", tmp_path / "aligned"
    assert main(command(workplace, plain)) == 0
    assert main(command(workplace, aligned, "align=base", "align.weight=0")) == 0
    assert read(plain / "result.json")["after"] == read(aligned / "result.json")["after"]


def test_a_cyclic_run_goes_on_in_the_middle_of_a_phase(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cycle = [*(text for text in CYCLE if "teacher_steps" not in text), "align.teacher_steps=2", "train.steps=8"]
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    assert main(command(workplace, whole, *cycle)) == 0
    with monkeypatch.context() as patch:
        at_step(patch, 4)  # before its checkpoint: one of two steps of the teacher is done
        assert main(command(workplace, cut, *cycle)) == 130
    assert read(cut / "result.json")["status"] != "finished"
    assert main(["train", f"train.resume={cut}"]) == 0
    result, found = read(whole / "result.json"), read(cut / "result.json")
    assert [row["kind"] for row in result["decisions"] if row["kind"] != "reweighted"][:2] == ["switch", "switch"]
    assert {"step", "phase", "why", "task", "divergence"} <= result["decisions"][0].keys()
    assert (found["after"], found["decisions"]) == (result["after"], result["decisions"])
    steps = [
        [(row["step"], row["loss"], row.get("divergence")) for row in rows_of(run / "metrics.jsonl") if "loss" in row]
        for run in (whole, cut)
    ]
    assert steps[0] == steps[1]
    assert [step for step, _, divergence in steps[0] if divergence is not None] == [3, 4]
    tensors = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (whole, cut)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


REORIENTED = [*CYCLE[1:3], "align.teacher_steps=3", *CYCLE[4:], "align.reorient=true", "train.steps=9"]
REORIENTED += ["train.keep_checkpoints=9"]


@pytest.mark.slow
def test_a_run_in_new_directions_ends_with_an_adapter_of_its_rank(workplace: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(command(workplace, run, "align=snapshot", *REORIENTED)) == 0
    assert [row["kind"] for row in read(run / "result.json")["decisions"]][:2] == ["switch", "reoriented"]
    (line,) = decisions_of(run, "compressed")
    assert 0 < line["discarded"] < 0.5
    assert read(run / "adapter" / "adapter_config.json")["r"] == 4
    carried = read(run / "checkpoints" / "checkpoint-4" / "adapter_config.json")
    assert carried["r"] == 8  # in the middle of the phase: the update so far, and what is learnt beside it


def test_another_model_teaches(workplace: Path, teacher: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(command(workplace, run, "align=external", f"align.teacher={teacher}", "align.map=procrustes")) == 0
    assert min(divergence for _, divergence in losses_of(run)) > 0.01  # it is no other student


def test_a_teacher_that_was_kept_is_not_loaded_again(
    workplace: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    external = ["align=external", f"align.teacher={teacher}", f"align.cache={tmp_path / 'kept'}", "align.top_k=8"]
    assert main(command(workplace, tmp_path / "one", *external)) == 0
    (line,) = decisions_of(tmp_path / "one", "cached")
    assert line["why"].startswith(f"16 rows of align.teacher={teacher}")
    assert line["why"].endswith("; 16 rows were asked now")

    def refuse(*args: Any, **own: Any) -> Any:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(teaching, "load_model", refuse)
    assert main(command(workplace, tmp_path / "two", *external)) == 0
    assert decisions_of(tmp_path / "two", "cached")[0]["why"].endswith("; 0 rows were asked now")
    assert losses_of(tmp_path / "two") == losses_of(tmp_path / "one")
    assert all(divergence > 0 for _, divergence in losses_of(tmp_path / "one"))


@pytest.mark.slow
def test_the_base_is_kept_in_the_users_cache(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFA_CACHE", str(tmp_path / "cache"))
    more = ["align=base", "align.cache=true", "align.top_k=300"]  # all tokens: the same as without a cache
    assert main(command(workplace, tmp_path / "kept", *more)) == 0
    assert main(command(workplace, tmp_path / "plain", "align=base")) == 0
    assert main(command(workplace, tmp_path / "again", *more)) == 0
    (folder,) = (tmp_path / "cache" / "targets").iterdir()
    assert (folder / "targets.json").is_file()
    assert decisions_of(tmp_path / "again", "cached")[0]["why"].endswith("; 0 rows were asked now")
    for found, wanted in zip(losses_of(tmp_path / "kept"), losses_of(tmp_path / "plain"), strict=True):
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_a_cache_of_other_data_or_of_another_teacher_is_refused(
    workplace: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = [f"align.cache={tmp_path / 'kept'}", "align.top_k=8"]
    external = ["align=external", f"align.teacher={teacher}", *cache]
    assert main(command(workplace, tmp_path / "one", *external)) == 0
    assert main(command(workplace, tmp_path / "two", *external, "data.eval_size=5")) == 1
    assert f"{tmp_path / 'kept'} holds what align.teacher={teacher} says of other rows" in said(capsys)
    assert main(command(workplace, tmp_path / "four", *external, "align.quantize=nf4")) == 1
    assert f"the targets of another teacher, align.teacher={teacher}, whose weights are not" in said(capsys)
    other = workplace / "model"
    assert main(command(workplace, tmp_path / "three", "align=external", f"align.teacher={other}", *cache)) == 1
    assert f"the targets of another teacher, align.teacher={teacher}, whose weights are not" in said(capsys)


@pytest.mark.parametrize("cache", ["align.cache=false", "align.cache=true"])
def test_a_teacher_of_another_vocabulary_is_refused(
    workplace: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], cache: str
) -> None:
    shutil.copytree(teacher, tmp_path / "other")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(teacher)
    tokenizer.add_tokens(["zz"])
    tokenizer.save_pretrained(tmp_path / "other")
    external = ["align=external", f"align.teacher={tmp_path / 'other'}", cache]
    assert main(command(workplace, tmp_path / "run", *external)) == 2
    assert "has another vocabulary than the model, so their distributions over next tokens" in said(capsys)


def test_a_teacher_that_reads_other_tokens_by_the_same_ids_is_refused_for_inner_states_too(
    workplace: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(teacher, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    content = read(file)
    vocabulary = content["model"]["vocab"]
    first, second = [token for token in vocabulary if not token.startswith("<|")][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content))
    external = ["align=external", f"align.teacher={tmp_path / 'other'}", "align.divergence=none", "align.map=gram"]
    assert main(command(workplace, tmp_path / "run", *external)) == 2
    assert "reads the same token ids as the model, and in its vocabulary 2 of " in said(capsys)


def test_a_schedule_without_held_out_rows_is_refused_before_anything_runs(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(workplace, tmp_path / "run", *CYCLE, "data.eval_size=0")) == 1
    assert "align.schedule=cyclic goes by held-out rows, and none of" in said(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_balanced_weight_is_read_once_and_recorded(workplace: Path, teacher: Path, tmp_path: Path) -> None:
    external = ["align=external", f"align.teacher={teacher}", "align.weight=balanced"]
    assert main(command(workplace, tmp_path / "one", *external)) == 0
    (line,) = decisions_of(tmp_path / "one", "balanced")
    assert line["step"] == 0
    assert "of 14 layers the gradient of the task is" in line["why"]
    base = ["align=base", "align.weight=balanced", "align.divergence=fkl"]
    assert main(command(workplace, tmp_path / "two", *base)) == 0
    (line,) = decisions_of(tmp_path / "two", "balanced")
    assert line["step"] >= 1  # at its start the base is the student


@pytest.mark.slow
def test_a_map_that_is_trained_is_in_no_file_of_the_adapter(workplace: Path, teacher: Path, tmp_path: Path) -> None:
    more = ["align=external", f"align.teacher={teacher}", "align.map=proj", "align.map_weight=3", "train.steps=6"]
    assert main(command(workplace, tmp_path / "whole", *more)) == 0
    plain = load_file(tmp_path / "whole" / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name for name in plain)
    state = torch.load(tmp_path / "whole" / "checkpoints" / "checkpoint-6" / "alignment.pt", weights_only=True)
    assert [tuple(P.shape) for P in state["map"]] == [(32, 32), (32, 32)]
    assert not torch.equal(state["map"][0], torch.eye(32))


def first_divergence(workplace: Path, run: Path, *more: str) -> float:
    """That of the student, as it starts, from its own base as a model of its own."""
    model = next(text for text in settings(workplace, run) if text.startswith("model=")).partition("=")[2]
    given = ("align=external", f"align.teacher={model}", "align.divergence=logit_mse", "train.steps=1", *more)
    assert main(command(workplace, run, *given)) == 0
    return float(next(row["divergence"] for row in rows_of(run / "metrics.jsonl") if "divergence" in row))


def test_another_model_is_loaded_in_its_own_format_another_one_or_quantized(workplace: Path, tmp_path: Path) -> None:
    found = {
        name: first_divergence(workplace, tmp_path / name, *more)
        for name, more in {
            "own": [], "float16": ["align.dtype=float16"], "int8": ["align.quantize=int8"],
            "nf4": ["align.quantize=nf4"],
        }.items()
    }  # fmt: skip
    assert found["own"] == 0
    assert 0 < found["float16"] < found["int8"] < found["nf4"]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["align=bse"], "align has no option 'bse'. Did you mean 'base'"),
        (["align.weight=2"], "align.weight=2.0 would change nothing: there is no teacher"),
        (["align=external"], "align=external needs align.teacher=<model>"),
        (["align=base", "align.teacher=x"], "which no other teacher reads"),
        (["align=base", "align.quantize=nf4"], "align.quantize=nf4 would change nothing here"),
        (["align=snapshot", "align.dtype=float32"], "align.dtype=float32 would change nothing here"),
        (["align=external", "align.teacher=x", "align.quantize=nf5"], "align.quantize has no value 'nf5'"),
        (["align=base", "align.task_steps=3"], "align.task_steps=3 would change nothing here"),
        (["align=base", "align.divergence=none"], "compares inner states alone, and align.map is null"),
        (["align=base", "align.temperature=2"], "There is no setting 'align.temperature'"),
        (["align=base", "train.chunked_loss=false"], "align=base needs train.chunked_loss=true"),
        (["align=base", "peft=full_ft"], "is a state of the student's adapters"),
        (["align=ema", "align.cache=true"], "align=ema changes while the student is trained. Take base or external"),
        (["align=base", "align.cache=true", "align.map=gram"], "align.cache keeps distributions, and align.map"),
        (["align=base", "align.top_k=5"], "align.top_k=5 would change nothing here"),
        (["align=base", "align.weight=blanced"], "align.weight must be a number >= 0 or 'balanced', found 'blanced'"),
        (["align=base", "align.reorient=true"], "align.reorient=True would change nothing here"),
        (["align=base", "align.divergence=fkl", "align.temperature=0"], "temperature must be a number above 0"),
        (["align=ema", "align.ema_beta=0"], "align.ema_beta must be a number in (0, 1], found 0"),
        (["align=anchor", "align.share=2"], "align.share must be a number in [0, 1], found 2"),
        (["align=base", "align.map=mse", "align.map_layers=[-1]"], "align.map_layers must hold integers >= 0 only"),
        (["align=base", "align.map=mse", "align.map_layers=[]"], "align.map_layers names no layer"),
        (["align=base", "align.schedule=cyclic"], "needs 300: the teacher would count in none. Lower both"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], text: str
) -> None:
    assert main(command(workplace, tmp_path / "run", *more)) == 2
    assert text in said(capsys)
    assert not (tmp_path / "run").exists()
